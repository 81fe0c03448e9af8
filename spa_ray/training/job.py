"""What one training job is and what it leaves behind, as plain data that travels as JSON.

Comes in: paths, a `train` section, a seed. Goes out: `TrainJob`, `TrainResult`. Never: torch, Ray.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from spa_ray.config.training import Tracking, Train, train_section
from spa_ray.errors import InputError
from spa_ray.rollout.settings import ChatSettings
from spa_ray.storage.files import AnyPath, as_path

Progress = Callable[[dict[str, Any]], None]
JOB = "job.json"  # in the work folder, for `spa export`
RESULT = "train_result.json"  # in the work folder, from just before the model appears


@dataclass(frozen=True)
class TrainJob:
    """One model to train.

    `pairs` is a Parquet file or a folder of them, `model` a local model folder, `out` the model folder to write (it
    must not stand yet), `work` the job's own folder for tokens, logs and checkpoints. All lie where every rank reads.
    `tracking` says where the log goes besides; it is no part of what the job is. `chat` is how generation rendered the
    prompts; null: a template without variables, today. `context` is `model.max_model_len`, by which generation chose
    the rotary factors of a model that has two sets. `models` are the trained models of the method's recipe, by name.
    """

    name: str
    pairs: Path
    model: Path
    out: Path
    train: Train
    seed: int
    work: Path
    trust_remote_code: bool = False
    tracking: Tracking = field(default_factory=Tracking)
    cache: Path | None = None
    chat: ChatSettings | None = None
    context: int | None = None
    models: Mapping[str, Path] = field(default_factory=dict)

    @property
    def shared(self) -> Path:
        """The folder for what other jobs can use again: reference log-probs."""
        return self.cache or self.work

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            **{key: str(Path(getattr(self, key)).absolute()) for key in ("pairs", "model", "out", "work")},
            "train": self.train.model_dump(mode="json"),
            "seed": self.seed,
            "trust_remote_code": self.trust_remote_code,
            "tracking": self.tracking.model_dump(mode="json"),
            "cache": None if self.cache is None else str(self.cache.absolute()),
            "chat": None if self.chat is None else self.chat.model_dump(mode="json"),
            "context": self.context,
            "models": {name: str(path.absolute()) for name, path in self.models.items()},
        }

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> TrainJob:
        paths = {key: Path(raw[key]) for key in ("pairs", "model", "out", "work", "cache") if raw.get(key)}
        sections = {
            "train": train_section(raw["train"]),
            "tracking": Tracking.model_validate(raw.get("tracking", {})),
            "chat": None if raw.get("chat") is None else ChatSettings.model_validate(raw["chat"]),
        }
        models = {name: Path(path) for name, path in raw.get("models", {}).items()}
        return cls(**{**raw, **paths, **sections, "models": models})


@dataclass(frozen=True)
class TrainResult:
    """What a job did. `metrics` is its log's last row, `dropped` counts pairs by reason, `pairs` those trained on.

    `warnings` are those of its guards and trackers, in the order of its steps.
    """

    name: str
    model: AnyPath
    steps: int
    pairs: int
    dropped: dict[str, int]
    metrics: dict[str, float]
    seconds: float
    resumed_at: int = 0
    skipped: bool = field(default=False)
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "model": str(self.model)}

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> TrainResult:
        return cls(**{**raw, "model": as_path(raw["model"])})


def read_job(path: Path) -> TrainJob:
    """The job that a JSON file describes. Raises: InputError when it cannot be read or is not a job."""
    try:
        return TrainJob.from_dict(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(f"{path}: not a training job ({e}); write it with TrainJob.to_dict") from e


def write_job(job: TrainJob) -> None:
    """Write the job into its work folder, by rename."""
    partial = job.work / f"{JOB}.partial"
    partial.write_text(json.dumps(job.to_dict(), indent=2))
    os.replace(partial, job.work / JOB)
