"""What a stage is handed: its folder, its inputs by role, who uses it; and what all stages of one command share."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from typing import Any

from spa_ray.config.models import Config
from spa_ray.generation.budget import Meter
from spa_ray.pipeline.progress import Progress
from spa_ray.pipeline.stage_keys import Known
from spa_ray.rollout.settings import ChatSettings
from spa_ray.storage.files import AnyPath
from spa_ray.storage.folder import StageFolder


@dataclass
class Work:
    """One stage to be worked on. `inputs` are files and folders by role (`prompts`, `model`, `episodes`, …)."""

    stage: StageFolder
    config: Config
    inputs: Mapping[str, AnyPath | None]
    known: Known = field(default_factory=Known)
    arms: dict[str, Config] = field(default_factory=dict)  # all that use its output, the first of them `config`'s
    facts: Mapping[str, Any] = field(default_factory=dict)  # what is known before it runs, for its `stage.json`
    out: AnyPath | None = None  # training: the model folder, where it is not in the stage's own

    @property
    def name(self) -> str:
        """The first arm that uses it."""
        return next(iter(self.arms), self.config.name)

    def input(self, role: str) -> AnyPath:
        found = self.inputs[role]
        assert found is not None
        return found


def meter_of(config: Config, root: AnyPath) -> Meter:
    """What the run in this folder spends."""
    return Meter(root / "spent", config.budget, config.resources.price_per_gpu_hour)


@dataclass(frozen=True)
class Context:
    """What the stages of one command have in common. `root` is the run's folder, or the one that the user named."""

    progress: Progress
    verbose: bool
    day: date
    chat: ChatSettings
    root: AnyPath
    meter: Meter
    passes: AnyPath  # where the rows of an evaluation of several models are kept until it is done
    cache: AnyPath | None = None  # what training jobs with the same model and pairs share

    def finish(self, work: Work, started: float, **facts: Any) -> None:
        """Write the stage's record, last of all. `started` is a `time.time()`."""
        self.progress.finished(work.stage.folder)
        record = work.stage.finish(started, **work.facts, **facts)
        logging.getLogger(__name__).info("stage finished", extra={"stage": work.stage.name, "facts": record})
