"""The actors in front of a pass's engines: each senses with the row's model and decides what the row is asked for.

`upstream_of` looks at the models of a pass: where none is conditioned on scores there is nothing to put in front. Rows
may name their model (`model`) and their own `steer`, as JSON. Never: an engine.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa

from spa_ray.config.models import Config, Model
from spa_ray.config.steer import Steer
from spa_ray.data.schemas import STEERED
from spa_ray.engine.placement import takes_all_cores
from spa_ray.errors import InputError
from spa_ray.generation.follow import Line
from spa_ray.generation.upstream import REFUSED, Messages, Upstream
from spa_ray.steering.asking import (
    Asked,
    asked_for,
    check_prompts,
    check_steer,
    conditioning,
    conditioning_of,
    in_own,
    to_sense,
    wanted_by,
)
from spa_ray.steering.sensor import Sensor
from spa_ray.storage.files import AnyPath, as_path
from spa_ray.storage.node_cache import local_folder
from spa_ray.training.method import Method

Said = tuple[list[float] | None, Asked, str | None]  # of a row: what was sensed, what is asked for, why it is refused
STEER = "steer"  # a row's column: its work's section as JSON


@dataclass(frozen=True)
class Steering:
    """What every actor knows. `model` and `steer` are those of rows that do not say."""

    section: Model
    model: AnyPath
    steer: Steer
    day: date | None
    device: str
    all_cores: bool


class SteeringActor:
    """A class for `map_batches`. Holds one model at a time."""

    def __init__(self, how: Steering, ledger: Line | None) -> None:
        self._how, self._ledger = how, ledger
        self._loaded: tuple[Path, Sensor] | None = None
        if how.all_cores:  # before the first library that computes is loaded
            os.environ["OMP_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))

    def __call__(self, batch: pa.Table) -> pa.Table:
        try:
            said = self._of(batch.to_pylist())
        except InputError as e:
            if self._ledger is not None:
                self._ledger.ask("word", "input", str(e))
            raise
        columns = {
            "sensed": [sensed for sensed, _, _ in said],
            "asked": [asked.scores for _, asked, _ in said],
            "floored": [None if asked.scores is None else list(asked.floored) for _, asked, _ in said],
        }
        for field in STEERED:
            batch = batch.append_column(field, pa.array(columns[field.name], field.type))
        return batch.append_column(REFUSED, pa.array([why for *_, why in said], pa.string()))

    def _of(self, rows: list[dict[str, Any]]) -> list[Said]:
        """Rows of one model and one section together."""
        found: list[Said] = [(None, Asked(), None)] * len(rows)
        groups: dict[tuple[str, str], list[int]] = {}
        for at, row in enumerate(rows):
            groups.setdefault((row.get("model") or "", row.get(STEER) or ""), []).append(at)
        for (model, section), places in groups.items():
            folder = local_folder(as_path(model) if model else self._how.model)
            steer = Steer.model_validate_json(section) if section else self._how.steer
            for at, said in zip(places, self._group(folder, steer, [rows[at] for at in places]), strict=True):
                found[at] = said
        return found

    def _group(self, folder: Path, steer: Steer, rows: list[dict[str, Any]]) -> list[Said]:
        method = _known(folder)
        if method is None:
            return [(None, Asked(), None)] * len(rows)
        names, wanted = method.state["objectives"], wanted_by(method)
        sensed: list[Any] = [None] * len(rows)
        if to_sense(steer, method):
            sensed = self._sensor(folder, method).sense([row["messages"] for row in rows])
        return [
            (None, Asked(), scores) if isinstance(scores, str)
            else (scores, asked_for(steer, names, row["meta"], sensed=scores, wanted=wanted), None)
            for row, scores in zip(rows, sensed, strict=True)
        ]  # fmt: skip

    def _sensor(self, folder: Path, method: Method[Any]) -> Sensor:
        if self._loaded is None or self._loaded[0] != folder:
            self._loaded = None
            gc.collect()  # two models at once may be too much
            sensor = Sensor(self._how.section, folder, method, day=self._how.day, device=self._how.device)
            self._loaded = folder, sensor
        return self._loaded[1]


def render(folder: Path, messages: Sequence[Mapping[str, str]], asked: Sequence[float]) -> Messages:
    """What the model of a folder reads where these scores are asked for."""
    method = _known(folder)
    assert method is not None
    return method.render([dict(m) for m in messages], in_own(asked, method.state), method.state)


_known = lru_cache(maxsize=64)(conditioning_of)  # of actors, whose models do not change


def upstream_of(
    config: Config, uses: Sequence[tuple[AnyPath, Steer]], *, prompts: AnyPath, day: date | None, alone: bool = False
) -> Upstream | None:
    """What comes in front of the engines of a pass over `prompts` by these models, each under its `steer`; None where
    no model of them is conditioned on scores. Without a name in a row it is the first use's. `alone`: without engines
    beside it, whose cores it must leave them.

    Raises: InputError for what a model cannot be asked.
    """
    found = [(method, steer) for model, steer in uses if (method := conditioning(model)) is not None]
    if not found:
        return None
    for method, steer in found:
        check_steer(steer, method)
        check_prompts(steer, method, prompts)
    names = {tuple(method.state["objectives"]) for method, _ in found}
    gpus = config.resources.gpus_per_sensor
    cores = alone and takes_all_cores(config.resources, gpus=gpus, environment=os.environ)
    model, steer = uses[0]
    how = Steering(config.model, model, steer, day, "cuda" if gpus else "cpu", cores)
    return Upstream(SteeringActor, (how,), render, next(iter(names)) if len(names) == 1 else None, gpus)


def as_json(steer: Steer) -> str:
    """As rows say it."""
    return json.dumps(steer.model_dump(mode="json"), sort_keys=True)
