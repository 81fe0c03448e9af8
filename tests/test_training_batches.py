"""The plan: what a step holds depends on the seed alone, and ranks and micro-batches only cut it up."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spa_ray.errors import InputError
from spa_ray.training.batches import Order, PairTokens, Plan, make_plan, order_pairs, step_weights
from spa_ray.training.schedule import lr_multiplier

SIZES = {"n": st.integers(1, 60), "batch_size": st.integers(1, 20), "seed": st.integers(0, 5)}
CUTS = {"ranks": st.integers(1, 4), "tokens": st.integers(1, 200), "packed": st.booleans()}


def tokens_and_gaps(n: int, seed: int) -> tuple[PairTokens, np.ndarray]:
    rng = np.random.default_rng(seed)
    sides = rng.integers(1, 60, size=(2, n))
    return PairTokens(sides.max(axis=0), sides.sum(axis=0)), rng.integers(0, 9, size=n).astype(float)


def build(
    n: int,
    batch_size: int,
    seed: int,
    *,
    ranks: int = 1,
    tokens: int = 100,
    epochs: float = 1.0,
    packed: bool = False,
) -> tuple[Order, Plan, PairTokens]:
    lengths, gaps = tokens_and_gaps(n, seed)
    order = order_pairs(n, seed=seed, batch_size=batch_size, epochs=epochs, max_steps=None)
    weights = step_weights(order, gaps, alpha=1.0, w_max=None)
    plan = make_plan(order, weights, lengths, ranks=ranks, micro_batch_tokens=tokens, packed=packed)
    return order, plan, lengths


def entries_of(plan: Plan, step: int, rank: int) -> np.ndarray:
    return np.concatenate([np.arange(s.start, s.stop) for s in plan.micro_batches(step, rank)])


@given(**SIZES, **CUTS)
def test_every_pair_is_trained_on_exactly_once_an_epoch(
    n: int, batch_size: int, seed: int, ranks: int, tokens: int, packed: bool
) -> None:
    _, plan, _ = build(n, batch_size, seed, ranks=ranks, tokens=tokens, epochs=2, packed=packed)
    seen = [entries_of(plan, s, r) for s in range(plan.steps) for r in range(ranks)]
    entries = np.sort(np.concatenate(seen)).astype(int)
    assert (entries == np.arange(2 * n)).all()
    for epoch in (0, 1):
        steps = np.flatnonzero(plan.epoch == epoch)
        pairs = np.concatenate([plan.pairs[plan.step_entries(int(s))] for s in steps])
        assert (np.sort(pairs) == np.arange(n)).all()


@given(**SIZES, **CUTS)
def test_a_steps_pairs_and_weights_do_not_depend_on_ranks_or_micro_batches(
    n: int, batch_size: int, seed: int, ranks: int, tokens: int, packed: bool
) -> None:
    def contents(plan: Plan) -> list[list[tuple[int, float]]]:
        slices = [plan.step_entries(s) for s in range(plan.steps)]
        return [sorted(zip(plan.pairs[s].tolist(), plan.weights[s].tolist(), strict=True)) for s in slices]

    _, one, _ = build(n, batch_size, seed)
    _, many, _ = build(n, batch_size, seed, ranks=ranks, tokens=tokens, packed=packed)
    assert contents(one) == contents(many)


@given(**SIZES, **CUTS)
def test_all_ranks_run_equally_many_micro_batches_within_the_token_budget(
    n: int, batch_size: int, seed: int, ranks: int, tokens: int, packed: bool
) -> None:
    _, plan, lengths = build(n, batch_size, seed, ranks=ranks, tokens=tokens, packed=packed)
    for step in range(plan.steps):
        of_rank = [plan.micro_batches(step, rank) for rank in range(ranks)]
        assert {len(m) for m in of_rank} == {int(plan.micros[step])}
        assert plan.micros[step] >= 1
        for micro in (m for rank in of_rank for m in rank):
            pairs = plan.pairs[micro]
            cost = lengths.total[pairs].sum() if packed else len(pairs) * 2 * lengths.longest[pairs].max(initial=0)
            assert len(pairs) <= 1 or cost <= tokens
        sizes = [sum(m.stop - m.start for m in rank) for rank in of_rank]
        assert max(sizes) - min(sizes) <= 1


@given(**SIZES, **CUTS)
def test_at_alpha_one_the_mean_weight_of_every_global_step_is_one(
    n: int, batch_size: int, seed: int, ranks: int, tokens: int, packed: bool
) -> None:
    _, plan, _ = build(n, batch_size, seed, ranks=ranks, tokens=tokens, packed=packed)
    means = [plan.weights[plan.step_entries(s)].mean() for s in range(plan.steps)]
    assert means == pytest.approx([1.0] * plan.steps)


@given(**SIZES)
def test_the_last_step_of_an_epoch_may_be_short_and_no_step_spans_two(n: int, batch_size: int, seed: int) -> None:
    _, plan, _ = build(n, batch_size, seed, epochs=3)
    per_epoch = -(-n // batch_size)
    short = n - (per_epoch - 1) * batch_size
    assert plan.sizes.tolist() == ([batch_size] * (per_epoch - 1) + [short]) * 3


def test_epochs_are_shuffled_differently_and_another_seed_too() -> None:
    order, again = (order_pairs(50, seed=3, batch_size=10, epochs=2, max_steps=None) for _ in range(2))
    other = order_pairs(50, seed=4, batch_size=10, epochs=2, max_steps=None)
    assert (order.pairs == again.pairs).all()
    assert (order.pairs[:50] != order.pairs[50:]).any()
    assert (order.pairs != other.pairs).any()


def test_half_an_epoch_is_the_first_half_of_the_whole_one() -> None:
    whole = order_pairs(10, seed=0, batch_size=2, epochs=1, max_steps=None)
    part = order_pairs(10, seed=0, batch_size=2, epochs=0.5, max_steps=None)
    more = order_pairs(10, seed=0, batch_size=2, epochs=1.5, max_steps=None)
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
    order = order_pairs(4, seed=0, batch_size=4, epochs=1, max_steps=None)
    gaps = np.array([0.0, 1.0, 1.0, 6.0])
    assert step_weights(order, gaps, alpha=1.0, w_max=2.0).max() == 2.0
    assert (step_weights(order, np.zeros(4), alpha=1.0, w_max=None) == 1).all()


def test_no_pairs_is_the_users_mistake() -> None:
    with pytest.raises(InputError, match="no pairs"):
        order_pairs(0, seed=0, batch_size=4, epochs=1, max_steps=None)


def test_packed_micro_batches_are_full_up_to_one_pair_and_ranks_get_nearly_equal_tokens() -> None:
    _, plan, lengths = build(4000, 1000, 1, ranks=4, tokens=2000, packed=True)
    for step in range(plan.steps):
        of_rank = [[plan.pairs[m] for m in plan.micro_batches(step, r)] for r in range(4)]
        totals = [sum(lengths.total[pairs].sum() for pairs in rank) for rank in of_rank]
        assert max(totals) - min(totals) <= lengths.total.max()
        for rank in of_rank:
            assert all(lengths.total[pairs].sum() > 2000 - lengths.total.max() for pairs in rank[:-1])


@pytest.mark.parametrize("packed", [False, True])
def test_a_million_pairs_are_planned_in_seconds(packed: bool) -> None:
    sides = np.random.default_rng(0).integers(40, 600, size=(2, 1_000_000))
    tokens = PairTokens(sides.max(axis=0), sides.sum(axis=0))
    started = time.process_time()
    order = order_pairs(len(tokens.total), seed=0, batch_size=128, epochs=1, max_steps=None)
    weights = step_weights(order, tokens.total.astype(float), alpha=1.0, w_max=None)
    plan = make_plan(order, weights, tokens, ranks=8, micro_batch_tokens=16384, packed=packed)
    assert plan.steps == 7813
    assert time.process_time() - started < 10


@given(st.integers(1, 200), st.floats(0, 0.9), st.sampled_from(["cosine", "linear", "constant"]))
def test_the_learning_rate_rises_then_falls_and_is_never_zero(steps: int, warmup: float, kind: str) -> None:
    rates = [lr_multiplier(s, steps, kind=kind, warmup=warmup) for s in range(steps)]  # type: ignore[arg-type]
    peak = int(np.argmax(rates))
    assert all(0 < r <= 1 for r in rates)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
