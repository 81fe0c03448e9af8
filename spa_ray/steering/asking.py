"""Which scores a prompt is asked for: what the config says, and for the rest what the model senses or its method wants.

Scores count from 0 to 1 within their ranges here; a method renders them in their own units.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spa_ray.config.steer import Steer, check_values
from spa_ray.errors import InputError
from spa_ray.storage.files import AnyPath, is_file, parquet_dataset
from spa_ray.storage.node_cache import local_folder
from spa_ray.training.method import METHOD, Method, method_of_folder

STEPS = 4  # of `discretize`


@dataclass(frozen=True)
class Asked:
    """What one prompt is asked for, in the order of the method's objectives; null: nothing. `floored` are the names
    that a floor raised."""

    scores: list[float] | None = None
    floored: tuple[str, ...] = ()


def asked_for(
    steer: Steer, names: Sequence[str], meta: str, *, sensed: Sequence[float] | None, wanted: Sequence[float] | None
) -> Asked:
    """What `steer` makes of a prompt whose columns are in `meta`, a JSON text. `wanted` is what the method asks for by
    itself. Floors come last, so they hold."""
    if steer.how == "none":
        return Asked()
    rounded = None if sensed is None else [_rounded(s) if steer.discretize else s for s in sensed]
    rest = rounded if rounded is not None else wanted
    found = {} if rest is None else dict(zip(names, rest, strict=True))
    found |= steer.values if steer.column is None else json.loads(meta)[steer.column]
    floored = tuple(name for name in names if found[name] < steer.floors.get(name, found[name]))
    return Asked([float(max(found[name], steer.floors.get(name, found[name]))) for name in names], floored)


def _rounded(score: float) -> float:
    return round(score * STEPS) / STEPS


def wanted_by(method: Method[Any]) -> list[float] | None:
    """`Method.wanted` as parts of the scores' ranges; in their own units where no range is known."""
    wanted = method.wanted()
    if wanted is None:
        return None
    return [(s - low) / (high - low) for s, (low, high) in zip(wanted, _ranges(method.state), strict=True)]


def in_own(scores: Sequence[float], state: Mapping[str, Any]) -> list[float]:
    """Scores as a method renders them."""
    return [low + s * (high - low) for s, (low, high) in zip(scores, _ranges(state), strict=True)]


def _ranges(state: Mapping[str, Any]) -> Sequence[Sequence[float]]:
    found: Sequence[Sequence[float]] = state["ranges"] or [(0.0, 1.0)] * len(state["objectives"])
    return found


def to_sense(steer: Steer, method: Method[Any]) -> bool:
    """Whether the model has to read the prompts: not where a config says every score."""
    return method.senses and steer.how == "sense" and set(method.state["objectives"]) != set(steer.values)


# --- before anything starts -------------------------------------------------------------------------------------------


def check_names(steer: Steer, objectives: Sequence[str]) -> None:
    """Raises: InputError for a name that is no score of the model."""
    if unknown := sorted(set(steer.names) - set(objectives)):
        raise InputError(f"steer: {unknown[0]!r} is none of the model's scores: {', '.join(objectives)}")


def check_steer(steer: Steer, method: Method[Any]) -> None:
    """Raises: InputError for what a model that was trained by this method cannot be asked."""
    objectives, name = method.state["objectives"], method.config.method
    check_names(steer, objectives)
    if steer.how == "none":
        return
    if (steer.names or steer.column) and not method.state["ranges"]:
        raise InputError(
            f"steer: {name} was trained without the scores' ranges, so values from 0 to 1 mean nothing to it; "
            "set episodes.ranges and train again"
        )
    missing = [each for each in objectives if each not in steer.values]
    if missing and steer.column is None and not method.senses and method.wanted() is None:
        raise InputError(f"steer: {name} senses no scores; say {missing[0]}: VALUE as well")


def check_columns(
    steer: Steer, objectives: Sequence[str], rows: Iterable[tuple[str, str]], *, partial: bool = True
) -> None:
    """The column that `steer` names, in each row's prompt_id and meta. `partial`: objectives may be left out there.

    Raises: InputError for a prompt whose column does not say the scores.
    """
    for prompt_id, meta in rows if steer.column is not None else ():
        found = json.loads(meta).get(steer.column)
        where = f"steer.column: prompt {prompt_id!r}: {steer.column!r}"
        if not isinstance(found, Mapping):
            raise InputError(f"{where} is missing or no mapping; each prompt needs {{NAME: value}} there")
        if unknown := sorted(set(found) - set(objectives)):
            raise InputError(f"{where}: {unknown[0]!r} is none of the model's scores: {', '.join(objectives)}")
        if not partial and len(found) < len(objectives):
            raise InputError(f"{where}: the model senses no scores; give all of {', '.join(objectives)}")
        try:
            check_values(found)
        except ValueError as e:
            raise InputError(f"{where}: {e}") from e


def check_prompts(steer: Steer, method: Method[Any], prompts: AnyPath) -> None:
    """A file of prompts that a model of this method is to answer. Raises: InputError as `check_columns`."""
    alone = not method.senses and method.wanted() is None
    check_columns(steer, method.state["objectives"], columns_of(prompts), partial=not alone)


def columns_of(prompts: AnyPath) -> Iterator[tuple[str, str]]:
    """Each prompt's id and meta."""
    for batch in parquet_dataset(prompts).to_batches(columns=["prompt_id", "meta"]):
        yield from zip(batch["prompt_id"].to_pylist(), batch["meta"].to_pylist(), strict=True)


# --- model folders ----------------------------------------------------------------------------------------------------


def conditioning_of(folder: Path) -> Method[Any] | None:
    """The method of a model folder where its prompts say scores; None of any other."""
    method = method_of_folder(folder)
    return method if method is not None and method.conditioned else None


def conditioning(model: AnyPath) -> Method[Any] | None:
    """`conditioning_of` a folder that may be on an object store: it is fetched where it has a method."""
    return conditioning_of(local_folder(model)) if is_file(model / METHOD) else None
