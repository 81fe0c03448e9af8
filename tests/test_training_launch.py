"""Ray Train with two workers: the same weights as one process, one worker group for many jobs, errors of one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from spa_ray.config.models import Resources
from spa_ray.errors import InputError, RunError
from spa_ray.training import launch
from spa_ray.training.job import TrainJob, TrainResult
from spa_ray.training.launch import train_jobs
from tests.training_support import make_job, pair_rows, write_pairs

pytestmark = pytest.mark.engine

# 13 pairs in steps of 6, 6 and 1: the last step leaves one of two ranks without a pair.
JOBS: dict[str, dict[str, Any]] = {
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3, "micro_batch_tokens": 150},
    "zero0": {"zero_stage": 0},
    "dpo": {"method": "spa_dpo", "zero_stage": 1, "micro_batch_tokens": 150},
    "sft": {"method": "sft"},
    "lora": {"lora": {"r": 4, "alpha": 8.0}, "zero_stage": 3},
}
TWO = Resources(train_workers=2)


@dataclass(frozen=True)
class Runs:
    """The same jobs on two Ray Train workers and in one process without Ray."""

    two: dict[str, TrainJob]
    one: dict[str, TrainJob]
    results: list[TrainResult]
    progress: list[dict[str, Any]]
    storage: Path


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    import ray

    started = not ray.is_initialized()
    if started:
        ray.init(num_cpus=4, include_dashboard=False, address="local")
    yield
    if started:
        ray.shutdown()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, ray_here: None) -> Runs:
    folder = tmp_path_factory.mktemp("launch")
    pairs = write_pairs(folder / "pairs.parquet", pair_rows(13))
    two, one = (
        {
            name: make_job(folder / workers, tiny_model, pairs, name=name, batch_size=6, **settings)
            for name, settings in JOBS.items()
        }
        for workers in ("two", "one")
    )
    run_without_ray(list(one.values()), folder)
    progress: list[dict[str, Any]] = []
    results = train_jobs(list(two.values()), TWO, storage=folder / "ray", name="arms", on_progress=progress.append)
    return Runs(two, one, results, progress, folder / "ray")


def run_without_ray(jobs: list[TrainJob], folder: Path) -> None:
    files = [folder / f"{job.name}.json" for job in jobs]
    for file, job in zip(files, jobs, strict=True):
        file.write_text(json.dumps(job.to_dict()))
    command = [sys.executable, "-m", "spa_ray.training.loop", "--job", *map(str, files)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr


def weights_of(job: TrainJob) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(job.out / "model.safetensors")


@pytest.mark.parametrize("name", JOBS)
def test_two_workers_reach_the_weights_of_one_process(runs: Runs, name: str) -> None:
    two, one = weights_of(runs.two[name]), weights_of(runs.one[name])
    assert two.keys() == one.keys()
    for key, value in two.items():
        torch.testing.assert_close(value, one[key], rtol=0, atol=1e-5)


def test_every_job_reports_its_result_in_order(runs: Runs) -> None:
    assert [r.name for r in runs.results] == list(JOBS)
    assert {r.steps for r in runs.results} == {3}
    assert all(r.model == runs.two[r.name].out and r.metrics["step"] == 3 for r in runs.results)
    assert runs.results[0].dropped == {"too_long": 0, "identical": 0}


def test_progress_names_every_step_of_every_job_once(runs: Runs) -> None:
    steps = Counter((row["job"], row["step"]) for row in runs.progress)
    assert steps == Counter((name, step) for name in JOBS for step in (1, 2, 3))


def test_what_workers_log_stands_as_json_lines_in_rays_log_folder(runs: Runs) -> None:
    import ray

    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    texts = [line for path in logs.glob("worker-*.out") for line in path.read_text().split("\n")]
    told = [json.loads(line) for line in texts if line.startswith('{"time"')]
    ends = [line for line in told if line["message"] == "job ends" and line["run"] == "arms"]
    assert [line["job"] for line in sorted(ends, key=lambda line: line["time"])] == list(JOBS)
    assert {(line["level"], line["stage"], line["rank"], line["step"]) for line in ends} == {("INFO", "train", 0, 3)}


@pytest.mark.long
def test_a_bad_job_fails_in_one_line_after_the_good_ones_are_skipped(runs: Runs, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.parquet", [{**pair_rows(1)[0], "chosen_ids": [9999]}])
    bad = replace(runs.two["zero2"], name="bad", pairs=pairs, out=tmp_path / "out", work=tmp_path / "work")
    with pytest.raises(InputError, match="holds id 9999") as e:
        train_jobs([runs.two["zero2"], bad], TWO, storage=runs.storage, name="bad")
    assert "\n" not in str(e.value)
    assert not bad.out.exists()


def train_until_memory_is_used_up(config: dict[str, Any]) -> dict[str, Any]:
    """A worker whose rank 1 has no memory left in its second step, while rank 0 waits for it in a collective."""
    from ray.train import get_context

    from spa_ray.training.step import StepLoop

    rank = get_context().get_world_rank()
    with Path(config["starts"]).open("a") as starts:
        starts.write(f"{rank}\n")
    forward = StepLoop._forward

    def limited(self: StepLoop, step: int, *rest: Any) -> Any:
        if step == 1 and rank == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total of 79 GiB")
        return forward(self, step, *rest)

    StepLoop._forward = limited  # type: ignore[method-assign]
    return launch._train_on_worker(config)


@pytest.mark.long
def test_memory_that_is_used_up_in_a_step_ends_the_group_in_one_line_and_is_not_tried_again(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts, trainer = tmp_path / "starts", launch._trainer

    def limited(*given: Any, **named: Any) -> Any:
        made = trainer(*given, **named)
        made.train_loop_per_worker = train_until_memory_is_used_up
        made.train_loop_config["starts"] = str(starts)
        return made

    monkeypatch.setattr(launch, "_trainer", limited)
    job = replace(runs.two["zero2"], name="large", out=tmp_path / "out", work=tmp_path / "work")
    with pytest.raises(RunError) as e:
        train_jobs([job], TWO, storage=runs.storage, name="large")
    said = str(e.value)
    assert said.startswith(
        "job large: memory is used up on a rank; set train.gradient_checkpointing=true or train.micro"
    )
    assert said.endswith("(CUDA out of memory. Tried to allocate 2.00 GiB.)")
    assert "\n" not in said
    assert len((job.work / "train_log.jsonl").read_text().splitlines()) == 1  # no step was taken again
    assert len(starts.read_text().splitlines()) <= 4  # once to train, and once at most to read the record
    assert not job.out.exists()


def test_without_ray_a_bad_job_ends_with_exit_status_2_and_one_line(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text("{}")
    command = [sys.executable, "-m", "spa_ray.training.loop", "--job", str(tmp_path / "job.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert "not a training job" in done.stderr.splitlines()[-1]


def test_workers_that_find_no_place_end_the_run_in_one_line_and_in_time(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    monkeypatch.delenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", raising=False)
    job = replace(runs.two["zero2"], name="nowhere", out=tmp_path / "out", work=tmp_path / "work")
    started = time.monotonic()
    with pytest.raises(RunError, match=r"99 workers found no place.*2 × 3 s \(resources\.node_wait_s\)") as e:
        train_jobs([job], Resources(train_workers=99, node_wait_s=3), storage=runs.storage, name="nowhere")
    assert time.monotonic() - started < 60
    assert "\n" not in str(e.value)
    assert "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S" not in os.environ
