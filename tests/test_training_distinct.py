"""Each sequence of a step is computed once: the gradient is that of the pairs one by one, however the step is cut up.

In float64, so that what is not rounding shows. Ranks are threads of this process with a model each; DeepSpeed's own
ranks are in test_training_launch.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from spa_ray.config.plugs import METHODS
from spa_ray.config.training import method_class
from spa_ray.training import comm
from spa_ray.training.attention import use_packed_attention
from spa_ray.training.batches import order_pairs
from spa_ray.training.dataset import Selection, read_sequences
from spa_ray.training.deal import Sequences
from spa_ray.training.forward import ResponseLogps
from spa_ray.training.method import LossInputs, method_of
from spa_ray.training.prepare import Prepared
from spa_ray.training.step import StepLoop
from tests.examples import examples
from tests.training_support import make_job

CLOSE = 1e-9
VOCAB = 40


class Engine:
    """The calls that a step makes of DeepSpeed's engine, on a module in this process; its gradients stay."""

    def __init__(self, module: ResponseLogps) -> None:
        self.module = module
        self.optimizer = SimpleNamespace(param_groups=[{}])
        self.boundaries: list[bool] = []
        self.passes = 0

    def __call__(self, batch: Any) -> Any:
        self.passes += 1
        return self.module(batch)

    def set_gradient_accumulation_boundary(self, last: bool) -> None:
        self.boundaries.append(last)

    def backward(self, loss: Tensor, *, scale_wrt_gas: bool) -> None:
        assert not scale_wrt_gas
        loss.backward()

    def step(self) -> None:
        assert self.boundaries[-1]
        assert not any(self.boundaries[:-1])
        self.boundaries.clear()


class Data:
    """Token rows without a file: row i's prompt, chosen and rejected ids."""

    def __init__(self, rows: list[dict[str, np.ndarray]]) -> None:
        self._rows = rows

    def ids(self, name: str, row: int) -> np.ndarray:
        return self._rows[row][name]

    def context(self, side: str, row: int) -> int:
        return 0

    def pair_id(self, row: int) -> str:
        return f"p{row}"


@dataclass
class Work:
    """Pairs over random prompts, as training reads them, and reference log-probs."""

    prepared: Prepared
    reference: np.ndarray


