"""Where a step's log row goes besides `train_log.jsonl`: TensorBoard, Weights & Biases, MLflow.

Comes in: a job, its fingerprint, the step it starts at, then one row a step. Goes out: curves, on rank 0 alone; a
resumed run continues them. Never: a package that was not asked for; an end of training because a tracker failed.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from spa_ray.config.training import TrackerName
from spa_ray.errors import InputError
from spa_ray.training.job import TrainJob

log = logging.getLogger(__name__)

TENSORBOARD = "tensorboard"  # folder below the job's work folder
NOT_CURVES = frozenset({"step", "steps"})
TAG = "spa_ray_id"  # of an MLflow run


def check_backends(backends: Sequence[TrackerName]) -> None:
    """Import what is asked for. Raises: InputError naming the package that is missing and how to install it."""
    for name in backends:
        try:
            importlib.import_module(name)
        except ImportError as e:
            raise InputError(
                f"tracking.backends: {name} cannot be imported ({e}); `pip install {name}`, or leave {name} out"
            ) from e


def run_id(job: TrainJob, fingerprint: str) -> str:
    """The id under which a tracker knows this run: the same after a resume, another in another work folder."""
    return hashlib.blake2b(f"{fingerprint}\n{job.work.absolute()}".encode(), digest_size=8).hexdigest()


def curves(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a log row that change from step to step."""
    numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return {k: float(v) for k, v in numbers.items() if k not in NOT_CURVES}


class Tracker(Protocol):
    """One place where curves are drawn."""

    def log(self, values: dict[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in `work/tensorboard`; those of steps that a resume does again are purged."""

    def __init__(self, job: TrainJob, fingerprint: str, first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(job.work / TENSORBOARD), purge_step=first + 1, flush_secs=10)

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of the project, with a stable id. W&B keeps the first value of a step: a resume's repeats change nothing.

    The account and the mode are the package's own: `wandb login` or WANDB_API_KEY, WANDB_MODE=offline.
    """

    def __init__(self, job: TrainJob, fingerprint: str, first: int) -> None:
        import wandb

        self.run = wandb.init(
            project=job.tracking.project,
            name=job.name,
            id=run_id(job, fingerprint),
            resume="allow",
            config=job.to_dict(),
            dir=str(job.work),
        )

    def log(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


class MLflow:
    """A run of the experiment, found again by its tag. Without MLFLOW_TRACKING_URI it lies in `work/mlflow.db`."""

    def __init__(self, job: TrainJob, fingerprint: str, first: int) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(job.work / 'mlflow.db').absolute()}"
        self.metric = Metric
        self.client = MlflowClient(tracking_uri=uri)
        project = job.tracking.project
        experiment = self.client.get_experiment_by_name(project)
        where = experiment.experiment_id if experiment else self.client.create_experiment(project)
        name = run_id(job, fingerprint)
        found = self.client.search_runs([where], filter_string=f"tags.{TAG} = '{name}'", max_results=1)
        run = found[0] if found else self.client.create_run(where, tags={TAG: name}, run_name=job.name)
        self.run_id = run.info.run_id
        if found:
            self.client.update_run(self.run_id, status="RUNNING")
        else:
            settings = job.train.model_dump(mode="json").items()
            params = [Param(f"train.{key}", json.dumps(value)) for key, value in settings]
            self.client.log_batch(self.run_id, params=params)

    def log(self, values: dict[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        metrics = [self.metric(key, value, now, step) for key, value in values.items()]
        self.client.log_batch(self.run_id, metrics=metrics)

    def close(self) -> None:
        self.client.set_terminated(self.run_id)


BACKENDS: dict[TrackerName, Callable[[TrainJob, str, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}


def open_trackers(job: TrainJob, *, fingerprint: str, first: int) -> Trackers | None:
    """Collective: rank 0's trackers, None on the other ranks. Raises: as `Trackers`, on every rank."""
    from spa_ray.training import comm

    mine: list[Trackers] = []
    comm.on_rank_zero(lambda: mine.append(Trackers(job, fingerprint=fingerprint, first=first)))
    return mine[0] if mine else None


class Trackers:
    """All trackers of a job, for rank 0. `first` is the step (0-based) that this start begins with.

    Raises: InputError when a tracker of a run that begins cannot start. One of a run that goes on is done without.
    """

    def __init__(self, job: TrainJob, *, fingerprint: str, first: int) -> None:
        check_backends(job.tracking.backends)
        self.job = job
        self.open: dict[TrackerName, Tracker] = {}
        self.troubles: list[str] = []
        for name in job.tracking.backends:
            reason = self._try(name, partial(self._start, name, fingerprint, first))
            if reason is not None and first == 0:
                self.close()
                raise InputError(f"tracking.backends: {name} cannot start ({reason}); mend that, or leave {name} out")

    def log(self, row: Mapping[str, Any]) -> list[str]:
        """Draw a row (its `step` counts from 1). Returns the troubles that came up since the last call, once each."""
        for name, tracker in list(self.open.items()):
            self._try(name, partial(tracker.log, curves(row), int(row["step"])))
        troubles, self.troubles = self.troubles, []
        return troubles

    def close(self) -> None:
        """Write out what is pending."""
        for name, tracker in list(self.open.items()):
            self._try(name, tracker.close)
        self.open.clear()

    def _start(self, name: TrackerName, fingerprint: str, first: int) -> None:
        self.open[name] = BACKENDS[name](self.job, fingerprint, first)

    def _try(self, name: TrackerName, action: Callable[[], None]) -> str | None:
        """Why it failed, or None."""
        # The one place where an error is survived: a curve is a copy of `train_log.jsonl`, and a network that fails
        # in the night must not cost the weights. What such a package raises is its own affair, hence Exception. The
        # tracker is not asked again: each try may wait for a time-out, on every step.
        try:
            action()
        except Exception as e:  # noqa: BLE001
            self.open.pop(name, None)
            reason = f"{type(e).__name__}: {' '.join(str(e).split())}"
            text = f"{name} failed ({reason}); training goes on without it, and train_log.jsonl has every step"
            self.troubles.append(text)
            log.warning("job %s: %s", self.job.name, text)
            return reason
        return None
