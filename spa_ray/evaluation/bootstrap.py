"""Percentile bootstrap over prompts: the interval of a mean, and of a paired difference of two means.

Comes in: one number a prompt. Goes out: an `Interval`. Never: unseeded randomness: the same seed gives the
same interval.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    rng = np.random.default_rng(seed)
    step = max(1, BUDGET // len(x))
    means = [
        x[rng.integers(0, len(x), size=(min(step, resamples - start), len(x)))].mean(axis=1)
        for start in range(0, resamples, step)
    ]
    tail = (1 - level) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return Interval(float(x.mean()), float(low), float(high), len(x))


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


def _column(values: ArrayLike, where: str) -> NDArray[np.float64]:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or x.size == 0:
        raise ValueError(f"{where}: shape {x.shape}; one value for each of at least one prompt is needed")
    if not np.isfinite(x).all():
        raise ValueError(f"{where}: a value is not finite; leave such prompts out first")
    return x