def make_work(seed: int, *, prompts: int, answers: int, pairs: int, batch_size: int, sides: int = 2) -> Work:
    rng = np.random.default_rng(seed)
    heads = [rng.integers(3, VOCAB, rng.integers(1, 8)) for _ in range(prompts)]
    tails = [[rng.integers(3, VOCAB, rng.integers(1, 12)) for _ in range(answers)] for _ in range(prompts)]
    rows, keys = [], []
    for p in rng.integers(0, prompts, size=pairs):
        a, b = rng.choice(answers, size=2, replace=False)
        rows.append({"prompt_ids": heads[p], "chosen_ids": tails[p][a], "rejected_ids": tails[p][b]})
        keys.append([p * answers + a, p * answers + b][:sides])
    found, first, of_pair = np.unique(np.array(keys), return_index=True, return_inverse=True)
    source = np.array([2 * (i // sides) + i % sides for i in first])
    read = [(heads[k // answers], tails[k // answers][k % answers]) for k in found]
    sequences = Sequences(
        tokens=np.array([len(h) + len(t) for h, t in read]),
        responses=np.array([len(t) for _, t in read]),
        heads=np.array([len(h) for h, _ in read]),
        prompt=found // answers,
        of_pair=of_pair.reshape(pairs, sides),
    )
    gap = rng.integers(0, 9, size=pairs).astype(float)
    selection = Selection(np.arange(pairs), gap, sequences, source)
    order = order_pairs(
        pairs, seed=seed, batch_size=batch_size, epochs=1, max_steps=None, prompts=sequences.prompt_of_pair
    )
    return Work(Prepared(Data(rows), selection, order, {}, ""), -20 * rng.random(len(found)))  # type: ignore[arg-type]


def tiny_policy(*, packed: bool, dropout: float = 0.0) -> ResponseLogps:
    """Its layer norms compute in float64, which RMS norms of transformers do not."""
    from transformers import PhiConfig, PhiForCausalLM

    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model: Any = PhiForCausalLM(config).double()
    if dropout:
        model.model.layers[0].mlp = nn.Sequential(nn.Dropout(dropout), model.model.layers[0].mlp)
    if packed:
        use_packed_attention(model)
    return ResponseLogps(model, packed=packed).train()


@dataclass
class Ranks:
    """Threads that stand for ranks: `comm`'s calls meet at a barrier."""

    size: int
    local: Any = field(default_factory=threading.local)

    def __post_init__(self) -> None:
        self.slots: list[Tensor | None] = [None] * self.size
        self.barrier = threading.Barrier(self.size, timeout=60)

    def all_sum(self, values: Tensor) -> Tensor:
        self.slots[self.local.rank] = values
        self.barrier.wait()
        total = torch.stack([slot for slot in self.slots if slot is not None]).sum(dim=0)
        self.barrier.wait()
        return total

    def run(self, work: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        answers: list[Any] = [None] * self.size

        def rank(number: int) -> None:
            self.local.rank = number
            try:
                answers[number] = work()
            except BaseException as e:
                self.barrier.abort()
                answers[number] = e
                raise

        monkeypatch.setattr(comm, "rank", lambda: self.local.rank)
        monkeypatch.setattr(comm, "world_size", lambda: self.size)
        monkeypatch.setattr(comm, "all_sum", self.all_sum)
        monkeypatch.setattr(comm, "gather_lists", lambda mine: mine)
        monkeypatch.setattr(comm, "device", lambda: torch.device("cpu"))
        threads = [threading.Thread(target=rank, args=(number,)) for number in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        return answers


@dataclass
class Steps:
    """Every step's gradients (the mean over the ranks, as DeepSpeed takes it) and log row; forward passes of rank 0."""

    gradients: list[dict[str, Tensor]]
    rows: list[dict[str, float]]
    passes: int


def train(work: Work, method: str, *, ranks: int, budget: int, packed: bool, monkeypatch: pytest.MonkeyPatch) -> Steps:
    none = Path("none")
    job = make_job(none, none, none, method=method, micro_batch_tokens=budget, zero_stage=0, grad_clip=None, w_max=2.0)
    reference = work.reference if method_of(job.train).needs_reference else None

    policies = [tiny_policy(packed=packed) for _ in range(ranks)]  # here: the seed is the process's

    def of_rank() -> tuple[list[dict[str, Tensor]], list[dict[str, float]], int]:
        engine = Engine(policies[comm.rank()])
        loop = StepLoop(job, engine, work.prepared, reference)
        gradients, rows = [], []
        for number in range(loop.plan.steps):
            rows.append(loop.train_step(number))
            gradients.append({n: p.grad.clone() for n, p in engine.module.named_parameters() if p.grad is not None})
            engine.module.zero_grad()
        return gradients, rows, engine.passes

    answers = Ranks(ranks).run(of_rank, monkeypatch)
    means = [
        {name: torch.stack([one[step][name] for one, *_ in answers]).mean(dim=0) for name in answers[0][0][step]}
        for step in range(len(answers[0][0]))
    ]
    return Steps(means, answers[0][1], answers[0][2])


def pair_by_pair(work: Work, method: str, *, packed: bool) -> Steps:
    """The same steps written out: both sequences of every pair by themselves, the mean over the step's pairs."""
    none = Path("none")
    job = make_job(none, none, none, method=method, zero_stage=0, grad_clip=None, w_max=2.0)
    prepared, sequences = work.prepared, work.prepared.selection.sequences
    plan = prepared.plan(job, packed=False)
    policy = tiny_policy(packed=False)
    gradients, rows = [], []
    for number in range(plan.steps):
        step = plan.step(number)
        losses = []
        for pair, weight in zip(step.pairs, step.weights, strict=True):
            of_pair = sequences.of_pair[pair]
            rows_of_pair = read_sequences(prepared.data, prepared.selection, of_pair)
            summed = torch.stack([policy(policy.collate([row], "cpu"))[0][0] for row in rows_of_pair])
            inputs = LossInputs(
                summed,
                counts=torch.from_numpy(sequences.responses[of_pair]),
                sides=torch.arange(len(of_pair))[None],
                weights=torch.tensor([weight]),
                reference=torch.from_numpy(work.reference[of_pair]) if method_of(job.train).needs_reference else None,
            )
            losses.append(method_of(job.train).loss(inputs)[0][0])
        loss = torch.stack(losses).mean()
        loss.backward()
        gradients.append({n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None})
        rows.append({"loss": loss.item()})
        policy.zero_grad()
    return Steps(gradients, rows, 0)


def assert_equal(a: Steps, b: Steps) -> None:
    for ours, truth in zip(a.gradients, b.gradients, strict=True):
        assert ours.keys() == truth.keys()
        assert max(float(g.abs().max()) for g in truth.values()) > 1e-4
        for name in truth:
            torch.testing.assert_close(ours[name], truth[name], rtol=0, atol=CLOSE)
    assert [row["loss"] for row in a.rows] == pytest.approx([row["loss"] for row in b.rows], abs=CLOSE)


@pytest.fixture(scope="module", autouse=True)
def _one_process() -> Iterator[None]:
    """Prepared.plan and a step's seed ask for ranks; models of this size are no faster on two threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comm, "world_size", lambda: 1)
        patch.setattr(comm, "rank", lambda: 0)
        yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("budget", [10_000, 45], ids=["one-pass", "two-passes"])
@pytest.mark.parametrize("method", [name for name in METHODS if not method_class(name).leaves_more_than_a_model()])
def test_gradients_are_those_of_the_pairs_one_by_one(
    method: str, budget: int, ranks: int, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = 1 if method == "sft" else 2
    work = make_work(3, prompts=3, answers=5, pairs=26, batch_size=16, sides=sides)
    truth = pair_by_pair(work, method, packed=packed)
    assert_equal(train(work, method, ranks=ranks, budget=budget, packed=packed, monkeypatch=monkeypatch), truth)


@settings(max_examples=examples(100), deadline=None)
@given(
    seed=st.integers(0, 999),
    prompts=st.integers(1, 4),
    answers=st.integers(2, 6),
    pairs=st.integers(1, 24),
    ranks=st.integers(1, 3),
    budget=st.integers(1, 200),
)
def test_over_random_graphs_of_pairs(
    seed: int, prompts: int, answers: int, pairs: int, ranks: int, budget: int
) -> None:
    work = make_work(seed, prompts=prompts, answers=answers, pairs=pairs, batch_size=12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comm, "world_size", lambda: 1)
        truth = pair_by_pair(work, "spa_simpo", packed=True)
        assert_equal(train(work, "spa_simpo", ranks=ranks, budget=budget, packed=True, monkeypatch=patch), truth)


@pytest.mark.parametrize("seed", [20261125, -(2**63), 2**63 - 1])
def test_any_seed_of_the_config_seeds_a_step(seed: int) -> None:
    loop = object.__new__(StepLoop)
    loop.job = make_job(Path("none"), Path("none"), Path("none"), seed=seed)
    loop._seed(123_456, 78)
    first = torch.rand(1)
    loop._seed(123_456, 79)
    assert torch.rand(1) != first


def test_a_sequence_in_many_pairs_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    work = make_work(3, prompts=3, answers=5, pairs=26, batch_size=26)
    steps = train(work, "spa", ranks=1, budget=10_000, packed=True, monkeypatch=monkeypatch)
    assert steps.passes == 1
    (row,) = steps.rows
    assert row["sequences"] == len(work.prepared.selection.source) < 2 * 26
    assert row["prompts"] == len(np.unique(work.prepared.selection.sequences.prompt))
    assert 1 <= row["weights/ess_prompts"] <= row["prompts"]


def test_a_second_pass_drops_what_the_first_one_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against one graph over all micro-batches, each with the seed that the step gives it."""
    work = make_work(5, prompts=1, answers=6, pairs=14, batch_size=14)
    none = Path("none")
    job = make_job(none, none, none, method="spa_simpo", micro_batch_tokens=16, zero_stage=0, grad_clip=None)
    monkeypatch.setattr(comm, "rank", lambda: 0)
    monkeypatch.setattr(comm, "all_sum", lambda values: values)
    monkeypatch.setattr(comm, "device", lambda: torch.device("cpu"))
    engine = Engine(tiny_policy(packed=True, dropout=0.5))
    loop = StepLoop(job, engine, work.prepared, None)
    loop.train_step(0)
    step = loop.plan.step(0)
    parts = step.shared[0]
    assert len(parts) > 2
    policy = tiny_policy(packed=True, dropout=0.5)
    summed = torch.zeros(len(step.sequences), dtype=torch.float64)
    for k, part in enumerate(parts):
        loop._seed(0, k)
        rows = read_sequences(work.prepared.data, work.prepared.selection, step.sequences[part.sequences])
        summed = summed.index_put((torch.from_numpy(part.sequences),), policy(policy.collate(rows, "cpu"))[0])
    inputs = LossInputs(
        summed,
        counts=torch.from_numpy(work.prepared.selection.sequences.responses[step.sequences]),
        sides=torch.from_numpy(step.sides),
        weights=torch.ones(len(step.pairs)),
    )
    method_of(job.train).loss(inputs)[0].mean().backward()
    for (name, ours), truth in zip(engine.module.named_parameters(), policy.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, truth.grad, rtol=0, atol=CLOSE, msg=name)
