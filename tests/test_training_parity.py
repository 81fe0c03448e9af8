"""Our losses and our training against TRL's, on TRL's own code: nothing of it is written out again here.

Where only a loss is wanted, TRL's trainer is made without its constructor and given log-probs or logits that we know;
the training curve at the end is a whole run of each.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spa_ray.training.dataset import TokenizedPairs
from spa_ray.training.job import TrainJob
from spa_ray.training.losses import dpo_loss, ipo_loss, orpo_loss, sequence_logps, simpo_loss
from tests.training_support import make_job, pair_rows, write_pairs

CLOSE = 1e-6
VOCAB = 17
SEEDS = st.integers(0, 2**32 - 1)
ACCELERATOR = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)


@pytest.fixture(scope="module")
def trl() -> SimpleNamespace:
    """TRL's trainers; the import takes seconds."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    dpo = pytest.importorskip("trl").DPOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    return SimpleNamespace(dpo=dpo, orpo=ORPOTrainer, cpo=CPOTrainer, cpo_config=CPOConfig)


def trainer_without_a_run(kind: type, **attributes: Any) -> Any:
    """One of TRL's trainers that was never constructed: its methods, and the attributes that they read."""
    trainer = object.__new__(kind)
    vars(trainer).update(accelerator=ACCELERATOR, aux_loss_enabled=False, is_encoder_decoder=False, **attributes)
    return trainer


def assert_equal(ours: Tensor, theirs: Tensor, our_leaf: Tensor, their_leaf: Tensor, *, rtol: float = 0) -> None:
    """Two losses and their gradients."""
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=CLOSE, check_dtype=False)
    ours.backward()
    theirs.backward()
    assert our_leaf.grad is not None
    assert our_leaf.grad.abs().max() > 0
    torch.testing.assert_close(our_leaf.grad, their_leaf.grad, rtol=0, atol=CLOSE)


def two_leaves(values: Tensor) -> tuple[Tensor, Tensor]:
    return values.clone().requires_grad_(), values.clone().requires_grad_()


# --- from log-probs a sequence ------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(-40, 0), st.floats(-40, 0)), min_size=1, max_size=6),
    st.floats(0.1, 10),
    st.floats(-2, 3),
)
def test_simpo_a_pair_is_trls(trl: SimpleNamespace, rows: list[tuple[float, float]], beta: float, gamma: float) -> None:
    trainer = trainer_without_a_run(
        trl.cpo, loss_type="simpo", beta=beta, simpo_gamma=gamma, alpha=0.0, label_smoothing=0.0
    )
    ours, theirs = two_leaves(torch.tensor(rows, dtype=torch.float64))
    simpo = simpo_loss(*ours.unbind(dim=1), beta=beta, gamma=gamma)
    trls, *_ = trainer.cpo_loss(*theirs.unbind(dim=1))
    torch.testing.assert_close(simpo, trls, rtol=0, atol=CLOSE)
    assert_equal(simpo.sum(), trls.sum(), ours, theirs)


# --- from logits, prompts and padding included --------------------------------------------------------------------


def preference_batch(seed: int, *, pairs: int, prompt: int | None, answers: int | None) -> dict[str, Tensor]:
    """TRL's collated batch of random ids: right-padded, prompts labelled -100. None: of random lengths."""
    rng = np.random.default_rng(seed)
    prompts = [prompt or int(rng.integers(1, 5)) for _ in range(pairs)]
    batch = {}
    for side in ("chosen", "rejected"):
        lengths = [answers or int(rng.integers(1, 7)) for _ in range(pairs)]
        width = max(p + n for p, n in zip(prompts, lengths, strict=True))
        ids = torch.from_numpy(rng.integers(1, VOCAB, size=(pairs, width)))
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for i, (p, n) in enumerate(zip(prompts, lengths, strict=True)):
            mask[i, : p + n] = 1
            labels[i, p : p + n] = ids[i, p : p + n]
        batch |= {f"{side}_input_ids": ids * mask, f"{side}_attention_mask": mask, f"{side}_labels": labels}
    return batch


def joined_labels(batch: dict[str, Tensor]) -> Tensor:
    """Chosen rows, then rejected ones, at one width."""
    sides = [batch["chosen_labels"], batch["rejected_labels"]]
    width = max(x.shape[1] for x in sides)
    return torch.cat([torch.nn.functional.pad(x, (0, width - x.shape[1]), value=-100) for x in sides])


def random_logits(seed: int, labels: Tensor) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return two_leaves(3 * torch.randn(*labels.shape, VOCAB, generator=generator, dtype=torch.float64))


