"""Score columns as dense arrays, and the determinant of their covariance.

Comes in: an Arrow `scores` column, list<list<double>>, one inner list a response. Goes out: `ScoreGrid` arrays laid out
(objective, position, prompt), so that every later step is a few operations on contiguous vectors of prompts.
Never: a loop over prompts; a missing score never becomes a number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from spa_ray.errors import InputError

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Matrix = list[list[NDArray[Any]]]  # k by k, each entry one value a prompt

# Real-valued scores: det Σ at or below this share of the product of the variances counts as zero (ALGORITHMS 1.5).
FLOAT_ZERO = 1e-6
# Largest magnitude up to which float64 arithmetic on integers is exact.
EXACT = 2.0**53


@dataclass(frozen=True)
class ScoreGrid:
    """Scores of N prompts with at most L responses each, k objectives.

    values: (k, L, N), 0 where `scored` is false. scored: (L, N), true where the response has all of its k scores.
    lengths: (N,) responses of each prompt.
    """

    values: Floats
    scored: Bools
    lengths: Ints

    @property
    def starts(self) -> Ints:
        """(N,) position of each prompt's first response in the flat list of responses."""
        return np.cumsum(self.lengths) - self.lengths

    def scatter(self, flat: Bools) -> Bools:
        """One flag a response (M,), in row order, as an (L, N) grid; false where there is no response."""
        rows, positions = _places(self.lengths)
        out = np.zeros(self.scored.shape, dtype=bool)
        out[positions, rows] = flat
        return out


def score_grid(column: pa.Array | pa.ChunkedArray, objectives: int) -> ScoreGrid:
    """Lay a `scores` column out densely.

    A response whose list is null or empty, or holds a null or a non-finite number, is not scored.
    Raises: InputError when a response has another number of scores than there are objectives.
    """
    outer = _one_array(column)
    lengths = list_lengths(outer)
    inner = outer.flatten()
    per_response = list_lengths(inner)
    present = per_response > 0
    wrong = np.flatnonzero(present & (per_response != objectives))
    if wrong.size:
        row = int(np.searchsorted(np.cumsum(lengths), wrong[0], side="right"))
        raise InputError(
            f"scores: row {row} has a response with {per_response[wrong[0]]} scores, the config names {objectives} "
            "objectives; build with the objectives that the episodes were scored on"
        )
    found = pc.cast(inner.flatten(), pa.float64()).to_numpy(zero_copy_only=False).reshape(-1, objectives)
    if present.all():
        flat = found
    else:
        flat = np.full((len(per_response), objectives), np.nan)
        flat[present] = found
    return _dense(flat, lengths)


def _dense(flat: Floats, lengths: Ints) -> ScoreGrid:
    k, rows = flat.shape[1], len(lengths)
    longest = int(lengths.max(initial=0))
    if rows and (lengths == longest).all():
        values = np.ascontiguousarray(flat.reshape(rows, longest, k).transpose(2, 1, 0))
    else:
        values = np.full((k, longest, rows), np.nan)
        row, position = _places(lengths)
        values[:, position, row] = flat.T
    scored: Bools = np.logical_and.reduce(np.isfinite(values))
    return ScoreGrid(np.where(scored, values, 0.0), scored, lengths)


def _places(lengths: Ints) -> tuple[Ints, Ints]:
    """Row and position of every response of the flat list."""
    rows = np.repeat(np.arange(len(lengths)), lengths)
    return rows, np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def list_lengths(array: pa.Array) -> Ints:
    """(N,) lengths of the lists; a null list has length 0."""
    return pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False).astype(np.int64)


def _one_array(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def covariance_det(values: Floats, mask: Bools, *, ddof: int) -> Floats:
    """det Σ of each prompt's scores (SPA, Eq. 1): values (k, L, N), mask (L, N) -> (N,).

    Only responses with `mask` count. NaN where fewer than k + 1 are left: k points or fewer always lie in a hyperplane.
    Exactly 0.0 where Σ is singular. For integer scores that is decided in exact arithmetic on n²·Σ; for real-valued
    ones by det Σ <= 1e-6 · product of the variances. Scores are first shifted by their minimum, which leaves Σ as it is
    and keeps n·Σd² - (Σd)² free of cancellation.
    """
    k = len(values)
    n = mask.sum(axis=0)
    lowest = np.where(mask, values, np.inf).min(axis=1, initial=np.inf)
    shifted = np.where(mask, values - np.where(np.isfinite(lowest), lowest, 0.0)[:, None], 0.0)
    scatter = _scatter_matrix(shifted, n)
    det = _psd_det(scatter)
    whole = ((values == np.rint(values)).all(axis=0) | ~mask).all(axis=0)
    diagonal = [scatter[o][o] for o in range(k)]
    with np.errstate(over="ignore"):
        beyond = whole & (2.0 * np.maximum.reduce(diagonal) ** (2 * (k - 1)) >= EXACT)
    if beyond.any():
        unbounded = _scatter_matrix(shifted[:, :, beyond].astype(np.int64).astype(object), n[beyond])
        det[beyond] = _psd_det(unbounded, whole=True).astype(np.float64)
    singular = ~whole & (det <= FLOAT_ZERO * np.multiply.reduce(diagonal))
    det = np.where(singular, 0.0, det) / (n * (n - ddof)).clip(min=1).astype(np.float64) ** k
    return np.where(n > k, det, np.nan)


def _scatter_matrix(shifted: NDArray[Any], n: Ints) -> Matrix:
    """n·Σ_i d_o d_p - Σ_i d_o · Σ_i d_p for all objectives o, p; each (N,). Sums run over positions in order."""
    k, positions, _ = shifted.shape
    zero = np.zeros(len(n), dtype=shifted.dtype)
    sums = [sum((shifted[o, i] for i in range(positions)), zero) for o in range(k)]
    matrix: Matrix = [[zero] * k for _ in range(k)]
    for o in range(k):
        for p in range(o, k):
            products = sum((shifted[o, i] * shifted[p, i] for i in range(positions)), zero)
            matrix[o][p] = matrix[p][o] = n * products - sums[o] * sums[p]
    return matrix


def _psd_det(matrix: Matrix, *, whole: bool = False) -> NDArray[Any]:
    """Determinants of many positive semi-definite matrices by Bareiss's fraction-free elimination.

    Every intermediate value is a minor, hence an integer for an integer matrix. No pivoting: a zero pivot of a positive
    semi-definite matrix makes the determinant 0. `whole`: entries are Python integers in object arrays.
    """
    m = [list(row) for row in matrix]
    k = len(m)
    previous = np.ones_like(m[0][0])
    singular = np.zeros(m[0][0].shape, dtype=bool)
    for step in range(k - 1):
        pivot = m[step][step]
        singular |= (pivot <= 0).astype(bool)
        for o in range(step + 1, k):
            for p in range(o, k):
                numerator = m[o][p] * pivot - m[o][step] * m[step][p]
                m[o][p] = m[p][o] = numerator // previous if whole else numerator / previous
        previous = np.where(singular, 1, pivot)
    return np.where(singular, 0, m[-1][-1])
