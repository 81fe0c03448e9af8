"""A method with a head of its own, sequences, targets and a rendered prompt: the gradients, norms and resumes of plain
torch, on one process and on two, for every ZeRO stage. Real DeepSpeed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spa_ray.training import loop, own_modules
from spa_ray.training.job import TrainJob
from spa_ray.training.loop import run_job
from tests import dual_head
from tests.dual_head import METHOD, Plain, plain_run
from tests.training_support import make_job, pair_rows, write_pairs

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("one_process", "on_the_path")]

PAIRS = 20  # in steps of 8: 8, 8 and a short one of 4
LORA = {"lora": {"r": 4, "alpha": 8.0, "target_modules": ["q_proj", "v_proj"]}}
# The gradient's norm is 5 to 15, most of it the head's at this weight: every step is clipped.
CLIPPED = {"lr": 0.1, "head_lr": 0.5, "head_weight": 30.0, "grad_clip": 1.0}


@pytest.fixture(scope="module")
def on_the_path() -> Iterator[None]:
    sys.path.insert(0, str(dual_head.FOLDER))
    yield
    sys.path.remove(str(dual_head.FOLDER))
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
    for file, wanted in (("model.safetensors", truth.model), (own_modules.MODULES, truth.head)):
        found = tensors(job.out / file)
        assert found.keys() == {name for name in wanted if name in found}
        for name, value in found.items():
            torch.testing.assert_close(value, wanted[name], rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    norms = [(row["grad_norm"], row["grad_norm/modules"]) for row in log_of(job)]
    assert norms == [pytest.approx(pair, rel=1e-4) for pair in truth.norms]


SETTINGS: dict[str, dict[str, Any]] = {
    "zero0": {"zero_stage": 0},
    "zero0_several": {"zero_stage": 0, "micro_batch_tokens": 200},
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


@pytest.mark.parametrize("name", SETTINGS)
def test_clipped_steps_are_those_of_plain_torch(
    tmp_path: Path, tiny_model: Path, pairs: Path, plain: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(torch.optim, "AdamW", dual_head.sgd)
    truth = plain("lora" if "lora" in name else "all")
    assert min(total for total, _ in truth.norms) > CLIPPED["grad_clip"]
    assert all(0.1 < head / total < 0.99 for total, head in truth.norms)  # neither part alone is the norm
    job = job_of(tmp_path, tiny_model, pairs, name, **SETTINGS[name])
    run_job(job)
    assert_is_plain(job, truth)
