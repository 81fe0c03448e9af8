"""Denoising (SPA, step 3): which prompts are kept, and why the others are not.

Comes in: episodes (spa_ray.data.schemas.EPISODES) and one arm's Config. Goes out: the same table with `det`, `kept` and
`drop_reason`. Never: Ray, models, or a change to a row; a prompt is dropped for the first reason of `DROP_REASONS`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from spa_ray.config.models import Config
from spa_ray.errors import InputError
from spa_ray.preferences.scores import Bools, Floats, ScoreGrid, covariance_det, list_lengths, score_grid

# In the order in which they are tested; `no_pair` follows in the funnel, once pairs are built.
DROP_REASONS = ("duplicate", "error", "too_few_scores", "inconsistent", "zero_det", "high_det")

Column: TypeAlias = pa.Array | pa.ChunkedArray


def resolve_tau(scores: Column | Iterable[Column], config: Config) -> float | None:
    """τ, the upper bound of det Σ (SPA, section on informativeness), over a whole data set's `scores` column.

    `denoise.tau` where it is set; else the `denoise.tau_quantile` (linear interpolation) of det Σ over all scored
    prompts before the consistency rule, the positive ones only or, with `tau_over: all`, the zeros too. None, no upper
    bound, when the informativeness filter or the quantile is off, or when there is no det to take a quantile of.

    The column says neither kind nor error, so the answer in a row's last position is taken for the refined one, and
    rows with fewer answers than the longest row lack it and are left out, as are prompts with fewer than objectives + 1
    scored candidates or an unscored refined answer. An iterable of pieces is read once. Kept are 8 bytes for every
    prompt whose det counts; joining them at the end takes as much again.
    """
    rule = config.denoise
    if not rule.informativeness:
        return None
    if rule.tau is not None or rule.tau_quantile is None:
        return rule.tau
    pieces = (scores,) if isinstance(scores, pa.Array | pa.ChunkedArray) else scores
    dets: list[Floats] = []
    longest = 0
    for piece in pieces:
        grid = score_grid(piece, len(config.objectives))
        refined = np.arange(len(grid.scored))[:, None] == grid.lengths - 1
        det = covariance_det(grid.values, grid.scored & ~refined, ddof=rule.ddof)
        usable = (grid.scored & refined).any(axis=0) & ~np.isnan(det)
        length = int(grid.lengths[usable].max(initial=0))
        if length > longest:  # what came so far lacks a refined answer
            longest, dets = length, []
        counts = usable & (grid.lengths == longest)
        dets.append(det[counts & (det > 0) if rule.tau_over == "positive" else counts])
    if not any(map(len, dets)):
        return None
    return float(np.quantile(np.concatenate(dets), rule.tau_quantile, overwrite_input=True))


def denoise(episodes: pa.Table, config: Config, *, tau: float | None) -> pa.Table:
    """Mark every prompt as kept or dropped: adds `det: double`, `kept: bool`, `drop_reason: string` (null when kept).

    det Σ is over the scored candidates, the refined answer excluded (SPA, Eq. 1); null with fewer than objectives + 1
    of them. Reasons, the first that holds:
      duplicate       another row of this table has the same prompt_id; the one without error, else of the latest
                      attempt, else the first stays. Rows of one prompt must therefore reach this function together.
      error           generation recorded one.
      too_few_scores  fewer than objectives + 1 scored candidates, or no scored refined answer; of given answers
                      (`episodes.source`) fewer than 2. It holds whatever the other rules are set to.
      inconsistent    `strict`: the refined answer is not above every scored candidate on every objective; `primary_ge`:
                      it may tie on the first; `total`: the sum of its scores is not above every candidate's. Not a
                      reason with `off` or `on_inconsistent: drop_refined`; with the latter `build_pairs` leaves the
                      refined answer out.
      zero_det        det Σ = 0. Only with `informativeness`.
      high_det        det Σ > tau. Only with `informativeness`; never when tau is None.
    Raises: InputError when a column is missing, when the table was scored on other objectives, or when a row's parts
    do not fit together.
    """
    view = view_episodes(episodes, config)
    rule = config.denoise
    k = len(config.objectives)
    det = covariance_det(view.grid.values, view.candidates, ddof=rule.ddof)
    count, given = view.candidates.sum(axis=0), config.episodes.source is not None
    too_few = count < 2 if given else (count < k + 1) | ~view.scored_refined.any(axis=0)
    dropped_if_inconsistent = rule.on_inconsistent == "drop_prompt"
    with np.errstate(invalid="ignore"):
        failing = {
            "duplicate": _repeated(episodes),
            "error": pc.is_valid(episodes["error"]).to_numpy(),
            "too_few_scores": too_few,
            "inconsistent": ~consistent(view, config) & dropped_if_inconsistent,
            "zero_det": (det <= 0) & rule.informativeness,
            "high_det": (det > (np.inf if tau is None else tau)) & rule.informativeness,
        }
    code = np.select([failing[reason] for reason in DROP_REASONS], range(len(DROP_REASONS)), default=-1)
    kept = code < 0
    reason = pa.array(DROP_REASONS).take(pa.array(code, mask=kept))
    return (
        episodes.append_column("det", pa.array(det, from_pandas=True))
        .append_column("kept", pa.array(kept))
        .append_column("drop_reason", reason)
    )


@dataclass(frozen=True)
class EpisodeView:
    """The parts of a table of episodes that filters and pairs read. `refined`: (L, N), true at the refined answer."""

    grid: ScoreGrid
    refined: Bools

    @property
    def candidates(self) -> Bools:
        """(L, N) the scored candidates."""
        return self.grid.scored & ~self.refined

    @property
    def scored_refined(self) -> Bools:
        """(L, N) the refined answer where it is scored."""
        return self.grid.scored & self.refined


def view_episodes(episodes: pa.Table, config: Config) -> EpisodeView:
    """Scores and kinds of all responses as grids. Raises: InputError (see `denoise`)."""
    _check_table(episodes, config)
    grid = score_grid(episodes["scores"], len(config.objectives))
    chunks = episodes["responses"].chunks
    counts = np.concatenate([list_lengths(c) for c in chunks]) if chunks else np.zeros(0, np.int64)
    wrong = np.flatnonzero(counts != grid.lengths)
    if wrong.size:
        row = wrong[0]
        raise InputError(
            f"episodes: prompt_id {episodes['prompt_id'][row].as_py()!r} has {counts[row]} responses but "
            f"{grid.lengths[row]} score lists; the file is damaged, generate it again"
        )
    kinds = [pc.fill_null(pc.equal(c.flatten().field("kind"), "refined"), False) for c in chunks]
    flat = np.concatenate([k.to_numpy(zero_copy_only=False) for k in kinds]) if kinds else np.zeros(0, bool)
    refined = grid.scatter(flat)
    twice = np.flatnonzero(refined.sum(axis=0) > 1)
    if twice.size:
        raise InputError(
            f"episodes: prompt_id {episodes['prompt_id'][twice[0]].as_py()!r} has more than one refined answer; "
            'give the others kind "candidate"'
        )
    return EpisodeView(grid, refined)


def consistent(view: EpisodeView, config: Config) -> Bools:
    """(N,) whether the refined answer beats every scored candidate (SPA, Y_perf); all true with `consistency: off`."""
    rule = config.denoise.consistency
    if rule == "off":
        return np.ones(len(view.grid.lengths), dtype=bool)
    values = view.grid.values
    best = np.where(view.candidates, values, -np.inf).max(axis=1, initial=-np.inf)
    refined = np.where(view.scored_refined, values, -np.inf).max(axis=1, initial=-np.inf)
    if rule == "total":
        best_total = np.where(view.candidates, values.sum(axis=0), -np.inf).max(axis=0, initial=-np.inf)
        return refined.sum(axis=0) > best_total
    first = refined[0] > best[0] if rule == "strict" else refined[0] >= best[0]
    return first & (refined[1:] > best[1:]).all(axis=0)


def _check_table(episodes: pa.Table, config: Config) -> None:
    missing = {"prompt_id", "responses", "scores", "error", "attempt"} - set(episodes.column_names)
    if missing:
        raise InputError(f"episodes: no column {sorted(missing)[0]!r}; give a table that `spa generate` wrote")
    stored = (episodes.schema.metadata or {}).get(b"objectives")
    if stored is not None and json.loads(stored) != list(config.objectives):
        raise InputError(
            f"episodes were scored on {json.loads(stored)}, the config's objectives are {list(config.objectives)}; "
            "use the same names in the same order"
        )


def _repeated(episodes: pa.Table) -> Bools:
    """(N,) true for every row of a prompt_id but the one that stays."""
    rows = episodes.num_rows
    ids = episodes["prompt_id"]
    if ids.null_count:
        raise InputError("episodes: a prompt_id is null; every row needs one")
    if pc.count_distinct(ids).as_py() == rows:
        return np.zeros(rows, dtype=bool)
    code = pc.dictionary_encode(ids.combine_chunks()).indices.to_numpy()
    failed = pc.is_valid(episodes["error"]).to_numpy()
    attempt = pc.fill_null(episodes["attempt"], 0).to_numpy()
    order = np.lexsort((np.arange(rows), -attempt, failed, code))
    repeated = np.ones(rows, dtype=bool)
    repeated[order[np.flatnonzero(np.diff(code[order], prepend=-1))]] = False
    return repeated
