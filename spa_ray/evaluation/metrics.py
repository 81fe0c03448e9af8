"""Metrics of scores: HH_λ, the RV coefficient, wins and losses.

Comes in: NumPy arrays of finite scores, higher is better. Goes out: numbers. Never: judges, models, files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


@overload
def hh_lambda(primary: float, secondary: float, lam: float) -> float: ...
@overload
def hh_lambda(primary: Floats, secondary: Floats, lam: float) -> Floats: ...
def hh_lambda(primary: float | Floats, secondary: float | Floats, lam: float) -> float | Floats:
    """HH_λ = (λ·S_primary + S_secondary) / (λ + 1), for λ > 0 (SPA, Table 3); elementwise on arrays.

    Linear, so the HH_λ of two means is the mean of the prompts' HH_λ. Raises: ValueError for λ <= 0.
    """
    if lam <= 0:
        raise ValueError(f"hh_lambda: lam is {lam}, it must be above 0")
    return (lam * primary + secondary) / (lam + 1)


def rv_coefficient(X: ArrayLike, Y: ArrayLike) -> float:
    """RV coefficient of two score matrices over the same m rows (SPA, informativeness; Escoufier 1973).

    X (m, p), Y (m, q) -> tr(S_xy S_yx) / sqrt(tr(S_xx²) tr(S_yy²)) in [0, 1], with columns centred and S_xy = XᵀY.
    NaN when X or Y has no variance at all: the coefficient does not exist then.
    Raises: ValueError when the rows do not match, there are none, or a score is not finite.
    """
    x, y = (np.asarray(m, dtype=np.float64) for m in (X, Y))
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or len(x) == 0:
        raise ValueError(f"rv_coefficient: shapes {x.shape} and {y.shape}; two matrices with the same rows are needed")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("rv_coefficient: a score is not finite; leave such rows out first")
    if (x == x[0]).all() or (y == y[0]).all():
        return float("nan")
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    cross, own_x, own_y = x.T @ y, x.T @ x, y.T @ y
    return float(np.sum(cross**2) / np.sqrt(np.sum(own_x**2) * np.sum(own_y**2)))


@dataclass(frozen=True)
class Outcome:
    """Wins, ties and losses of one answer set against another, prompt by prompt."""

    wins: int
    ties: int
    losses: int

    @property
    def win_rate(self) -> float:
        """(W + T/2) / N (ALGORITHMS 4). Raises: ValueError when nothing was compared."""
        if not (n := self.wins + self.ties + self.losses):
            raise ValueError("win_rate: nothing was compared")
        return (self.wins + self.ties / 2) / n


def win_tie_loss(ours: ArrayLike, theirs: ArrayLike) -> Outcome:
    """Compare two arrays of scores (n,) of the same prompts. Raises: ValueError on other shapes, non-finite scores."""
    a, b = (np.asarray(v, dtype=np.float64) for v in (ours, theirs))
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(
            f"win_tie_loss: shapes {a.shape} and {b.shape}; two score arrays of the same prompts are needed"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("win_tie_loss: a score is not finite; leave such prompts out first")
    return Outcome(int((a > b).sum()), int((a == b).sum()), int((a < b).sum()))
