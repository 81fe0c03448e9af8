"""SGA, RiC, CPO and MODPO trained for real: the same weights and head for every layout, ZeRO stage and number of ranks,
and after a kill; a model folder that transformers reads as any other. Real DeepSpeed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from spa_ray.methods import sga
from spa_ray.training import loop
from spa_ray.training.job import TrainJob, write_job
from spa_ray.training.loop import run_job
from spa_ray.training.method import METHOD, method_of_folder
from spa_ray.training.policy import quiet_deepspeed
from tests import plain_dual_head
from tests.training_support import OBJECTIVES, RANGES, make_job, pair_rows, write_pairs

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("one_process")]

MODEL, FEW = "model.safetensors", 8
LORA = {"lora": {"r": 4, "alpha": 8.0, "target_modules": ["q_proj", "v_proj"]}}
SMALL: dict[str, Any] = {"head_widths": [16, 8], "head_dropout": 0.3, "max_length": 512, "epochs": 1.0, "lora": None}
# Plain SGD in the place of AdamW, whose updates hardly show a gradient's size.
STEPS = {**SMALL, "lr": 0.02, "head_lr": 0.3, "mse_weight": 30.0, "grad_clip": 1.0, "batch_size": 8}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20, in steps of 8, 8 and 4."""
    folder = tmp_path_factory.mktemp("pairs")
    return write_pairs(folder / "pairs.parquet", pair_rows(20), objectives=OBJECTIVES, ranges=RANGES)


def job_of(folder: Path, model: Path, pairs: Path, name: str, **train: Any) -> TrainJob:
    return make_job(folder, model, pairs, name=name, **{**STEPS, **train})


def log_of(job: TrainJob) -> list[dict[str, float]]:
    return [json.loads(line) for line in (job.work / loop.LOG).read_text().splitlines()]


def weights(job: TrainJob) -> dict[str, Tensor]:
    return load_file(job.out / MODEL) | load_file(job.out / sga.HEAD)


SETTINGS: dict[str, dict[str, Any]] = {
    "sft": {"method": "sga_sft", "ce_reduction": "token_mean"},
    "dpo": {"method": "sga_dpo"},
    "lora": {"method": "sga_dpo", **LORA},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "padded_one_by_one": {"packing": False, "micro_batch_tokens": 1, "zero_stage": 0},
    "zero1": {"zero_stage": 1, "micro_batch_tokens": 300},
    "zero3": {"zero_stage": 3, "micro_batch_tokens": 300},
}


@pytest.fixture(scope="module")
def packed(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, pairs: Path, one_process: None
) -> dict[str, Any]:
    """Each kind of job on one process, its sequences packed into one micro-batch a step, with ZeRO 2."""
    folder, made = tmp_path_factory.mktemp("packed"), {}
    quiet_deepspeed()  # it derives classes from AdamW when it is imported
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", plain_dual_head.sgd)
        for name, settings in SETTINGS.items():
            made[name] = job_of(folder, tiny_model, pairs, name, zero_stage=2, **settings)
            run_job(made[name])
    return made


def assert_same(job: TrainJob, truth: TrainJob) -> None:
    found, wanted = weights(job), weights(truth)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    for key in ("grad_norm", "grad_norm/model", "grad_norm/modules", "loss"):
        assert [row[key] for row in log_of(job)] == pytest.approx([row[key] for row in log_of(truth)], rel=1e-4)


@pytest.mark.parametrize("kind", SETTINGS)
def test_both_gradients_move_what_they_are_of(packed: dict[str, TrainJob], tiny_model: Path, kind: str) -> None:
    job = packed[kind]
    before, after = load_file(tiny_model / MODEL), weights(job)
    assert max(float((after[name] - value).abs().max()) for name, value in before.items()) > 1e-3
    for row in log_of(job):
        assert row["grad_norm"] > 1.0  # clipped
        assert row["grad_norm"] ** 2 == pytest.approx(row["grad_norm/model"] ** 2 + row["grad_norm/modules"] ** 2)
        assert min(row["grad_norm/model"], row["grad_norm/modules"]) > 0.05 * row["grad_norm"]


@pytest.mark.parametrize("layout", ["padded_one_by_one", "zero1", pytest.param("zero3", marks=pytest.mark.long)])
def test_no_layout_or_stage_changes_weights_or_head(
    tmp_path: Path,
    tiny_model: Path,
    pairs: Path,
    packed: dict[str, TrainJob],
    monkeypatch: pytest.MonkeyPatch,
    layout: str,
) -> None:
    monkeypatch.setattr(torch.optim, "AdamW", plain_dual_head.sgd)
    kind = {"padded_one_by_one": "dpo", "zero1": "sft", "zero3": "lora"}[layout]
    job = job_of(tmp_path, tiny_model, pairs, layout, **{**SETTINGS[kind], **LAYOUTS[layout]})
    run_job(job)
    assert_same(job, packed[kind])


