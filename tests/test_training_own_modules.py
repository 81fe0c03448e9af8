"""A method with a head of its own, sequences, targets and a rendered prompt: the gradients, norms and resumes of plain
torch, on one process and on two, for every ZeRO stage. Real DeepSpeed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from spa_ray.errors import InputError, RunError
from spa_ray.training import comm, loop, own_modules
from spa_ray.training.job import TrainJob
from spa_ray.training.loop import run_job
from spa_ray.training.method import METHOD as METHOD_FILE
from spa_ray.training.method import MODULES, method_of_folder
from spa_ray.training.policy import quiet_deepspeed
from spa_ray.training.prepare import prepare
from tests import plain_dual_head
from tests.plain_dual_head import METHOD, Plain, plain_run
from tests.training_support import make_job, pair_rows, write_pairs

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("one_process", "on_the_path")]

PAIRS = 20  # in steps of 8: 8, 8 and a short one of 4
LORA = {"lora": {"r": 4, "alpha": 8.0, "target_modules": ["q_proj", "v_proj"]}}
# The gradient's norm is 5 to 15, most of it the head's at this weight: every step is clipped.
CLIPPED = {"lr": 0.1, "head_lr": 0.5, "head_weight": 30.0, "grad_clip": 1.0}


@pytest.fixture(scope="module")
def on_the_path() -> Iterator[None]:
    sys.path.insert(0, str(plain_dual_head.FOLDER))
    yield
    sys.path.remove(str(plain_dual_head.FOLDER))
    sys.modules.pop("dual_head", None)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.parquet", pair_rows(PAIRS))


def job_of(folder: Path, model: Path, pairs: Path, name: str, **train: Any) -> TrainJob:
    return make_job(folder, model, pairs, name=name, method=METHOD, **{**CLIPPED, **train})


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, pairs: Path, on_the_path: None) -> Any:
    """Plain torch's result for a kind of job, made once."""
    folder, made = tmp_path_factory.mktemp("plain"), {}

    def of(kind: str, one_process: Any = None) -> Plain:
        if kind not in made:
            made[kind] = plain_run(job_of(folder, tiny_model, pairs, kind, **(LORA if kind == "lora" else {})))
        return made[kind]

    return of


