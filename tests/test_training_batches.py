"""Order and weights: what a step holds depends on the seed alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spa_ray.config.training import train_section
from spa_ray.errors import InputError
from spa_ray.training.batches import Order, order_pairs, step_weights
from spa_ray.training.method import method_of
from spa_ray.training.schedule import lr_multiplier

SIZES = {"n": st.integers(1, 60), "batch_size": st.integers(1, 20), "seed": st.integers(0, 5)}
PROMPTS = {"prompts": st.lists(st.integers(0, 9), min_size=1, max_size=60).map(np.array), "batch": st.integers(1, 20)}


def in_order(n: int, batch_size: int, seed: int, *, epochs: float = 1.0, prompts: np.ndarray | None = None) -> Order:
    return order_pairs(n, seed=seed, batch_size=batch_size, epochs=epochs, max_steps=None, prompts=prompts)


@given(**SIZES)
def test_every_pair_is_trained_on_exactly_once_an_epoch(n: int, batch_size: int, seed: int) -> None:
    order = in_order(n, batch_size, seed, epochs=2)
    assert (np.sort(order.pairs[:n]) == np.arange(n)).all()
    assert (np.sort(order.pairs[n:]) == np.arange(n)).all()


@given(**PROMPTS)
def test_in_order_of_prompts_a_prompts_pairs_are_adjacent_and_each_comes_once(prompts: np.ndarray, batch: int) -> None:
    n = len(prompts)
    order = in_order(n, batch, 0, epochs=2, prompts=prompts)
    for epoch in (order.pairs[:n], order.pairs[n:]):
        assert (np.sort(epoch) == np.arange(n)).all()
        turns = prompts[epoch]
        assert np.count_nonzero(np.diff(turns)) + 1 == len(np.unique(prompts))
    sizes = np.bincount(order.step)
    assert (sizes[:-1] <= batch).all()
    assert sizes.max() == min(n, batch)  # a prompt that a step cuts goes on in the next one


def test_prompts_and_the_pairs_of_each_are_shuffled_anew_every_epoch() -> None:
    prompts = np.repeat(np.arange(20), 10)
    one, two = np.split(in_order(200, 16, 0, epochs=2, prompts=prompts).pairs, 2)
    assert prompts[one][::10].tolist() != prompts[two][::10].tolist()
    for pairs in (one, two):
        first = pairs[prompts[pairs] == 0]
        assert first.tolist() != sorted(first)


@given(**SIZES)
def test_in_order_of_pairs_prompts_change_nothing(n: int, batch_size: int, seed: int) -> None:
    """`train.order=pairs` is the order that it always was."""
    whole = np.random.default_rng([seed, 0, 0]).permutation(n)
    assert in_order(n, batch_size, seed).pairs.tolist() == whole.tolist()


def weigh(**settings: Any) -> Any:
    return method_of(train_section(settings)).weights


@given(**SIZES)
def test_at_alpha_one_the_mean_weight_of_every_step_is_one(n: int, batch_size: int, seed: int) -> None:
    order = in_order(n, batch_size, seed)
    gap = np.random.default_rng(seed).integers(0, 9, size=n).astype(float)
    weights = step_weights(order, gap, weigh())
    means = [weights[a:b].mean() for a, b in zip(order.starts, order.starts[1:], strict=False)]
    assert means == pytest.approx([1.0] * order.steps)


def test_over_an_epochs_mean_gap_a_pairs_weight_is_the_same_in_every_step() -> None:
    order = in_order(40, 8, 0, epochs=2)
    gap = np.random.default_rng(0).integers(0, 9, size=40).astype(float)
    weights = step_weights(order, gap, partial(weigh(alpha=2.0), mean_gap=float(gap.mean())))
    assert weights == pytest.approx((gap[order.pairs] / gap.mean()) ** 2)


@given(**SIZES)
def test_the_last_step_of_an_epoch_may_be_short_and_no_step_spans_two(n: int, batch_size: int, seed: int) -> None:
    order = in_order(n, batch_size, seed, epochs=3)
    per_epoch = -(-n // batch_size)
    short = n - (per_epoch - 1) * batch_size
    assert np.diff(order.starts).tolist() == ([batch_size] * (per_epoch - 1) + [short]) * 3


def test_epochs_are_shuffled_differently_and_another_seed_too() -> None:
    order, again = (in_order(50, 10, 3, epochs=2) for _ in range(2))
    other = in_order(50, 10, 4, epochs=2)
    assert (order.pairs == again.pairs).all()
    assert (order.pairs[:50] != order.pairs[50:]).any()
    assert (order.pairs != other.pairs).any()


@pytest.mark.parametrize("prompts", [None, np.arange(10) // 3])
def test_half_an_epoch_is_the_first_half_of_the_whole_one(prompts: np.ndarray | None) -> None:
    whole, part, more = (in_order(10, 2, 0, epochs=epochs, prompts=prompts) for epochs in (1, 0.5, 1.5))
    assert part.pairs.tolist() == whole.pairs[:5].tolist()
    assert more.pairs[:10].tolist() == whole.pairs.tolist()
    assert len(more.pairs) == 15


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 30))
def test_max_steps_takes_exactly_that_many_steps_over_as_many_epochs_as_needed(n: int, batch: int, steps: int) -> None:
    order = order_pairs(n, seed=0, batch_size=batch, epochs=0.1, max_steps=steps)
    assert int(order.step[-1]) + 1 == steps == len(order.epoch)
    longer = order_pairs(n, seed=0, batch_size=batch, epochs=0.1, max_steps=steps + 3)
    assert longer.pairs[: len(order.pairs)].tolist() == order.pairs.tolist()


def test_w_max_clips_and_a_step_of_dead_pairs_gets_ones() -> None:
    order = in_order(4, 4, 0)
    gaps = np.array([0.0, 1.0, 1.0, 6.0])
    assert step_weights(order, gaps, weigh(w_max=2.0)).max() == 2.0
    assert (step_weights(order, np.zeros(4), weigh()) == 1).all()


def test_no_pairs_is_the_users_mistake() -> None:
    with pytest.raises(InputError, match="no pairs"):
        in_order(0, 4, 0)


@given(st.integers(1, 200), st.floats(0, 0.9), st.sampled_from(["cosine", "linear", "constant"]))
def test_the_learning_rate_rises_then_falls_and_is_never_zero(steps: int, warmup: float, kind: str) -> None:
    rates = [lr_multiplier(s, steps, kind=kind, warmup=warmup) for s in range(steps)]  # type: ignore[arg-type]
    peak = int(np.argmax(rates))
    assert all(0 < r <= 1 for r in rates)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
