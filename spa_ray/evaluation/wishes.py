"""Measures of answers to prompts that say which scores an answer should have: win rates against a reference's scores,
strict and by fit; distances to what was asked and what was wished; how far sensed scores are off; steering.

Takes arrays (prompts, objectives), NaN where a prompt has no such score; a measure is NaN there as well. All scores are
in the judge's units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# What a prompt's columns may hold, {NAME: value} each: the reference answer's scores; the scores that it wishes; those
# of the best annotated answer, without noise and with it; its cues; what one `steer.column` reads.
REFERENCE, WISH, TRUE, LABELS, CUES, LEVELS = "reference_scores", "wish", "scores", "labels", "cues", "levels"
COLUMNS = (REFERENCE, WISH, TRUE, LABELS, CUES, LEVELS)
SENSED, ASKED = "sensed", "asked"  # columns of episodes
WIN, FIT = "win rate", "fit win rate"
SENSING, CONSTANT = "sensing error", "constant error"


def wins(scores: Floats, reference: Floats) -> Floats:
    """1 where the score is strictly above the reference's, else 0: a tie is no win (the SGA paper's win rate)."""
    return np.where(np.isfinite(scores) & np.isfinite(reference), scores > reference, np.nan)


def fit_wins(scores: Floats, reference: Floats, wish: Floats) -> Floats:
    """1 where the score is strictly closer to the wished one than the reference's is, else 0."""
    return wins(-off(scores, wish), -off(reference, wish))


def off(scores: Floats, target: Floats) -> Floats:
    """|score - target|."""
    distance: Floats = np.abs(scores - target)
    return distance


def macro(values: Floats) -> Floats:
    """A prompt's mean over the objectives; NaN where one lacks the value."""
    mean: Floats = values.mean(axis=1)
    return mean


def best_constant(truth: Floats) -> Floats:
    """(objectives,): what has the least absolute error of all constants, the medians. NaN where nothing is known."""
    known = truth[np.isfinite(truth).all(axis=1)]
    return np.median(known, axis=0) if len(known) else np.full(truth.shape[1], np.nan)


def measures(scores: Floats, beside: Mapping[str, Floats], objectives: Sequence[str]) -> dict[str, Floats]:
    """Name -> (prompts,). `beside`: COLUMNS, SENSED and ASKED, those that the prompts have.

    `win rate` and `fit win rate` are macro averages, `win rate: NAME` one objective's. `off COLUMN` is the mean
    distance between the answer's scores and a column's, or those that were asked. On prompts with a cue, `sensing
    error` is that of sensed scores to the best annotated answer's, `constant error` that of the best constant for
    these prompts.
    """
    found: dict[str, Floats] = {}
    if REFERENCE in beside:
        found |= _each(WIN, wins(scores, beside[REFERENCE]), objectives)
        if WISH in beside:
            found |= _each(FIT, fit_wins(scores, beside[REFERENCE], beside[WISH]), objectives)
    for name in (WISH, LABELS):
        if name in beside:
            found[f"off {name}"] = macro(off(scores, beside[name]))
    if ASKED in beside:
        found |= _each(f"off {ASKED}", off(scores, beside[ASKED]), objectives)
    if SENSED in beside:
        for suffix, truth in sensing_targets(beside).items():
            found[f"{SENSING}{suffix}"] = macro(off(beside[SENSED], truth))
            found[f"{CONSTANT}{suffix}"] = macro(off(np.broadcast_to(best_constant(truth), truth.shape), truth))
    return {name: values for name, values in found.items() if np.isfinite(values).any()}


def sensing_targets(beside: Mapping[str, Floats]) -> dict[str, Floats]:
    """What sensed scores are compared with, on prompts with a cue: the best annotated answer's scores, and the wish."""
    if CUES not in beside:
        return {}
    cued: NDArray[np.bool_] = np.logical_or.reduce(np.isfinite(beside[CUES]), axis=1, keepdims=True)
    targets = {"": TRUE, f" ({WISH})": WISH}
    return {suffix: np.where(cued, beside[name], np.nan) for suffix, name in targets.items() if name in beside}


def _each(name: str, values: Floats, objectives: Sequence[str]) -> dict[str, Floats]:
    return {name: macro(values), **{f"{name}: {o}": v for o, v in zip(objectives, values.T, strict=True)}}


def error_shares(sensed: Floats, truth: Floats, *, bins: int = 10) -> list[float]:
    """The shares of |s - ŝ| in equal bins of [0, 1], over all prompts and objectives (the SGA paper's Figure 4)."""
    errors = off(sensed, truth)
    counts, _ = np.histogram(errors[np.isfinite(errors)], bins=bins, range=(0, 1))
    return [float(count / max(1, counts.sum())) for count in counts]
