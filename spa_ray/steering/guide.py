"""One conversation with a conditioned model: each turn is sensed, asked for scores and rendered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from spa_ray.config.models import Config
from spa_ray.errors import InputError
from spa_ray.steering.asking import asked_for, check_steer, conditioning_of, in_own, to_sense, wanted_by
from spa_ray.steering.sensor import Sensor

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Told:
    """Of one turn, by name: what was sensed and what was asked for; empty where nothing was."""

    sensed: Mapping[str, float]
    asked: Mapping[str, float]


class Guide:
    """A model folder's method, and its head where `steer` leaves something to sense."""

    def __init__(self, config: Config, folder: Path) -> None:
        method = conditioning_of(folder)
        assert method is not None
        self._method, self._steer = method, config.steer
        self._wanted = wanted_by(self._method)
        senses = to_sense(self._steer, self._method)
        self._sensor = Sensor(config.model, folder, self._method) if senses else None

    def read(self, messages: Messages, meta: str = "{}") -> tuple[Messages, Told]:
        """What the model reads, and why; `meta` is a prompt's columns. Raises: ValueError for what cannot be read."""
        state, sensed = self._method.state, None
        if self._sensor is not None:
            (found,) = self._sensor.sense([messages])
            if isinstance(found, str):
                raise ValueError(found)
            sensed = found
        names = state["objectives"]
        asked = asked_for(self._steer, names, meta, sensed=sensed, wanted=self._wanted).scores
        told = Told(*({} if scores is None else dict(zip(names, scores, strict=True)) for scores in (sensed, asked)))
        if asked is None:
            return messages, told
        return self._method.render([dict(m) for m in messages], in_own(asked, state), state), told


def check_conversation(config: Config, folder: Path) -> None:
    """Before a model is loaded to be talked to. Raises: InputError where it cannot be asked for what `steer` says."""
    method = conditioning_of(folder)
    if method is None:
        raise InputError(f"steer: {folder}: its prompts say no scores; give a model that was trained on such prompts")
    if config.steer.column is not None:
        raise InputError("steer.column: a conversation has no columns; say NAME=VALUE")
    check_steer(config.steer, method)
