"""Scores that methods read, or write into prompts: what a pairs table says of them, checked before anything is made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float

from spa_ray.data.schemas import objectives_of, ranges_of
from spa_ray.errors import InputError

PAIR = "pair_id"  # whom an error is about
ROUNDING = 1e-9  # by which a score may leave its range on the way from [0, 1] and back


def named(table: pa.Table, method: str, *, ranges: bool) -> dict[str, Any]:
    """The objectives that a table's scores are of and their [low, high], null where no method needs them.

    Raises: InputError for a table that does not say.
    """
    if b"objectives" not in (table.schema.metadata or {}):
        raise InputError(f"train.method: {method} needs scores with names; train on pairs that `spa build` wrote")
    objectives, found = objectives_of(table.schema), ranges_of(table.schema)
    if found is None and ranges:
        raise InputError(
            f"train.method: {method} needs the scores' ranges, and the pairs record none; set episodes.ranges, say "
            f"{{{objectives[0]}: [0, 4]}}"
        )
    for name, (low, high) in zip(objectives, found or [], strict=found is not None):
        if not -math.inf < low < high < math.inf:
            raise InputError(f"episodes.ranges: {name}: {low:g} to {high:g} is no range; give two numbers, lower first")
    return {"objectives": objectives, "ranges": None if found is None else [list(bounds) for bounds in found]}


def checked(table: pa.Table, column: str, state: Mapping[str, Any]) -> Float[np.ndarray, "pairs k"]:
    """A column of scores. Raises: InputError for a pair without one of them, or with one outside of its range."""
    objectives = state["objectives"]

    def refuse(bad: np.ndarray, why: str) -> None:
        if bad.any():
            pair = table.column(PAIR)[int(np.flatnonzero(bad)[0])].as_py()
            raise InputError(f"pair {pair!r}: {column}: {why}")

    counts = pc.fill_null(pc.list_value_length(table.column(column)), 0).to_numpy()
    refuse(counts != len(objectives), f"one score each is needed of {', '.join(objectives)}")
    scores = pc.list_flatten(table.column(column)).to_numpy().reshape(-1, len(objectives)).astype(np.float64)
    for k, name in enumerate(objectives):
        refuse(~np.isfinite(scores[:, k]), f"{name} has no score; a finite number is needed")
        if state["ranges"] is not None:
            low, high = state["ranges"][k]
            outside = (scores[:, k] < low) | (scores[:, k] > high)
            refuse(outside, f"{name} is outside of its range, {low:g} to {high:g}; correct it, or episodes.ranges")
    return scores


def in_unit(scores: Sequence[float], state: Mapping[str, Any]) -> list[float]:
    """Scores in their own units as parts of their ranges, in [0, 1]. Raises: InputError outside."""
    found = []
    for name, score, (low, high) in zip(state["objectives"], scores, state["ranges"], strict=True):
        part = (score - low) / (high - low)
        if not -ROUNDING <= part <= 1 + ROUNDING:
            raise InputError(f"{name}: {score:g} is outside of its range, {low:g} to {high:g}")
        found.append(min(1.0, max(0.0, part)))
    return found


def shares(weights: Mapping[str, float], objectives: Sequence[str], *, key: str) -> list[float]:
    """The weights in the order of the objectives, divided by their sum; equal ones where none are given.

    Raises: InputError for a name that is no objective, and where all are 0.
    """
    if unknown := sorted(set(weights) - set(objectives)):
        raise InputError(f"{key}: {unknown[0]!r} is not one of the objectives {list(objectives)}")
    given = [weights.get(name, 0.0) for name in objectives] if weights else [1.0] * len(objectives)
    total = math.fsum(given)
    if total <= 0:
        raise InputError(f"{key}: all are 0; give one of {', '.join(objectives)} a weight")
    return [weight / total for weight in given]


def last_turn(messages: Sequence[Mapping[str, str]], *, before: str = "", behind: str = "") -> list[dict[str, str]]:
    """The messages with text before and behind the last one's."""
    *earlier, last = messages
    return [*map(dict, earlier), {**last, "content": before + last["content"] + behind}]
