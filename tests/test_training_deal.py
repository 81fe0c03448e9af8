"""A step's distinct sequences, dealt: each once, within the token budget, evenly, with every pair's loss taken once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spa_ray.training.balance import COPY, deal
from spa_ray.training.batches import order_pairs, step_weights
from spa_ray.training.deal import Part, Plan, Sequences, Step
from spa_ray.training.losses import pair_weights


@dataclass(frozen=True)
class Graph:
    """Prompts with answers, and some of the pairs among each prompt's answers."""

    sequences: Sequences
    gap: np.ndarray


def graph(seed: int, *, prompts: int, answers: int, share: float = 1.0, longest: int = 60) -> Graph:
    rng = np.random.default_rng(seed)
    prompt = np.repeat(np.arange(prompts), answers)
    head = np.repeat(rng.integers(1, 20, size=prompts), answers)
    responses = rng.integers(1, longest, size=len(prompt))
    a, b = np.triu_indices(answers, k=1)
    pairs = np.concatenate([np.stack([a, b], axis=1) + p * answers for p in range(prompts)])
    kept = rng.random(len(pairs)) < share
    kept[0] = True
    pairs = rng.permuted(pairs[kept], axis=1)
    return Graph(
        Sequences(head + responses, responses, head, prompt, pairs), rng.integers(0, 9, size=len(pairs)).astype(float)
    )


GRAPHS = st.builds(
    graph,
    st.integers(0, 99),
    prompts=st.integers(1, 8),
    answers=st.integers(2, 6),
    share=st.floats(0.1, 1.0),
)
CUTS = {
    "made": GRAPHS,
    "prompts": st.booleans(),
    "ranks": st.integers(1, 4),
    "budget": st.integers(1, 400),
    "packed": st.booleans(),
}


def plan_of(
    made: Graph, *, ranks: int = 1, budget: int = 200, packed: bool = True, batch_size: int = 16, prompts: bool = True
) -> Plan:
    sequences = made.sequences
    order = order_pairs(
        len(sequences.of_pair),
        seed=0,
        batch_size=batch_size,
        epochs=1,
        max_steps=None,
        prompts=sequences.prompt_of_pair if prompts else None,
    )
    weights = step_weights(order, made.gap, partial(pair_weights, alpha=1.0))
    return Plan(order, weights, sequences, ranks, budget, packed)


def parts_of(step: Step, rank: int) -> list[Part]:
    return [*step.shared[rank], *step.whole[rank]]


def laid_out(made: Graph, step: Step, part: Part, packed: bool) -> int:
    """Tokens of a micro-batch's rows; packed, what a prompt's sequences have in common stands there once."""
    which = step.sequences[part.sequences]
    tokens, heads, prompt = (getattr(made.sequences, name)[which] for name in ("tokens", "heads", "prompt"))
    if not packed:
        return len(tokens) * int(tokens.max(initial=0))
    return int((tokens - heads).sum() + sum(heads[prompt == one].max() for one in set(prompt)))


@given(**CUTS)
def test_every_sequence_of_a_step_is_computed_once_and_every_pair_gives_its_loss_once(
    made: Graph, prompts: bool, ranks: int, budget: int, packed: bool
) -> None:
    plan = plan_of(made, ranks=ranks, budget=budget, packed=packed, prompts=prompts)
    for step in map(plan.step, range(plan.steps)):
        assert (step.sequences[step.sides] == made.sequences.of_pair[step.pairs]).all()
        assert sorted(step.sequences) == sorted(set(made.sequences.of_pair[step.pairs].ravel()))
        parts = [part for rank in range(ranks) for part in parts_of(step, rank)]
        computed = np.concatenate([part.sequences for part in parts])
        assert sorted(computed) == list(range(len(step.sequences)))
        of_parts = [part.pairs for part in parts]
        assert sorted(np.concatenate([*of_parts, step.shared_pairs])) == list(range(len(step.pairs)))
        for part in parts:
            assert np.isin(step.sides[part.pairs], part.sequences).all()


@given(**CUTS)
def test_a_whole_micro_batch_holds_all_pairs_of_its_sequences(
    made: Graph, prompts: bool, ranks: int, budget: int, packed: bool
) -> None:
    plan = plan_of(made, ranks=ranks, budget=budget, packed=packed, prompts=prompts)
    for step in map(plan.step, range(plan.steps)):
        for part in (part for rank in step.whole for part in rank):
            touched = np.isin(step.sides, part.sequences)
            assert (touched.all(axis=1) == touched.any(axis=1)).all()
            assert np.flatnonzero(touched.any(axis=1)).tolist() == part.pairs.tolist()


@given(**CUTS)
def test_all_ranks_run_equally_many_micro_batches_of_a_kind_within_the_token_budget(
    made: Graph, prompts: bool, ranks: int, budget: int, packed: bool
) -> None:
    plan = plan_of(made, ranks=ranks, budget=budget, packed=packed, prompts=prompts)
    for step in map(plan.step, range(plan.steps)):
        for kind in (step.shared, step.whole):
            assert len({len(parts) for parts in kind}) == 1
            for part in (part for parts in kind for part in parts):
                assert len(part.sequences) <= 1 or laid_out(made, step, part, packed) <= budget
        assert parts_of(step, 0)