TWO_RANKS = {"dpo": "padded_one_by_one", "lora": "zero1"}


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, pairs: Path) -> dict[str, TrainJob]:
    folder = tmp_path_factory.mktemp("two")
    jobs = {
        kind: job_of(folder, tiny_model, pairs, kind, **{**SETTINGS[kind], **LAYOUTS[layout]})
        for kind, layout in TWO_RANKS.items()
    }
    files = [folder / f"{name}.json" for name in jobs]
    for file, job in zip(files, jobs.values(), strict=True):
        file.write_text(json.dumps(job.to_dict()))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    command = [*start, plain_dual_head.__file__, "--job", *map(str, files)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return jobs


@pytest.mark.parametrize("kind", TWO_RANKS)
def test_two_ranks_reach_the_weights_and_head_of_one(
    on_two_ranks: dict[str, TrainJob], packed: dict[str, TrainJob], kind: str
) -> None:
    assert_same(on_two_ranks[kind], packed[kind])


@pytest.mark.parametrize(
    "settings",
    [{"method": "sga_sft", **LORA}, pytest.param({"method": "sga_dpo", "zero_stage": 3}, marks=pytest.mark.long)],
    ids=str,
)
def test_a_killed_run_ends_at_the_undisturbed_weights_and_head(
    tmp_path: Path, tiny_model: Path, pairs: Path, settings: dict[str, Any]
) -> None:
    kept = {"save_every_steps": 1, "lr": 1e-3, "head_lr": 1e-2, "epochs": 2.0, **settings}
    whole, killed = (job_of(tmp_path, tiny_model, pairs, name, **kept) for name in ("whole", "killed"))
    run_job(whole)

    def die(row: dict[str, Any]) -> None:
        if row["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(killed, die)
    assert run_job(killed).resumed_at == 4
    before, after = weights(whole), weights(killed)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [row["loss"] for row in log_of(whole)] == [row["loss"] for row in log_of(killed)]
    assert log_of(whole)[-1]["head/mae"] < log_of(whole)[0]["head/mae"]


@pytest.mark.long
def test_a_job_whose_process_is_killed_ends_at_the_undisturbed_weights_and_head(
    tmp_path: Path, tiny_model: Path, pairs: Path, process_group: dict[str, str]
) -> None:
    kept = {"method": "sga_sft", "save_every_steps": 1, "lr": 1e-3, "head_lr": 1e-2, "epochs": 20.0}
    jobs = [job_of(tmp_path, tiny_model, pairs, name, **kept) for name in ("whole", "killed")]
    for job in jobs:
        job.work.mkdir(parents=True)
        write_job(job)
    whole, killed = jobs
    without_group = {key: value for key, value in os.environ.items() if key not in process_group}
    env = {**without_group, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}

    def command(job: TrainJob) -> list[str]:
        return [sys.executable, "-m", "spa_ray.training.loop", "--job", str(job.work / "job.json")]

    with subprocess.Popen(command(killed), env=env, stdout=subprocess.DEVNULL) as process:
        while not (killed.work / loop.LOG).is_file() or len(log_of(killed)) < 5:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not killed.out.exists()
    for job in jobs:
        subprocess.run(command(job), env=env, capture_output=True, timeout=600, check=True)
    before, after = weights(whole), weights(killed)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [row["loss"] for row in log_of(whole)] == [row["loss"] for row in log_of(killed)]


# --- one run of each with its own defaults on the embedded model -----------------------------------------------------


@pytest.fixture(scope="module")
def embedded() -> Path:
    return Path(str(resources.files("spa_ray.microworld") / "model"))


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("few")
    return write_pairs(folder / "pairs.parquet", pair_rows(FEW), objectives=OBJECTIVES, ranges=RANGES)


def paper_job(folder: Path, model: Path, pairs: Path, method: str, **train: Any) -> TrainJob:
    own = {"head_widths": [32]} if method.startswith("sga") else {}
    return make_job(folder, model, pairs, name=method, method=method, max_length=256, epochs=1.0, **{**own, **train})


@pytest.mark.parametrize(
    ("method", "dtype"), [("sga_sft", "bfloat16"), ("sga_dpo", "float32"), ("ric", "float32"), ("cpo", "float32")]
)
def test_a_run_leaves_a_model_that_others_read_and_what_inference_needs(
    tmp_path: Path, embedded: Path, few: Path, method: str, dtype: str
) -> None:
    from transformers import AutoModelForCausalLM

    job = paper_job(tmp_path, embedded, few, method, dtype=dtype)
    run_job(job)
    _, info = AutoModelForCausalLM.from_pretrained(job.out, output_loading_info=True)
    assert not any(info.values())
    loaded = method_of_folder(job.out)
    assert loaded is not None
    assert loaded.conditioned
    assert loaded.state["objectives"] == list(OBJECTIVES)
    assert (job.out / METHOD).is_file()
    if loaded.senses:
        head = loaded.load(job.out)
        width = next(head.parameters()).shape[1]
        assert next(head.parameters()).dtype == torch.float32
        assert loaded.sense(head, torch.randn(3, width)).shape == (3, 2)


@pytest.mark.long
def test_modpo_trains_beside_its_margin_model(tmp_path: Path, embedded: Path, few: Path) -> None:
    margin = paper_job(tmp_path, embedded, few, "spa_dpo", lr=1e-3)
    run_job(margin)
    job = replace(paper_job(tmp_path, embedded, few, "modpo"), models={"margin_helpful": margin.out})
    result = run_job(job)
    rows = pair_rows(FEW)
    ties = sum(row["chosen_scores"][0] == row["rejected_scores"][0] for row in rows)
    assert result.pairs == FEW - ties
    assert log_of(job)[0]["margins"] != 0
