"""Histograms of scores and funnels side by side."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spa_ray.evaluation.distributions import funnel_markdown, funnel_table, histogram_markdown, histograms

FUNNEL = {
    "prompts": 100,
    "dropped": {"inconsistent": 60, "no_pair": 0},
    "kept": 40,
    "pairs": 90,
    "pairs_by_kind": {"refined": 30, "candidate": 60},
    "pairs_by_decided_by": {"harmless": 80, "helpful": 10},
    "dead_pairs": 4,
    "tau": 5.0,
}


@given(st.lists(st.tuples(st.integers(1, 10), st.integers(1, 10)), min_size=1))
def test_every_score_is_in_one_bin(rows: list[tuple[int, int]]) -> None:
    found = histograms({"a": np.array(rows, dtype=float)}, ["harmless", "helpful"])
    for at, name in enumerate(("harmless", "helpful")):
        assert sum(found[name]["a"].values()) == len(rows)
        assert sum(score * n for score, n in found[name]["a"].items()) == sum(row[at] for row in rows)


def test_a_failed_judgement_is_no_score() -> None:
    found = histograms({"a": np.array([[np.nan, 3.0], [6.6, 3.2]])}, ["harmless", "helpful"])
    assert found == {"harmless": {"a": {7: 1}}, "helpful": {"a": {3: 2}}}
    with pytest.raises(ValueError, match="a has shape"):
        histograms({"a": np.ones((3, 1))}, ["harmless", "helpful"])


def test_groups_are_shares_of_their_own_scores() -> None:
    text = histogram_markdown({"candidate": {3: 3, 8: 1}, "refined": {8: 2}, "none": {}})
    assert text.splitlines()[0] == "|  | 3 | 8 | mean | scores |"
    assert text.splitlines()[2] == "| candidate | 75.0% | 25.0% | 4.25 | 4 |"
    assert text.splitlines()[3] == "| refined | 0.0% | 100.0% | 8.00 | 2 |"
    assert text.splitlines()[4] == "| none |  |  |  | 0 |"


def test_funnels_are_means_over_seeds_and_an_arm_without_a_bound_has_none() -> None:
    other = {**FUNNEL, "kept": 20, "dropped": {"inconsistent": 80, "no_pair": 0}}
    table = funnel_table({"spa": [FUNNEL, other], "no_filter": [{**FUNNEL, "tau": None}]})
    assert (table["spa"]["kept"], table["spa"]["dropped: inconsistent"]) == (30, 70)
    lines = funnel_markdown(table).splitlines()
    assert lines[0] == "|  | spa | no_filter |"
    assert "| τ | 5.00 |  |" in lines
    assert not any("no_pair" in line for line in lines)  # nobody lost a prompt by it