@given(**CUTS)
def test_a_steps_pairs_and_weights_do_not_depend_on_ranks_or_micro_batches(
    made: Graph, prompts: bool, ranks: int, budget: int, packed: bool
) -> None:
    one = plan_of(made, prompts=prompts)
    many = plan_of(made, ranks=ranks, budget=budget, packed=packed, prompts=prompts)
    for a, b in zip(map(one.step, range(one.steps)), map(many.step, range(many.steps)), strict=True):
        assert (a.pairs == b.pairs).all()
        assert (a.weights == b.weights).all()


def test_one_rank_keeps_prompts_that_fit_together_and_so_runs_nothing_twice() -> None:
    made = graph(0, prompts=30, answers=6)
    plan = plan_of(made, budget=700, batch_size=64)
    steps = [plan.step(s) for s in range(plan.steps)]
    assert max(len(step.whole[0]) for step in steps) > 1
    assert not any(step.shared[0] for step in steps)


def test_a_prompt_that_is_just_too_large_is_cut_into_the_parts_that_fit() -> None:
    tokens, heads = [800] * 6, [500] * 6
    (parts,) = deal(tokens, [0] * 6, heads, ranks=1, budget=2048, packed=True)
    assert sorted(map(len, parts)) == [2, 4]  # one by one they would be three times two
    (parts,) = deal(tokens, [0] * 6, None, ranks=1, budget=2048, packed=False)
    assert sorted(map(len, parts)) == [2, 2, 2]


def test_copies_of_a_long_prompt_count_by_what_they_take() -> None:
    """Attention sees every copy: a budget of laid-out tokens alone would bound no memory."""
    tokens, heads = [1000] * 60, [990] * 60
    (parts,) = deal(tokens, [0] * 60, heads, ranks=1, budget=4000, packed=True)
    for places in parts:
        copied = 990 * (len(places) - 1)
        assert 990 + 10 * len(places) + COPY * copied <= 4001
    assert len(parts) < 10


def test_a_prompt_that_is_larger_than_a_micro_batch_is_shared_and_the_others_are_not() -> None:
    sequences = Sequences(
        tokens=np.array([50, 50, 50, 10, 10]),
        responses=np.array([40, 40, 40, 5, 5]),
        heads=np.array([10, 10, 10, 5, 5]),
        prompt=np.array([0, 0, 0, 1, 1]),
        of_pair=np.array([[0, 1], [1, 2], [3, 4]]),
    )
    order = order_pairs(3, seed=0, batch_size=3, epochs=1, max_steps=None)
    step = Plan(order, np.ones(3), sequences, 1, 60, True).step(0)
    assert [step.sequences[part.sequences].tolist() for part in step.whole[0]] == [[3, 4]]
    assert sorted(int(step.sequences[part.sequences][0]) for part in step.shared[0]) == [0, 1, 2]
    assert sorted(map(tuple, sequences.of_pair[step.pairs[step.shared_pairs]].tolist())) == [(0, 1), (1, 2)]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("prompts", [True, False])
def test_the_busiest_of_eight_ranks_has_at_most_a_tenth_more_tokens_than_the_mean(prompts: bool, packed: bool) -> None:
    made = graph(1, prompts=400, answers=6, longest=600)
    plan = plan_of(made, ranks=8, budget=8192, batch_size=128, prompts=prompts, packed=packed)
    busiest, total = 0, 0
    for step in map(plan.step, range(plan.steps)):
        load = [sum(laid_out(made, step, part, packed) for part in parts_of(step, rank)) for rank in range(8)]
        busiest, total = busiest + max(load), total + sum(load)
    assert busiest <= 1.1 * total / 8


def test_padded_rows_of_a_micro_batch_are_about_equally_long() -> None:
    made = graph(3, prompts=200, answers=6, longest=600)
    chosen = Graph(replace(made.sequences, of_pair=made.sequences.of_pair[:, :1]), made.gap)
    plan = plan_of(chosen, budget=4096, batch_size=256, packed=False)
    steps = [plan.step(s) for s in range(plan.steps)]
    rows = sum(laid_out(made, step, part, False) for step in steps for part in parts_of(step, 0))
    assert rows <= 1.15 * sum(int(made.sequences.tokens[step.sequences].sum()) for step in steps)


def test_ranks_with_one_micro_batch_each_run_no_empty_one_beside_it() -> None:
    made = graph(1, prompts=400, answers=6, longest=600)
    plan = plan_of(made, ranks=8, budget=8192, batch_size=64)
    steps = [plan.step(s) for s in range(plan.steps)]
    assert all(len(parts_of(step, rank)) == 1 for step in steps for rank in range(8))
    assert any(step.shared[0] for step in steps)


def test_pairs_of_one_prompt_in_one_step_need_a_fraction_of_the_tokens() -> None:
    made = graph(2, prompts=200, answers=6)
    tokens = {}
    for prompts in (True, False):
        plan = plan_of(made, batch_size=64, prompts=prompts)
        tokens[prompts] = sum(int(made.sequences.tokens[plan.step(s).sequences].sum()) for s in range(plan.steps))
    of_pairs = int(made.sequences.tokens[made.sequences.of_pair].sum())
    assert of_pairs / tokens[True] > 3.5
    assert 1.0 < of_pairs / tokens[False] < 1.2
