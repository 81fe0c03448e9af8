"""The step loop with real DeepSpeed, on one process: exact steps, exact resumes, complete model folders."""

from __future__ import annotations

import gc
import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spa_ray.config.training import Train
from spa_ray.errors import InputError, RunError
from spa_ray.training import checkpoint, hashes, loop, policy
from spa_ray.training.deal import Plan
from spa_ray.training.job import TrainJob
from spa_ray.training.loop import run_job
from spa_ray.training.losses import simpo_loss
from spa_ray.training.prepare import Prepared
from tests.training_support import make_job, pair_rows, write_pairs

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("one_process")]

PAIRS = 20  # in steps of 8: 8, 8 and a short one of 4


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.parquet", pair_rows(PAIRS))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def reference_run(shared: Path, tiny_model: Path, pairs: Path) -> TrainJob:
    job = make_job(shared, tiny_model, pairs, name="reference")
    run_job(job)
    return job


def weights_of(model: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(model / "model.safetensors")


def assert_same_weights(a: Path, b: Path, atol: float = 1e-5) -> None:
    left, right = weights_of(a), weights_of(b)
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def log_of(job: TrainJob) -> list[dict[str, float]]:
    return [json.loads(line) for line in (job.work / loop.LOG).read_text().splitlines()]


def plain_adamw_run(job: TrainJob) -> dict[str, Tensor]:
    """The same training written out: one sequence at a time, mean over the step, torch's own AdamW and clipping."""
    from transformers import AutoModelForCausalLM

    from spa_ray.training.prepare import prepare
    from spa_ray.training.schedule import lr_multiplier

    prepared, train = prepare(job), job.train
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=train.lr, betas=train.adam_betas, weight_decay=0.0)

    def average_logp(prompt: Any, response: Any) -> Tensor:
        ids = torch.tensor([[*prompt.tolist(), *response.tolist()]])
        logp = torch.log_softmax(model(ids).logits.float(), dim=-1)[0]
        at = range(len(prompt) - 1, len(prompt) + len(response) - 1)
        return torch.stack([logp[t, ids[0, t + 1]] for t in at]).mean()

    plan, data = prepared.plan(job, packed=False), prepared.data
    for number in range(plan.steps):
        step = plan.step(number)
        total = torch.zeros(())
        for pair, weight in zip(step.pairs, step.weights, strict=True):
            row = int(prepared.selection.rows[pair])
            prompt = data.ids("prompt_ids", row)
            chosen, rejected = (average_logp(prompt, data.ids(side, row)) for side in ("chosen_ids", "rejected_ids"))
            total = total + weight * -torch.nn.functional.logsigmoid(train.beta * (chosen - rejected) - train.gamma)
        (total / len(step.pairs)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = train.lr * lr_multiplier(number, plan.steps, kind=train.scheduler, warmup=train.warmup)
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def test_three_weighted_steps_are_those_of_plain_torch(reference_run: TrainJob, tiny_model: Path) -> None:
    plain, trained, before = plain_adamw_run(reference_run), weights_of(reference_run.out), weights_of(tiny_model)
    moved = max((trained[k] - before[k]).abs().max().item() for k in trained)
    assert moved > 2e-4
    for name, value in trained.items():
        torch.testing.assert_close(value, plain[name], rtol=0, atol=1e-5)


def test_adams_decays_are_the_jobs(shared: Path, reference_run: TrainJob, tiny_model: Path, pairs: Path) -> None:
    job = make_job(shared, tiny_model, pairs, name="betas", adam_betas=(0.5, 0.6))
    run_job(job)
    plain, usual = plain_adamw_run(job), weights_of(reference_run.out)
    for name, value in weights_of(job.out).items():
        torch.testing.assert_close(value, plain[name], rtol=0, atol=1e-5)
    assert max(float((plain[name] - value).abs().max()) for name, value in usual.items()) > 1e-4


@pytest.mark.parametrize("tokens", [1, 200, 100_000])
def test_the_micro_batch_size_changes_nothing(
    shared: Path, reference_run: TrainJob, tiny_model: Path, pairs: Path, tokens: int
) -> None:
    job = make_job(shared, tiny_model, pairs, name=f"tokens{tokens}", micro_batch_tokens=tokens)
    run_job(job)
    assert_same_weights(job.out, reference_run.out)


@pytest.mark.parametrize(
    "settings",
    [
        {"zero_stage": 0},
        {"zero_stage": 1},
        {"zero_stage": 3},
        {"offload": True},
        {"gradient_checkpointing": True},
        {"packing": False},
        {"logits_mib": 0.01},
        {"logits_mib": None},
        {"logits_mib": 0.01, "zero_stage": 3, "gradient_checkpointing": True},
    ],
    ids=str,
)
def test_how_memory_is_saved_changes_nothing(
    shared: Path, reference_run: TrainJob, tiny_model: Path, pairs: Path, settings: dict[str, Any]
) -> None:
    job = make_job(shared, tiny_model, pairs, name=f"saving{settings}".replace("/", ""), **settings)
    run_job(job)
    assert_same_weights(job.out, reference_run.out)


def test_alpha_zero_is_simpo_and_weights_matter_otherwise(
    shared: Path, reference_run: TrainJob, tiny_model: Path, pairs: Path
) -> None:
    simpo = make_job(shared, tiny_model, pairs, name="simpo", method="spa_simpo")
    alpha0 = make_job(shared, tiny_model, pairs, name="alpha0", alpha=0.0)
    for job in (simpo, alpha0):
        run_job(job)
    assert_same_weights(simpo.out, alpha0.out, atol=0)
    with pytest.raises(AssertionError):
        assert_same_weights(simpo.out, reference_run.out)


def test_the_log_has_the_fields_names_and_a_row_a_step(reference_run: TrainJob) -> None:
    rows = log_of(reference_run)
    assert [r["step"] for r in rows] == [1, 2, 3]
    assert rows[-1]["epoch"] == 1.0
    names = (
        "loss rewards/chosen rewards/rejected rewards/margins rewards/accuracies logps/chosen logps/rejected grad_norm "
        "learning_rate weights/mean weights/max weights/ess weights/ess_prompts prompts sequences tokens/s "
        "pairs/s memory/peak_gib"
    )
    assert set(names.split()) <= rows[0].keys()
    assert all(math.isfinite(v) for row in rows for v in row.values())
    assert rows[0]["weights/mean"] == pytest.approx(1.0)
    margin = rows[0]["rewards/chosen"] - rows[0]["rewards/rejected"]
    assert rows[0]["rewards/margins"] == pytest.approx(margin, rel=1e-5)


def test_dpo_starts_at_log_two_with_a_margin_of_zero(shared: Path, tiny_model: Path, pairs: Path) -> None:
    job = make_job(shared, tiny_model, pairs, name="dpo", method="spa_dpo")
    run_job(job)
    first = log_of(job)[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    assert log_of(job)[-1]["loss"] < 0.69
    assert len(list(job.work.glob("reference_*.npz"))) == 1


def test_reference_log_probs_are_shared_by_jobs_of_the_same_model_and_data_and_by_no_others(
    tmp_path: Path, tiny_model: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def job(name: str, **settings: Any) -> TrainJob:
        return replace(make_job(tmp_path, tiny_model, pairs, name=name, method="spa_dpo", **settings), cache=tmp_path)

    run_job(job("first"))
    with monkeypatch.context() as m:
        m.setattr(loop, "compute_reference", lambda *args, **kwargs: pytest.fail("computed again"))
        run_job(job("other-rate", lr=1e-3, batch_size=4, zero_stage=3))
        run_job(job("other-labels", shuffle_labels=True))  # the same sequences
    run_job(job("other-weights", lora={"r": 2, "quantize": "nf4"}))
    for name in ("other-labels", "other-weights"):
        assert log_of(job(name))[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert len(list(tmp_path.glob("reference_*.npz"))) == 2


def test_sft_raises_the_chosen_answers_probability(shared: Path, tiny_model: Path, pairs: Path) -> None:
    job = make_job(shared, tiny_model, pairs, name="sft", method="sft", epochs=4, lr=1e-3, micro_batch_tokens=64)
    result = run_job(job)
    rows = log_of(job)
    assert rows[0]["loss"] == pytest.approx(-rows[0]["logps/chosen"])
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3
    assert result.pairs == PAIRS
    assert "rewards/chosen" not in rows[0]


@pytest.mark.parametrize(("zero_stage", "quantize"), [(2, None), (3, None), (2, "nf4"), (0, "nf4")])
def test_a_lora_runs_merged_weights_are_its_adapter(
    shared: Path, tiny_model: Path, pairs: Path, zero_stage: int, quantize: str | None
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    lora = {"r": 4, "alpha": 8.0, "quantize": quantize}
    name = f"lora{zero_stage}{quantize}"
    job = make_job(shared, tiny_model, pairs, name=name, lora=lora, zero_stage=zero_stage, lr=1e-2)
    run_job(job)
    ids = torch.tensor([[1, 4, 30, 31, 32, 33]])
    merged = AutoModelForCausalLM.from_pretrained(job.out)(ids).logits
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    untrained = base(ids).logits
    adapted = PeftModel.from_pretrained(base, str(job.out / "adapter"))(ids).logits
    torch.testing.assert_close(merged, adapted, rtol=0, atol=1e-4)
    assert (merged - untrained).abs().max() > 1e-2


def test_the_model_folder_is_complete_and_keeps_the_tokenizer(reference_run: TrainJob, tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(reference_run.out)
    tokenizer = AutoTokenizer.from_pretrained(reference_run.out)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    assert model.generate(**ids, max_new_tokens=4, do_sample=False).shape[1] > ids["input_ids"].shape[1]
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (reference_run.out / name).read_bytes() == (tiny_model / name).read_bytes()
    assert not list(reference_run.out.parent.glob(".*"))


class WorkerDeathError(Exception):
    """Stands for the death of a worker in the middle of a run."""


def run_until(job: TrainJob, step: int) -> None:
    def die(row: dict[str, Any]) -> None:
        if row["step"] == step:
            raise WorkerDeathError

    with pytest.raises(WorkerDeathError):
        run_job(job, die)


@pytest.mark.parametrize(
    "settings",
    [
        {"zero_stage": 2},
        {"zero_stage": 3},
        {"method": "spa_dpo", "zero_stage": 0},
        {"lora": {"r": 4, "alpha": 8.0, "dropout": 0.2}},
    ],
    ids=str,
)
def test_a_resumed_run_ends_at_the_undisturbed_weights(
    tmp_path: Path, tiny_model: Path, pairs: Path, settings: dict[str, Any]
) -> None:
    settings = {"batch_size": 4, "save_every_steps": 1, "keep_checkpoints": 2, **settings}
    undisturbed = make_job(tmp_path, tiny_model, pairs, name="undisturbed", **settings)
    killed = make_job(tmp_path, tiny_model, pairs, name="killed", **settings)
    run_job(undisturbed)
    run_until(killed, step=4)
    assert not killed.out.exists()
    assert [p.name for p in sorted((killed.work / "checkpoints").iterdir())] == ["step_00000002", "step_00000003"]
    result = run_job(killed)
    assert result.resumed_at == 3
    assert [r["step"] for r in log_of(killed)] == [1, 2, 3, 4, 5]
    assert_same_weights(killed.out, undisturbed.out, atol=1e-6)


def test_a_checkpoint_of_another_run_is_refused(
    tmp_path: Path, tiny_model: Path, other_tiny_model: Path, pairs: Path
) -> None:
    job = make_job(tmp_path, tiny_model, pairs, save_every_steps=1)
    run_until(job, step=2)
    for other in (
        replace(job, train=job.train.model_copy(update={"lr": 3e-4})),
        replace(job, model=other_tiny_model),
        replace(job, seed=1),
    ):
        with pytest.raises(InputError, match="of another model, data or config"):
            run_job(other)
    path, meta = checkpoint.newest(job.work / "checkpoints") or pytest.fail("no checkpoint")
    (path / "meta.json").write_text(json.dumps({**vars(meta), "workers": 2}))
    with pytest.raises(InputError, match=r"written by 2 workers, this run has 1"):
        run_job(job)
    (path / "meta.json").write_text("{")
    with pytest.raises(RunError, match="cannot be read"):
        run_job(job)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_death_just_before_or_after_the_model_appears_loses_nothing(
    tmp_path: Path, reference_run: TrainJob, tiny_model: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    export = loop.export_model

    def die(*given: Any) -> None:
        if when == "after":
            export(*given)
        raise KeyboardInterrupt

    job = make_job(tmp_path, tiny_model, pairs, save_every_steps=2)
    with monkeypatch.context() as m:
        m.setattr(loop, "export_model", die)
        with pytest.raises(KeyboardInterrupt):
            run_job(job)
    result = run_job(job)
    assert (result.skipped, result.resumed_at) == ((True, 0) if when == "after" else (False, 2))
    assert_same_weights(job.out, reference_run.out)


def test_a_half_written_checkpoint_is_never_taken(tmp_path: Path, tiny_model: Path, pairs: Path) -> None:
    job = make_job(tmp_path, tiny_model, pairs, save_every_steps=1)
    run_until(job, step=2)
    (job.work / "checkpoints" / "step_00000009").mkdir()
    found = checkpoint.newest(job.work / "checkpoints")
    assert found is not None
    assert found[0].name == "step_00000001"


def test_a_checkpoint_that_was_changed_or_is_nobodys_ends_the_run_and_is_never_read(
    tmp_path: Path, reference_run: TrainJob, tiny_model: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(tmp_path, tiny_model, pairs, save_every_steps=1)
    run_until(job, step=3)
    newest = job.work / "checkpoints" / "step_00000002"
    record = hashes.record_of(newest)
    text = record.read_text()
    shard = next(newest.glob("state/*optim_states.pt"))
    held = shard.read_bytes()
    with monkeypatch.context() as m:
        m.setattr(torch, "load", lambda *a, **k: pytest.fail("was read"))
        shard.write_bytes(held[:-1] + bytes([held[-1] ^ 1]))
        with pytest.raises(RunError, match=r"not as the job wrote it \(state/\S*optim_states.pt has changed\); delete"):
            run_job(job)
        shard.write_bytes(held)
        record.unlink()
        with pytest.raises(
            RunError, match=r"not known whether this job wrote it .*; delete \S*step_00000002 to resume"
        ):
            run_job(job)
    assert not job.out.exists()
    record.write_text(text)
    assert run_job(job).resumed_at == 2
    assert_same_weights(job.out, reference_run.out)


@pytest.mark.parametrize("when", ["before it is hashed", "before it has its name"])
def test_a_checkpoint_whose_writing_was_killed_does_not_count_and_the_one_before_does(
    tmp_path: Path, reference_run: TrainJob, tiny_model: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    job = make_job(tmp_path, tiny_model, pairs, save_every_steps=1)
    write = hashes.write_record

    def die(checkpoint: Path, found: dict[str, str]) -> None:
        if checkpoint.name.endswith("2"):
            if when == "before it has its name":
                write(checkpoint, found)
            raise WorkerDeathError
        write(checkpoint, found)

    with monkeypatch.context() as m:
        m.setattr(hashes, "write_record", die)
        with pytest.raises(WorkerDeathError):
            run_job(job)
    assert run_job(job).resumed_at == 1
    assert_same_weights(job.out, reference_run.out)


@pytest.mark.parametrize("settings", [{"zero_stage": s} for s in range(4)] + [{"offload": True}], ids=str)
def test_bfloat16_and_offloaded_checkpoints_resume_as_tensors_and_plain_values(
    tmp_path: Path, tiny_model: Path, pairs: Path, settings: dict[str, Any]
) -> None:
    settings = {"dtype": "bfloat16", "save_every_steps": 2, **settings}
    undisturbed = make_job(tmp_path, tiny_model, pairs, name="undisturbed", **settings)
    killed = make_job(tmp_path, tiny_model, pairs, name="killed", **settings)
    run_job(undisturbed)
    run_until(killed, step=3)
    assert run_job(killed).resumed_at == 2
    assert_same_weights(killed.out, undisturbed.out, atol=1e-6)


def test_a_finished_job_is_handed_back_and_a_strange_folder_is_not_overwritten(
    reference_run: TrainJob, shared: Path, tiny_model: Path, pairs: Path
) -> None:
    again = run_job(reference_run)
    assert again.skipped
    assert again.steps == 3
    stranger = make_job(shared, tiny_model, pairs, name="stranger")
    stranger.out.mkdir(parents=True)
    with pytest.raises(InputError, match="stands already"):
        run_job(stranger)


def broken_model(source: Path, target: Path) -> Path:
    from shutil import copytree

    from safetensors.torch import save_file

    copytree(source, target)
    weights = weights_of(source)
    weights["model.embed_tokens.weight"][50] = float("nan")
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_a_non_finite_log_prob_stops_with_the_step_and_the_pairs(tmp_path: Path, tiny_model: Path) -> None:
    rows = pair_rows(4, vocab=40)
    rows[2]["chosen_ids"] = [50, 20, 21]
    pairs = write_pairs(tmp_path / "pairs.parquet", rows)
    job = make_job(tmp_path, broken_model(tiny_model, tmp_path / "nan"), pairs, micro_batch_tokens=1)
    with pytest.raises(RunError, match=r"job job: step 1 of 1: non-finite log-probs on p00001:0:5;"):
        run_job(job)
    assert not job.out.exists()


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_a_non_finite_gradient_stops_with_the_step(
    tmp_path: Path, tiny_model: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch, zero_stage: int
) -> None:
    def steep(*args: Any, **kwargs: Any) -> Tensor:
        losses = simpo_loss(*args, **kwargs)
        return losses + 0 * torch.sqrt(losses.detach() * 0 + 0 * args[0])  # finite, its gradient is not

    monkeypatch.setattr("spa_ray.training.losses.simpo_loss", steep)
    job = make_job(tmp_path, tiny_model, pairs, zero_stage=zero_stage)
    with pytest.raises(
        RunError, match=r"step 1 of 3: non-finite gradient; its pairs: (p0[0-9:]+, ){7}p0[0-9:]+; lower"
    ):
        run_job(job)
    assert not job.out.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda job, tmp: replace(job, model=tmp / "nowhere"), "not a folder; a model is a folder"),
        (lambda job, tmp: replace(job, pairs=tmp / "nowhere"), "no such file"),
        (
            lambda job, tmp: replace(job, train=Train()),
            "job job: train is no section of spa",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    tmp_path: Path, tiny_model: Path, pairs: Path, change: Any, message: str
) -> None:
    job = change(make_job(tmp_path, tiny_model, pairs), tmp_path)
    with pytest.raises(InputError, match=message):
        run_job(job)
    assert not job.out.exists()


@pytest.mark.long
def test_jobs_one_after_the_other_do_not_pile_up_tensors(tmp_path: Path, tiny_model: Path, pairs: Path) -> None:
    def elements() -> int:
        gc.collect()
        return sum(o.numel() for o in gc.get_objects() if type(o) in (Tensor, torch.nn.Parameter))

    def train(stage: int, name: str) -> int:
        run_job(make_job(tmp_path, tiny_model, pairs, name=name, zero_stage=stage, max_steps=1))
        return elements()

    for stage in (0, 1, 2, 3):
        first, again = (train(stage, f"{stage}{i}") for i in range(2))
        assert again <= first


def test_a_model_that_changes_its_logits_in_an_unknown_way_is_refused_before_the_first_step(
    tmp_path: Path, tiny_model: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = policy.load_policy

    def doubled(*args: Any) -> Any:
        model = load(*args)
        forward = model.forward
        model.forward = lambda **kwargs: SimpleNamespace(logits=2 * forward(**kwargs).logits)
        return model

    monkeypatch.setattr(policy, "load_policy", doubled)
    with pytest.raises(InputError, match=r"a token off .* train\.logits_mib=null"):
        run_job(make_job(tmp_path, tiny_model, pairs, max_steps=1))
    assert run_job(make_job(tmp_path, tiny_model, pairs, max_steps=1, packing=False, logits_mib=None)).steps == 1


def test_the_order_within_a_step_changes_nothing(
    shared: Path, reference_run: TrainJob, tiny_model: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = Prepared.plan

    def shuffled(self: Prepared, job: TrainJob, *, packed: bool) -> Plan:
        plan = planned(self, job, packed=packed)
        order = np.concatenate([np.arange(a, b)[::-1] for a, b in pairwise(plan.starts)])
        return replace(plan, order=replace(plan.order, pairs=plan.order.pairs[order]), weights=plan.weights[order])

    monkeypatch.setattr(Prepared, "plan", shuffled)
    job = make_job(shared, tiny_model, pairs, name="reversed", micro_batch_tokens=200)
    run_job(job)
    assert_same_weights(job.out, reference_run.out)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_bfloat16_follows_float32_and_leaves_a_bfloat16_model(
    shared: Path, reference_run: TrainJob, tiny_model: Path, pairs: Path, zero_stage: int
) -> None:
    settings = {"dtype": "bfloat16", "zero_stage": zero_stage, "micro_batch_tokens": 60, "logits_mib": 0.01}
    job = make_job(shared, tiny_model, pairs, name=f"bf16-{zero_stage}", **settings)
    run_job(job)
    for row, exact in zip(log_of(job), log_of(reference_run), strict=True):
        assert row["loss"] == pytest.approx(exact["loss"], rel=0.1)
        assert row["grad_norm"] == pytest.approx(exact["grad_norm"], rel=0.1)
    assert {w.dtype for w in weights_of(job.out).values()} == {torch.bfloat16}