def tensors(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


def log_of(job: TrainJob) -> list[dict[str, float]]:
    return [json.loads(line) for line in (job.work / loop.LOG).read_text().splitlines()]


def assert_is_plain(job: TrainJob, truth: Plain) -> None:
    for file, wanted in (("model.safetensors", truth.model), (MODULES, truth.head)):
        found = tensors(job.out / file)
        assert found.keys() == {name for name in wanted if name in found}
        for name, value in found.items():
            torch.testing.assert_close(value, wanted[name], rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    norms = [(row["grad_norm"], row["grad_norm/modules"]) for row in log_of(job)]
    assert norms == [pytest.approx(pair, rel=1e-4) for pair in truth.norms]


SETTINGS: dict[str, dict[str, Any]] = {
    "zero0": {"zero_stage": 0},
    "zero0_several": {"zero_stage": 0, "micro_batch_tokens": 200},
    "zero0_single": {"zero_stage": 0, "micro_batch_tokens": 1},
    "zero1": {"zero_stage": 1, "micro_batch_tokens": 200},
    "zero2": {"zero_stage": 2},
    "zero2_single": {"zero_stage": 2, "micro_batch_tokens": 1},
    "zero2_padded": {"zero_stage": 2, "packing": False, "micro_batch_tokens": 200},
    "zero2_offload": {"zero_stage": 2, "offload": True},
    "zero3": {"zero_stage": 3, "micro_batch_tokens": 200},
    "lora0": {"zero_stage": 0, "micro_batch_tokens": 200, **LORA},
    "lora2": {"zero_stage": 2, **LORA},
    "lora3": {"zero_stage": 3, "micro_batch_tokens": 200, **LORA},
}


SLOW = ("zero0_several", "zero1", "lora0")  # much like one of the others


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long if n in SLOW else ()) for n in SETTINGS])
def test_clipped_steps_are_those_of_plain_torch(
    tmp_path: Path, tiny_model: Path, pairs: Path, plain: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    quiet_deepspeed()  # it derives classes from AdamW when it is imported
    monkeypatch.setattr(torch.optim, "AdamW", plain_dual_head.sgd)
    truth = plain("lora" if "lora" in name else "all")
    assert min(total for total, _ in truth.norms) > CLIPPED["grad_clip"]
    assert all(0.1 < head / total < 0.99 for total, head in truth.norms)  # neither part alone is the norm
    job = job_of(tmp_path, tiny_model, pairs, name, **SETTINGS[name])
    run_job(job)
    assert_is_plain(job, truth)


TWO_RANKS = ("zero0_several", "zero0_single", "zero1", "zero2", "zero2_single", "zero3", "lora2", "lora3")


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, pairs: Path) -> dict[str, TrainJob]:
    folder = tmp_path_factory.mktemp("two")
    jobs = {name: job_of(folder, tiny_model, pairs, name, **SETTINGS[name]) for name in TWO_RANKS}
    files = [folder / f"{name}.json" for name in jobs]
    for file, job in zip(files, jobs.values(), strict=True):
        file.write_text(json.dumps(job.to_dict()))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    command = [*start, plain_dual_head.__file__, "--job", *map(str, files)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return jobs


@pytest.mark.parametrize("name", TWO_RANKS)
def test_two_ranks_reach_the_same(on_two_ranks: dict[str, TrainJob], plain: Any, name: str) -> None:
    assert_is_plain(on_two_ranks[name], plain("lora" if "lora" in name else "all"))


def test_single_sequences_share_their_pairs_over_both_ranks(
    tmp_path: Path, tiny_model: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The `single` settings above: the loss of a pair, and its head's gradient, are of two ranks' sequences."""
    monkeypatch.setattr(comm, "world_size", lambda: 2)
    job = job_of(tmp_path, tiny_model, pairs, "zero2_single", **SETTINGS["zero2_single"])
    plan = prepare(job).plan(job, packed=True)
    for step in map(plan.step, range(plan.steps)):
        assert len(step.shared_pairs) == len(step.pairs)
        assert all(len(parts) > 1 for parts in step.shared)


@pytest.mark.parametrize("settings", [{"zero_stage": 2}, {"zero_stage": 3, **LORA}], ids=str)
def test_a_resumed_run_ends_at_the_undisturbed_weights_and_head(
    tmp_path: Path, tiny_model: Path, pairs: Path, settings: dict[str, Any]
) -> None:
    kept = {"save_every_steps": 1, "lr": 1e-3, "head_lr": 1e-2, "epochs": 2, **settings}
    whole, killed = (job_of(tmp_path, tiny_model, pairs, name, **kept) for name in ("whole", "killed"))
    run_job(whole)

    def die(row: dict[str, Any]) -> None:
        if row["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(killed, die)
    assert run_job(killed).resumed_at == 4
    for file in ("model.safetensors", MODULES):
        before, after = tensors(whole.out / file), tensors(killed.out / file)
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert [row["loss"] for row in log_of(whole)] == [row["loss"] for row in log_of(killed)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, pairs: Path) -> TrainJob:
    job = job_of(tmp_path_factory.mktemp("trained"), tiny_model, pairs, "job", head_lr=1e-2, save_every_steps=1)
    run_job(job)
    return job


def test_the_model_folder_holds_head_and_state_and_loads_as_it_is(
    trained: TrainJob, tiny_model: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    from spa_ray.storage.model_folder import check_model_folder

    check_model_folder(trained.out)
    _, info = AutoModelForCausalLM.from_pretrained(trained.out, output_loading_info=True)
    assert not any(info.values())
    learnt = json.loads((trained.out / METHOD_FILE).read_text())
    assert learnt["method"] == METHOD
    assert set(learnt["state"]) == {"mean", "std"}
    method = method_of_folder(trained.out)
    assert method is not None
    assert (method.state, method.config.head_lr) == (learnt["state"], trained.train.head_lr)
    assert type(method).__name__ == "DualHead"
    head = method.load(trained.out)
    assert not head.training
    assert tensors(trained.out / MODULES).keys() == head.state_dict().keys()
    before = log_of(trained)[0]["head/mse"]
    assert log_of(trained)[-1]["head/mse"] < before

    # The next method's model folder has none of it.
    job = make_job(tmp_path, trained.out, trained.pairs, method="spa_simpo", max_steps=1)
    run_job(job)
    assert not (job.out / METHOD_FILE).exists()
    assert not (job.out / MODULES).exists()


def test_spa_export_writes_a_checkpoints_head_and_state(trained: TrainJob, tmp_path: Path) -> None:
    from spa_ray.training.convert import export

    steps = [row["head/mse"] for row in log_of(trained)]
    out = export(trained.work, tmp_path / "model", step=len(steps) - 1)
    assert (out / METHOD_FILE).read_text() == (trained.out / METHOD_FILE).read_text()
    found, last = tensors(out / MODULES), tensors(trained.out / MODULES)
    assert found.keys() == last.keys()
    assert not all(torch.equal(found[name], last[name]) for name in last)  # a step before


def test_a_changed_head_in_a_checkpoint_is_refused(tmp_path: Path, tiny_model: Path, pairs: Path) -> None:
    job = job_of(tmp_path, tiny_model, pairs, "job", save_every_steps=1)

    def die(row: dict[str, Any]) -> None:
        if row["step"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(job, die)
    (job.work / "checkpoints" / "step_00000001" / own_modules.SAVED).write_bytes(b"other")
    with pytest.raises(RunError, match=r"modules\.pt has changed"):
        run_job(job)


def test_a_folder_without_its_head_or_with_anothers_is_refused(trained: TrainJob, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(trained.out, folder)
    head = tensors(folder / MODULES)
    method = method_of_folder(folder)
    assert method is not None
    save_file({name: value[..., :3].contiguous() for name, value in head.items()}, folder / MODULES)
    with pytest.raises(InputError, match=r"modules\.safetensors: not this model's \(size mismatch .*\)$"):
        method.load(folder)
    (folder / MODULES).unlink()
    with pytest.raises(InputError, match=r"modules\.safetensors is missing, which dual_head:DualHead left there"):
        method_of_folder(folder)
