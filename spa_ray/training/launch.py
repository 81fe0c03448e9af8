"""Ray Train starts the step loop: a list of jobs, one after the other, in ONE worker group.

Comes in: jobs, the `Resources` section, a folder for Ray Train's own state. Goes out: one `TrainResult` a job. Ray
starts the workers, restarts the group after a death, and stops it; it does not know what a step is. Progress is read
from each job's `train_log.jsonl`, which the workers write where the driver reads it.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from spa_ray.config.gpus import gpus_wanted
from spa_ray.config.models import Resources
from spa_ray.errors import InputError, RunError
from spa_ray.logs import WorkerLog, level_of
from spa_ray.storage.files import (
    STORAGE_VARIABLES,
    AnyPath,
    arrow_filesystem,
    as_path,
    delete_file,
    is_file,
    is_local,
    read_json,
    write_json,
)
from spa_ray.training.job import Progress, TrainJob, TrainResult
from spa_ray.training.relief import is_out_of_memory, out_of_memory
from spa_ray.training.stored import LOOK_EVERY, StoredJob, run_stored

# A worker group that dies is started again this often; the job resumes from its last checkpoint.
MAX_RESTARTS = 2
# Starts of the worker group that may find no room, each waited for `resources.node_wait_s`; Ray's own limit is none.
FRUITLESS_STARTS = 1
START_LIMIT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
LOG = "train_log.jsonl"
# Written by a rank whose GPU memory is used up: the next start of the group would meet the same, so it ends at once.
OUT_OF_MEMORY = "out_of_memory.json"
Job = TrainJob | StoredJob


def train_jobs(
    jobs: Sequence[Job],
    resources: Resources,
    *,
    storage: AnyPath,
    name: str,
    verbose: bool = False,
    on_progress: Progress | None = None,
) -> list[TrainResult]:
    """Train all jobs, in order. `on_progress` is called on the driver with a job's name and each new row of its log.

    `name` should carry the jobs' hash: Ray Train resumes a run of the same name in the same storage.
    Jobs of a run on an object store keep all ranks on one node, whose disk they work on.
    Raises: InputError and RunError as the workers raise them; RunError when the worker group dies for good.
    """
    if not jobs:
        return []
    from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError

    recorded = storage / name / OUT_OF_MEMORY
    delete_file(recorded)
    trainer = _trainer(jobs, resources, storage=storage, name=name, verbose=verbose)
    try:
        with _start_limit(resources.node_wait_s), _following(jobs, on_progress):
            result = trainer.fit()
    except (ControllerError, TrainingFailedError) as e:
        if is_file(recorded):
            raise RunError(read_json(recorded)["error"]) from e
        if not isinstance(e, ControllerError):
            raise RunError(f"training: {_last_line(e)}; logs are in {storage / name} and Ray's session folder") from e
        raise RunError(f"training: {_no_start(e, resources)}") from e
    outcome = result.return_value
    if outcome["error"] is not None:
        raise (InputError if outcome["kind"] == "InputError" else RunError)(outcome["error"])
    return [TrainResult.from_dict(raw) for raw in outcome["results"]]


def _trainer(jobs: Sequence[Job], resources: Resources, *, storage: AnyPath, name: str, verbose: bool) -> Any:
    """Ray's trainer for these jobs, not started. Raises: InputError when no node has room for ranks that need one."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import LoggingConfig

    gpus = gpus_per_worker(resources)
    share = {"CPU": resources.cpus_per_worker, **({"GPU": gpus} if gpus else {})}
    stored = any(isinstance(job, StoredJob) for job in jobs)
    if stored:
        _check_one_node(resources.train_workers, share)
    filesystem, place = arrow_filesystem(storage)
    return TorchTrainer(
        _train_on_worker,
        train_loop_config={
            "jobs": [job.to_dict() for job in jobs],
            "stored": stored,
            "run": name,
            "out_of_memory": str(storage / name / OUT_OF_MEMORY),
            "log_level": level_of(verbose=verbose),
        },
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=resources.train_workers,
            use_gpu=gpus > 0,
            resources_per_worker=share,
            placement_strategy="STRICT_PACK" if stored else "PACK",
        ),
        run_config=RunConfig(
            name=name,
            storage_path=place,
            storage_filesystem=None if is_local(storage) else filesystem,
            failure_config=FailureConfig(max_failures=MAX_RESTARTS, controller_failure_limit=FRUITLESS_STARTS),
            logging_config=LoggingConfig(log_level="INFO" if verbose else "ERROR"),
            worker_runtime_env={"env_vars": _worker_env()},
        ),
    )


