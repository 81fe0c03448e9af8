"""Do judges agree? Measures of two judges' scores of the same answers, of verdicts in both orders, and of length.

Takes arrays of scores (prompts, arms), NaN where a judgement failed, and gives numbers, or intervals for which prompts
are drawn with all their answers. No measure here knows what a judge is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spa_ray.evaluation.bootstrap import statistic_interval

Floats = NDArray[np.float64]


def quadratic_kappa(ours: ArrayLike, theirs: ArrayLike) -> float:
    """Quadratic-weighted kappa of two raters (n,): 1 - mean (x - y)² / its mean over independent draws of x and y.

    The scale's width cancels, so any numbers will do. NaN where both give one and the same number to everything.
    """
    x, y = _both(ours, theirs)
    if not len(x) or ((x == x[0]) & (y == x[0])).all():
        return float("nan")
    return float(1 - ((x - y) ** 2).mean() / (x.var() + y.var() + (x.mean() - y.mean()) ** 2))


def spearman(ours: ArrayLike, theirs: ArrayLike) -> float:
    """Spearman's rank correlation (n,), equal values at their mean rank; NaN where one side does not vary."""
    x, y = (_ranks(v) for v in _both(ours, theirs))
    if not len(x) or x.std() == 0 or y.std() == 0:
        return float("nan")
    return float(((x - x.mean()) * (y - y.mean())).mean() / (x.std() * y.std()))


def sign_accuracy(ours: ArrayLike, gold: ArrayLike) -> float:
    """Of the differences (n,) that the gold judge tells from 0, the share with our judge's sign; our tie counts half.

    NaN where the gold judge finds nothing but ties.
    """
    x, y = (np.sign(v) for v in _both(ours, gold))
    told = y != 0
    return float(np.where(x == 0, 0.5, x == y)[told].mean()) if told.any() else float("nan")


def swap_consistency(first: ArrayLike, second: ArrayLike) -> float:
    """Share of comparisons (n,) whose verdict is the same in both orders: 1 one answer, 0 a tie, -1 the other; NaN for
    a failed order, which leaves its comparison out."""
    x, y = _both(first, second)
    return float((x == y).mean()) if len(x) else float("nan")


def agreement(ours: Floats, gold: Floats, *, resamples: int, seed: int) -> dict[str, Any]:
    """`kappa` and `spearman` over all answers that both scored, and `accuracy`: of two answers to one prompt that the
    gold judge tells apart, the share that ours orders alike. Each an interval, null where it does not exist.

    ours, gold (prompts, arms): the same answers in the same places.
    """
    pairs = np.triu_indices(ours.shape[1], 1)
    interval = partial(statistic_interval, resamples=resamples, seed=seed)

    def differences(scores: Floats) -> Floats:
        return scores[:, pairs[0]] - scores[:, pairs[1]]

    return {
        "n": int((np.isfinite(ours) & np.isfinite(gold)).sum()),
        "accuracy": interval(sign_accuracy, differences(ours), differences(gold)),
        "kappa": interval(quadratic_kappa, ours, gold),
        "spearman": interval(spearman, ours, gold),
    }


def judges_agreement(
    scores: Mapping[str, Floats], lengths: Floats, objectives: Sequence[str], *, resamples: int, seed: int
) -> dict[str, Any]:
    """`judges`: judge -> each other judge taken as gold -> objective -> `agreement`; `length`: judge -> objective ->
    Spearman's correlation of its scores with the answers' lengths.

    scores: judge -> (prompts, arms, objectives); lengths (prompts, arms) in tokens.
    """
    draws = {"resamples": resamples, "seed": seed}
    places = dict(enumerate(objectives))
    judges = {
        name: {
            gold: {o: agreement(mine[..., k], theirs[..., k], **draws) for k, o in places.items()}
            for gold, theirs in scores.items()
            if gold != name
        }
        for name, mine in scores.items()
    }
    length = {
        name: {o: statistic_interval(spearman, mine[..., k], lengths, **draws) for k, o in places.items()}
        for name, mine in scores.items()
    }
    return {"judges": judges, "length": length}


def _both(ours: ArrayLike, theirs: ArrayLike) -> tuple[Floats, Floats]:
    """The values of the places where both are finite. Raises: ValueError on other shapes."""
    x, y = (np.asarray(v, dtype=np.float64) for v in (ours, theirs))
    if x.shape != y.shape:
        raise ValueError(f"agreement: shapes {x.shape} and {y.shape}; two judgements of the same answers are needed")
    known = np.isfinite(x) & np.isfinite(y)
    return x[known], y[known]


def _ranks(values: Floats) -> Floats:
    """Ranks from 1, equal values at the mean of theirs."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    ranks: Floats = (last - (count - 1) / 2)[place]
    return ranks
