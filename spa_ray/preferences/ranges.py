"""The ranges of scores: which hold for a table, scores as parts of them, and scores outside of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from spa_ray.config.models import Config
from spa_ray.data.schemas import Ranges, ranges_of, with_ranges
from spa_ray.errors import InputError
from spa_ray.preferences.scores import Bools, Floats


def ranged(schema: pa.Schema, config: Config) -> pa.Schema:
    """A table's schema with the ranges of its scores: `episodes.ranges`, else what it says already, if anything.

    Raises: InputError where one is missing that is needed.
    """
    given, names = config.episodes.ranges, config.objectives
    known = {**dict(zip(names, ranges_of(schema) or (), strict=False)), **(given or {})}
    if given and (missing := [name for name in names if name not in known]):
        raise InputError(f"episodes.ranges: {missing[0]!r} has none; give [lowest, highest] of every objective")
    found = with_ranges(schema, [known[name] for name in names] if given else None)
    if config.pairs.order == "mean" and ranges_of(found) is None:
        raise InputError(f"pairs.order: mean needs the scores' ranges; set episodes.ranges, say {{{names[0]}: [1, 5]}}")
    return found


def in_unit(scores: Floats, ranges: Ranges) -> Floats:
    """(k, L, N) scores as parts of their ranges."""
    low, high = np.array(ranges, dtype=np.float64).T[:, :, None, None]
    parts: Floats = (scores - low) / (high - low)
    return parts


def check_ranges(scores: Floats, usable: Bools, ranges: Ranges, names: Sequence[str], prompt_id: pa.Array) -> None:
    """Raises: InputError naming the first of the usable (k, L, N) scores that is outside of its range."""
    for name, values, (low, high) in zip(names, scores, ranges, strict=True):
        row, position = np.nonzero((usable & ((values < low) | (values > high))).T)
        if row.size:
            raise InputError(
                f"episodes: prompt_id {prompt_id[row[0]].as_py()!r}, response {position[0]}: {name} is "
                f"{values[position[0], row[0]]:g}, outside of its range, {low:g} to {high:g}; correct episodes.ranges"
            )
