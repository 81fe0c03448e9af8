"""What comes in front of a pass's engines where a model's prompts say which scores an answer is to have.

A second pool of actors adds to each row the columns STEERED and, where its prompt cannot be read, `refused`; the
engine's actor then renders what the row's model reads. `spa_ray.steering`, which knows training methods, fills this in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.data import ActorPoolStrategy

REFUSED = "refused"  # why a row's prompt was not read; null: it was
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Upstream:
    """`actor(*arguments, ledger)` is a class for `map_batches`, over Arrow tables. `render(folder, messages, asked)` is
    what the model of that folder reads where these scores are asked for. `attributes` are their names, where all models
    of the pass have the same."""

    actor: type
    arguments: tuple[Any, ...]
    render: Callable[[Path, Sequence[Mapping[str, str]], Sequence[float]], Messages]
    attributes: Sequence[str] | None = None
    gpus: float = 0.0  # of each actor

    def pool(self, most: int) -> dict[str, Any]:
        """Arguments of `map_batches` for at most so many actors. They ask for no logical CPU: where there are as many
        as engines and tasks need, the pass must not wait."""
        size = ActorPoolStrategy(min_size=1, max_size=most)
        return {"compute": size, "num_cpus": 0, **({"num_gpus": self.gpus} if self.gpus else {})}

    def read_by(self, model: Path, row: Mapping[str, Any]) -> Callable[[Sequence[Mapping[str, str]]], Messages] | None:
        """The row's `render`; None where its model reads messages as they are."""
        asked = row["asked"]
        return None if asked is None else lambda messages: self.render(model, messages, asked)
