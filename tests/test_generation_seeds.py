"""Seeds depend on what is drawn and on nothing else."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from spa_ray.generation.seeds import seed_for

WHERE = st.fixed_dictionaries(
    {
        "response": st.integers(0, 20),
        "objective": st.sampled_from(["", "harmless", "helpful"]),
        "draw": st.integers(0, 9),
        "attempt": st.integers(0, 5),
    }
)
KEYS = st.tuples(st.integers(0, 5), st.integers(1, 3), st.text(max_size=8), st.sampled_from(["sample", "score"]), WHERE)
Key = tuple[int, int, str, str, dict[str, Any]]


def seed(key: Key) -> int:
    *place, where = key
    return seed_for(*place, **where)


@given(KEYS, KEYS)
def test_two_requests_share_a_seed_exactly_when_they_are_the_same(one: Key, other: Key):
    assert (seed(one) == seed(other)) == (one == other)


@given(KEYS)
def test_a_seed_is_a_non_negative_int64(key: Key):
    assert 0 <= seed(key) < 2**63


def test_seeds_are_the_same_on_every_machine_and_in_every_version():
    assert seed_for(0, 1, "prompt", "sample", response=3) == 5335928237613111390