def answers_with(logits: Tensor) -> Any:
    """A model whose output is known beforehand."""
    return lambda *_, **__: SimpleNamespace(logits=logits)


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(1, 5), st.floats(0.1, 5), st.floats(0, 2))
def test_simpo_from_logits_is_trls(trl: SimpleNamespace, seed: int, pairs: int, beta: float, gamma: float) -> None:
    trainer = trainer_without_a_run(
        trl.cpo, loss_type="simpo", beta=beta, simpo_gamma=gamma, cpo_alpha=0, alpha=0.0, label_smoothing=0.0,
        pad_token_id=0,
    )  # fmt: skip
    batch = preference_batch(seed, pairs=pairs, prompt=None, answers=None)
    labels = joined_labels(batch)
    ours, theirs = random_logits(seed, labels)
    logps, _ = sequence_logps(ours, labels, average=True)
    loss = simpo_loss(*logps.chunk(2), beta=beta, gamma=gamma).mean()
    trls, metrics = trainer.get_batch_loss_metrics(answers_with(theirs), batch)
    assert_equal(loss, trls, ours, theirs)
    assert logps.chunk(2)[0].mean().item() == pytest.approx(metrics["logps/chosen"], abs=CLOSE)


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(1, 5), st.integers(1, 6), st.floats(0.05, 2))
def test_orpo_from_logits_is_trls(trl: SimpleNamespace, seed: int, pairs: int, answers: int, beta: float) -> None:
    """Where its NLL is the paper's: a one-token prompt has nothing to predict, and at equal lengths the mean over a
    batch's tokens is the mean over its pairs."""
    trainer = trainer_without_a_run(trl.orpo, beta=beta, padding_value=0)
    batch = preference_batch(seed, pairs=pairs, prompt=1, answers=answers)
    labels = joined_labels(batch)
    ours, theirs = random_logits(seed, labels)
    logps, _ = sequence_logps(ours, labels, average=True)
    loss = orpo_loss(*logps.chunk(2), beta=beta).mean()
    trls, metrics = trainer.get_batch_loss_metrics(answers_with(theirs), batch)
    assert_equal(loss, trls, ours, theirs, rtol=CLOSE)  # its odds are in float32: at a loss of 26 that is 1e-6
    assert (loss.detach() - metrics["nll_loss"]).item() == pytest.approx(
        -beta * metrics["log_odds_ratio"], rel=CLOSE, abs=2 * CLOSE
    )


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(1, 5), st.floats(0.01, 2), st.sampled_from(["sigmoid", "ipo"]))
def test_dpo_and_ipo_from_token_log_probs_are_trls(
    trl: SimpleNamespace, seed: int, pairs: int, beta: float, kind: str
) -> None:
    trainer = trainer_without_a_run(
        trl.dpo, beta=beta, loss_types=[kind], loss_weights=[1.0], f_divergence_type="reverse_kl", ld_alpha=None,
        precompute_ref_logps=True, use_weighting=False, model=SimpleNamespace(training=True), _tp_size=1,
        _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0,
    )  # fmt: skip
    batch = preference_batch(seed, pairs=pairs, prompt=None, answers=None)
    completion = (joined_labels(batch) != -100).to(torch.int64)
    scored, counts = completion[:, 1:], completion.sum(dim=1)
    generator = torch.Generator().manual_seed(seed)
    token_logps = -8 * torch.rand(scored.shape, generator=generator, dtype=torch.float64) * scored
    reference = -8 * torch.rand(2, pairs, generator=generator, dtype=torch.float64) * counts.view(2, pairs)
    ours, theirs = two_leaves(token_logps)

    summed = ours.sum(dim=1)
    if kind == "sigmoid":
        loss = dpo_loss(*summed.chunk(2), *reference, beta=beta).mean()
    else:
        loss = ipo_loss(*(summed / counts).chunk(2), *(reference / counts.view(2, pairs)), beta=beta).mean()
    logged = {name: torch.zeros_like(theirs) for name in ("entropy", "mean_logits")}
    output = SimpleNamespace(log_probs=theirs, is_top1=torch.zeros_like(scored, dtype=torch.bool), **logged)
    inputs = {
        "input_ids": torch.ones_like(completion),
        "attention_mask": torch.ones_like(completion),
        "completion_mask": completion,
        "ref_chosen_logps": reference[0],
        "ref_rejected_logps": reference[1],
    }
    trls = trainer._compute_loss(lambda **_: output, inputs, return_outputs=False)
    assert_equal(loss, trls, ours, theirs)


# --- a whole run --------------------------------------------------------------------------------------------------

STEPS, BATCH = 50, 8


def readable_pairs(n: int) -> list[dict[str, Any]]:
    """Pairs whose ids are what the tokenizer makes of their texts, end token included, so that TRL finds the same."""
    from tests.tiny_model import build_tiny_tokenizer

    tokenizer, rng = build_tiny_tokenizer(), np.random.default_rng(7)
    rows = pair_rows(n, seed=7)
    for row in rows:
        for side in ("chosen", "rejected"):
            text = "".join(rng.choice(list("abcdefgh ,."), size=int(rng.integers(1, 40))))
            row[side] = [{"role": "assistant", "content": text}]
            row[f"{side}_ids"] = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    return rows