def _train_on_worker(config: dict[str, Any]) -> dict[str, Any]:
    """What every worker runs. Errors of our own are the same on all ranks and final: returned, so never retried.

    Memory that is used up on one rank leaves the others waiting in a collective. So it is raised, which ends the group,
    and recorded: the group's next start returns the record instead of training again.
    """
    from ray.train import get_context

    WorkerLog(config["log_level"], {"run": config["run"], "stage": "train"}).start(rank=get_context().get_world_rank())
    recorded = as_path(config["out_of_memory"])
    if is_file(recorded):
        return {"results": [], **read_json(recorded)}
    from spa_ray.training.loop import run_job
    from spa_ray.training.metrics import TrainMetrics

    report = TrainMetrics(run=config["run"]).row
    results: list[dict[str, Any]] = []
    try:
        for raw in config["jobs"]:
            if config["stored"]:
                result = run_stored(StoredJob.from_dict(raw), partial(run_job, progress=report))
            else:
                result = run_job(TrainJob.from_dict(raw), report)
            results += [result.to_dict()]
    except (InputError, RunError) as e:
        return {"results": results, "error": str(e), "kind": type(e).__name__}
    except RuntimeError as e:
        if is_out_of_memory(e):
            write_json(recorded, {"error": out_of_memory(config["jobs"][len(results)], e), "kind": "RunError"})
        raise
    return {"results": results, "error": None, "kind": None}


@contextmanager
def _start_limit(seconds: float) -> Iterator[None]:
    """How long Ray Train waits for the workers' place, unless the environment says it."""
    if START_LIMIT in os.environ:
        yield
        return
    os.environ[START_LIMIT] = f"{seconds:g}"
    try:
        yield
    finally:
        del os.environ[START_LIMIT]


def _no_start(error: Any, resources: Resources) -> str:
    """Why Ray Train gave up before or between steps."""
    what = type(error.controller_failure).__name__
    if what != "WorkerGroupStartupTimeoutError":
        return f"{what}: {_last_line(error)}"
    return (
        f"{resources.train_workers} workers found no place on the cluster in {FRUITLESS_STARTS + 1} × "
        f"{resources.node_wait_s:g} s (resources.node_wait_s); see `ray status`, then run the same command again, or "
        "change resources.train_workers, gpus_per_worker, cpus_per_worker"
    )


def _check_one_node(workers: int, share: Mapping[str, float]) -> None:
    """Raises: InputError when the cluster has room for all ranks, but none of the nodes that are here."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    whole = {key: workers * amount for key, amount in share.items()}
    if any(all(node.get(key, 0) >= amount for key, amount in whole.items()) for node in nodes):
        return
    if all(sum(node.get(key, 0) for node in nodes) >= amount for key, amount in whole.items()):
        raise InputError(
            f"resources.train_workers: {workers} ranks do not fit on one node, as training for a run_dir on an object "
            "store needs; use a run_dir on a disk that the nodes share, or fewer ranks"
        )


def gpus_per_worker(resources: Resources) -> float:
    """GPUs of one rank on this cluster."""
    if resources.gpus_per_worker is not None:
        return resources.gpus_per_worker
    import ray

    if not ray.is_initialized():
        ray.init(include_dashboard=False)
    return gpus_wanted(None, 1.0, cluster_gpus=ray.cluster_resources().get("GPU", 0), key="resources.gpus_per_worker")


def _worker_env() -> dict[str, str]:
    # OpenMP threads that spin while they wait starve their neighbours where cores are shared.
    storage = {key: os.environ[key] for key in STORAGE_VARIABLES if key in os.environ}
    return {"OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false", **storage}


@contextmanager
def _following(jobs: Sequence[Job], on_progress: Progress | None) -> Iterator[None]:
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


def _follow(jobs: Sequence[Job], on_progress: Progress, done: threading.Event) -> None:
    pause = LOOK_EVERY if any(isinstance(job, StoredJob) for job in jobs) else 0.5  # seconds
    seen = {job.name: _rows(job)[1] for job in jobs}  # rows of an earlier, interrupted run are not news
    while True:
        last = done.wait(pause)
        for job in jobs:
            rows, count = _rows(job)
            for row in rows[min(seen[job.name], count) :]:
                on_progress({"job": job.name, **row})
            seen[job.name] = count
        if last:
            return


def _rows(job: Job) -> tuple[list[dict[str, Any]], int]:
    path = job.work / LOG
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines], len(lines)


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
