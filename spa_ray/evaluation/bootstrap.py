"""Percentile bootstrap over prompts: the interval of a mean, of a paired difference of two means, of a ratio, and of
any other statistic.

Comes in: one number a prompt, two for a ratio. Goes out: an `Interval`. Never: unseeded randomness: the same seed
gives the same interval.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Resampled values held in memory at once, 8 bytes each.
BUDGET = 2**22


@dataclass(frozen=True)
class Interval:
    """A mean over n prompts and its percentile interval."""

    mean: float
    low: float
    high: float
    n: int


def mean_interval(values: ArrayLike, *, resamples: int, seed: int, level: float = 0.95) -> Interval:
    """Mean of values (n,), one a prompt, with its percentile bootstrap interval.

    Prompts are drawn with replacement `resamples` times. Raises: ValueError for no values, a non-finite one, or
    another shape.
    """
    x = _column(values, "mean_interval")
    means = [x[drawn].mean(axis=1) for drawn in _draws(len(x), resamples, seed)]
    return _interval(float(x.mean()), means, level, len(x))


def paired_difference(
    ours: ArrayLike, theirs: ArrayLike, *, resamples: int, seed: int, level: float = 0.95
) -> Interval:
    """Mean of ours - theirs over the same prompts (n,), with its interval: every draw takes both scores of a prompt.

    Raises: ValueError as `mean_interval`, and when the shapes differ.
    """
    a, b = _column(ours, "paired_difference"), _column(theirs, "paired_difference")
    if a.shape != b.shape:
        raise ValueError(f"paired_difference: {len(a)} and {len(b)} values; one of each for every prompt is needed")
    return mean_interval(a - b, resamples=resamples, seed=seed, level=level)


def ratio_interval(parts: ArrayLike, wholes: ArrayLike, *, resamples: int, seed: int, level: float = 0.95) -> Interval:
    """sum(parts) / sum(wholes), one of each for n prompts: the prompts are drawn, what belongs to one stays together.

    Raises: ValueError as `mean_interval`, when the shapes differ, or a whole is not above 0.
    """
    a, b = _column(parts, "ratio_interval"), _column(wholes, "ratio_interval")
    if a.shape != b.shape or (b <= 0).any():
        raise ValueError(f"ratio_interval: {len(a)} parts and {len(b)} wholes; one of each, wholes above 0, are needed")
    ratios = [a[drawn].sum(axis=1) / b[drawn].sum(axis=1) for drawn in _draws(len(a), resamples, seed)]
    return _interval(float(a.sum() / b.sum()), ratios, level, len(a))


def statistic_interval(
    statistic: Callable[..., float], *columns: ArrayLike, resamples: int, seed: int, level: float = 0.95
) -> Interval | None:
    """A statistic of columns (n, ...) with its interval: prompts are drawn, and all that belongs to one stays together.

    A prompt that has no place where all columns are finite is left out, and so are resamples in which the statistic
    does not exist (NaN). None where it does not exist for the columns themselves.
    """
    arrays = [np.asarray(column, dtype=np.float64) for column in columns]
    known = np.asarray(np.isfinite(np.stack(arrays)).all(axis=0))
    arrays = [a[known.reshape(len(known), -1).any(axis=1)] for a in arrays]
    value, n = statistic(*arrays), len(arrays[0])
    if not n or not np.isfinite(value):
        return None
    drawn = (statistic(*(a[places] for a in arrays)) for draws in _draws(n, resamples, seed) for places in draws)
    found = np.fromiter(drawn, dtype=np.float64, count=resamples)
    return _interval(value, [found[np.isfinite(found)]], level, n)


def as_json(tree: Any) -> Any:
    """The same mappings with every `Interval` as one too."""
    if isinstance(tree, Mapping):
        return {key: as_json(value) for key, value in tree.items()}
    return asdict(tree) if isinstance(tree, Interval) else tree


def _draws(n: int, resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Places of n prompts drawn with replacement, (some resamples, n) at a time."""
    rng = np.random.default_rng(seed)
    step = max(1, BUDGET // n)
    for start in range(0, resamples, step):
        yield rng.integers(0, n, size=(min(step, resamples - start), n))


def _interval(mean: float, resampled: list[NDArray[np.float64]], level: float, n: int) -> Interval:
    tail = (1 - level) / 2
    low, high = np.quantile(np.concatenate(resampled), [tail, 1 - tail])
    return Interval(mean, float(low), float(high), n)


def _column(values: ArrayLike, where: str) -> NDArray[np.float64]:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or x.size == 0:
        raise ValueError(f"{where}: shape {x.shape}; one value for each of at least one prompt is needed")
    if not np.isfinite(x).all():
        raise ValueError(f"{where}: a value is not finite; leave such prompts out first")
    return x