def trl_run(trl: SimpleNamespace, job: TrainJob, order: list[str], folder: Path) -> tuple[list[float], Any]:
    """TRL's loss at every step over the pairs of our table in this order, and its tokenised rows."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from spa_ray.training.schedule import lr_multiplier

    train = job.train
    by_id = {row["pair_id"]: row for row in pq.read_table(job.pairs).to_pylist()}
    rows = [{"pair_id": i, **{k: by_id[i][k] for k in ("prompt", "chosen", "rejected")}} for i in order]
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=train.lr, weight_decay=train.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_multiplier(min(step, STEPS - 1), STEPS, kind=train.scheduler, warmup=train.warmup)
    )
    settings = trl.cpo_config(
        output_dir=str(folder), loss_type="simpo", cpo_alpha=0.0, beta=train.beta, simpo_gamma=train.gamma,
        max_length=train.max_length, per_device_train_batch_size=BATCH, num_train_epochs=1,
        max_grad_norm=train.grad_clip, train_sampling_strategy="sequential", gradient_checkpointing=False, bf16=False,
        use_cpu=True, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
        remove_unused_columns=False,
    )  # fmt: skip
    losses: list[float] = []

    class Recording(trl.cpo):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Tensor:
            loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.item())
            return loss

    trainer = Recording(
        model=model,
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(job.model),
        optimizers=(optimizer, schedule),
    )
    trainer.train()
    return losses, trainer.train_dataset


@pytest.fixture(scope="module")
def readable_table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.parquet", readable_pairs(12 * BATCH))


def our_run(job: TrainJob) -> list[dict[str, float]]:
    from spa_ray.training.loop import LOG, run_job

    run_job(job)
    return [json.loads(line) for line in (job.work / LOG).read_text().splitlines()]


def pairs_in_order(job: TrainJob) -> tuple[TokenizedPairs, list[int]]:
    """The token file of a job that ran, and its rows in the order of the steps."""
    from spa_ray.training.prepare import prepare

    prepared = prepare(job)
    order = prepared.plan(job, packed=True).order
    assert (np.bincount(order.step) == BATCH).all()
    return prepared.data, prepared.selection.rows[order.pairs].tolist()


@pytest.mark.engine
@pytest.mark.long
@pytest.mark.parametrize("order", ["pairs", "prompts"])
def test_fifty_steps_of_simpo_follow_trls_loss_curve(
    order: str, trl: SimpleNamespace, one_process: None, readable_table: Path, tmp_path: Path, tiny_model: Path
) -> None:
    """Every step's gradient is clipped here, on both sides."""
    steps = {"batch_size": BATCH, "max_steps": STEPS, "order": order}
    job = make_job(tmp_path, tiny_model, readable_table, method="spa_simpo", lr=1e-3, **steps)
    log = our_run(job)
    data, rows = pairs_in_order(job)
    theirs, tokenized = trl_run(trl, job, [data.pair_id(row) for row in rows], tmp_path / "trl")
    for row, seen in zip(rows, tokenized, strict=True):
        prompt = data.ids("prompt_ids", row).tolist()
        for side in ("chosen", "rejected"):
            answer = data.ids(f"{side}_ids", row).tolist()
            assert seen[f"{side}_input_ids"] == prompt + answer
            assert seen[f"{side}_labels"] == [-100] * len(prompt) + answer

    ours = [row["loss"] for row in log]
    assert len(ours) == len(theirs) == STEPS
    assert ours[-1] < ours[0] / 2  # a curve that goes nowhere would agree too
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.engine
def test_an_ipo_run_starts_at_a_margin_of_zero_over_its_reference(
    one_process: None, readable_table: Path, tmp_path: Path, tiny_model: Path
) -> None:
    one_batch = {"max_pairs": BATCH, "batch_size": BATCH, "max_steps": 8}
    job = make_job(tmp_path, tiny_model, readable_table, method="ipo", beta=0.25, lr=1e-3, **one_batch)
    losses = [row["loss"] for row in our_run(job)]
    assert losses[0] == pytest.approx((1 / (2 * 0.25)) ** 2, abs=1e-4)
    assert losses[-1] < losses[0] / 2


@pytest.mark.engine
def test_an_orpo_runs_loss_is_the_sum_of_the_terms_that_it_logs(
    one_process: None, readable_table: Path, tmp_path: Path, tiny_model: Path
) -> None:
    job = make_job(
        tmp_path, tiny_model, readable_table, method="orpo", beta=0.5, lr=1e-3, batch_size=BATCH, max_steps=8
    )
    log = our_run(job)
    for row in log:
        assert row["loss"] == pytest.approx(row["nll_loss"] - 0.5 * row["log_odds_ratio"], rel=1e-5)
        assert row["nll_loss"] == pytest.approx(-row["logps/chosen"], rel=1e-6)
    assert log[-1]["nll_loss"] < log[0]["nll_loss"]
