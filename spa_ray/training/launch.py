"""Ray Train starts the step loop: a list of jobs, one after the other, in ONE worker group.

Comes in: jobs, the `Resources` section, a folder for Ray Train's own state. Goes out: one `TrainResult` a job. Ray
starts the workers, restarts the group after a death, and stops it; it does not know what a step is. Progress is read
from each job's `train_log.jsonl`, which the workers write where the driver reads it.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spa_ray.config.models import Resources
from spa_ray.errors import InputError, RunError
from spa_ray.training.job import Progress, TrainJob, TrainResult

# A worker group that dies is started again this often; the job resumes from its last checkpoint.
MAX_RESTARTS = 2
LOG = "train_log.jsonl"


def train_jobs(
    jobs: Sequence[TrainJob],
    resources: Resources,
    *,
    storage: Path,
    name: str,
    verbose: bool = False,
    on_progress: Progress | None = None,
) -> list[TrainResult]:
    """Train all jobs, in order. `on_progress` is called on the driver with a job's name and each new row of its log.

    `name` should carry the jobs' hash: Ray Train resumes a run of the same name in the same storage.
    Raises: InputError and RunError as the workers raise them; RunError when the worker group dies for good.
    """
    if not jobs:
        return []
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import LoggingConfig
    from ray.train.v2.api.exceptions import TrainingFailedError

    gpus = _gpus_per_worker(resources)
    cold_start = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600"}  # importing torch on a busy machine takes a while
    os.environ.update({k: os.environ.get(k, v) for k, v in cold_start.items()})
    trainer = TorchTrainer(
        _train_on_worker,
        train_loop_config={"jobs": [job.to_dict() for job in jobs]},
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=resources.train_workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": resources.cpus_per_worker, **({"GPU": gpus} if gpus else {})},
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(storage.absolute()),
            failure_config=FailureConfig(max_failures=MAX_RESTARTS),
            logging_config=LoggingConfig(log_level="INFO" if verbose else "ERROR"),
            worker_runtime_env={"env_vars": _worker_env()},
        ),
    )
    try:
        with _following(jobs, on_progress):
            result = trainer.fit()
    except TrainingFailedError as e:
        raise RunError(f"training: {_last_line(e)}; logs are in {storage / name} and Ray's session folder") from e
    outcome = result.return_value
    if outcome["error"] is not None:
        raise (InputError if outcome["kind"] == "InputError" else RunError)(outcome["error"])
    return [TrainResult.from_dict(raw) for raw in outcome["results"]]


def _train_on_worker(config: dict[str, Any]) -> dict[str, Any]:
    """What every worker runs. Errors of our own are the same on all ranks and final: returned, so never retried."""
    from spa_ray.training.loop import run_job

    results: list[dict[str, Any]] = []
    try:
        for job in map(TrainJob.from_dict, config["jobs"]):
            results += [run_job(job).to_dict()]
    except (InputError, RunError) as e:
        return {"results": results, "error": str(e), "kind": type(e).__name__}
    return {"results": results, "error": None, "kind": None}


def _gpus_per_worker(resources: Resources) -> float:
    if resources.gpus_per_worker is not None:
        return resources.gpus_per_worker
    import ray

    if not ray.is_initialized():
        ray.init(include_dashboard=False)
    return 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0


def _worker_env() -> dict[str, str]:
    # OpenMP threads that spin while they wait starve their neighbours where cores are shared.
    return {"OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}


@contextmanager
def _following(jobs: Sequence[TrainJob], on_progress: Progress | None) -> Iterator[None]:
    """Hand new rows of the jobs' logs to `on_progress` while the block runs."""
    if on_progress is None:
        yield
        return
    done = threading.Event()
    thread = threading.Thread(target=_follow, args=(jobs, on_progress, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _follow(jobs: Sequence[TrainJob], on_progress: Progress, done: threading.Event) -> None:
    seen = {job.name: _rows(job)[1] for job in jobs}  # rows of an earlier, interrupted run are not news
    while True:
        last = done.wait(0.5)
        for job in jobs:
            rows, count = _rows(job)
            for row in rows[min(seen[job.name], count) :]:
                on_progress({"job": job.name, **row})
            seen[job.name] = count
        if last:
            return


def _rows(job: TrainJob) -> tuple[list[dict[str, Any]], int]:
    path = job.work / LOG
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines], len(lines)


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
