"""Preference pairs in priority order (SPA, Eq. 2) out of denoised episodes.

Comes in: the table that `denoise` returns. Goes out: a table of spa_ray.data.schemas.PAIRS. Never: a tokenizer; the
token ids are the generated ones, none invented, none cut. A response without all of its scores is in no pair.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from spa_ray.config.models import Config
from spa_ray.data.schemas import MESSAGE, MESSAGES, RELIABILITY, Ranges, pairs_schema, ranges_of
from spa_ray.errors import InputError
from spa_ray.preferences.denoising import consistent, view_episodes
from spa_ray.preferences.ranges import check_ranges, in_unit, ranged
from spa_ray.preferences.scores import Bools, Floats, Ints, list_lengths, score_grid

Column: TypeAlias = pa.Array | pa.ChunkedArray

# Arrow's string and list offsets are 32 bits wide: inputs are combined and outputs written in pieces well below 2 GiB.
BLOCK_BYTES = 2**28
BATCH_BYTES = 2**29


def resolve_delta(scores: Column | Iterable[Column], config: Config) -> float:
    """δ, the least margin of a pair (SPA, Eq. 2), over a whole data set's `scores` column.

    `pairs.delta` where it is a number. `auto` is half a standard deviation of the score sums Σ_o s_o(y) within prompts:
    the root of the squared deviations from each prompt's mean over all its scored responses (the refined one included),
    divided by the responses less the prompts. Scores are rounded to `pairs.score_grid` first. 0, which asks for any
    difference, where no two responses of a prompt are scored. An iterable of pieces is read once, and the result does
    not depend on how the rows are cut or ordered; 8 bytes are kept for every prompt.
    """
    if config.pairs.delta != "auto":
        return config.pairs.delta
    pieces = (scores,) if isinstance(scores, pa.Array | pa.ChunkedArray) else scores
    scatter: list[float] = []
    degrees = 0
    for piece in pieces:
        grid = score_grid(piece, len(config.objectives))
        sums = _rounded(grid.values, config.pairs.score_grid).sum(axis=0)
        count = grid.scored.sum(axis=0)
        mean = np.where(grid.scored, sums, 0.0).sum(axis=0) / count.clip(min=1)
        scatter.extend((np.where(grid.scored, sums - mean, 0.0) ** 2).sum(axis=0).tolist())
        degrees += int((count - 1).clip(min=0).sum())
    return round(0.5 * math.sqrt(math.fsum(scatter) / degrees), 10) if degrees else 0.0


def build_pairs(denoised: pa.Table, config: Config, *, delta: float | None = None) -> pa.Table:
    """All preference pairs of the kept prompts, as a PAIRS table with the episodes' metadata.

    `delta` is `resolve_delta` of the whole data set; None takes this table for it. Ranges of scores are those in the
    table's metadata, or `episodes.ranges`, which the pairs' metadata repeat.
    (y, y⁻) is a pair iff y comes before y⁻ in `pairs.order` and Σ_o |s_o(y) - s_o(y⁻)| >= `delta` (SPA, Eq. 2):
      order lex       s(y) is greater on the first objective on which they differ.
      order pareto    s(y) is nowhere lower, and greater on at least one objective below the first (preliminaries).
      order only:o    s_o(y) is greater; Reward Soups' models of one reward. |s_o(y) - s_o(y⁻)| >= `delta` as well.
      order composite the mean of s(y) by `weights` is greater, the scalarised reward; by `delta` or more as well.
      order mean      the prompt's highest mean of (s_o(y) - low_o) / (high_o - low_o) over the objectives against its
                      lowest, by `delta` or more, one pair per prompt (SGA); among equals the first answer.
      thresholds      the order compares min(score, threshold); margin, gap and the stored scores are not clipped.
      score_grid      scores are first rounded to its multiples (halves to the even one); order, margin, gap and the
                      stored scores all use the rounded ones.
      include         `refined_only`: the refined answer is the chosen; `candidates_only`: it is in no pair.
      keep_system     the chosen's sampling system prompt, where it has one, heads the prompt in place of its own.
      truncated       `reject`: an answer that was cut (finish_reason `length`) is not the chosen one; it may be the
                      rejected one. Answers of which nothing is known, as in imported tables, count as complete.
    Two answers with the same text or the same token ids are no pair, nor is an answer whose text or ids are empty.
    Given answers (`episodes.source`) have no ids, null, until training cuts them into tokens.
    margin and gap are rounded to 10 decimals. Where a score is the mean of several `scoring.draws` there is a further
    column, `reliability`.
    With `denoise.on_inconsistent: drop_refined` an inconsistent prompt pairs its candidates only. Rows stand in the
    order of the prompts, then of chosen_index and rejected_index.
    Raises: InputError when the table was not denoised, or does not hold what its schema promises, for a score outside
    of its range, and where order mean lacks the ranges.
    """
    needed = {"kept", "messages"} - set(denoised.column_names)
    if needed:
        raise InputError(f"pairs: no column {sorted(needed)[0]!r}; give the table that `denoise` returns")
    columns = ["prompt_id", "messages", "responses", "scores", "error", "attempt", "kept"]
    schema = ranged(pairs_schema(reliability=config.scoring.repeated).with_metadata(denoised.schema.metadata), config)
    least = resolve_delta(denoised["scores"], config) if delta is None else delta
    blocks = _blocks(denoised.select(columns))
    batches = [b for block in blocks for b in _pairs_of(block, config, least, schema)]
    return pa.Table.from_batches(batches, schema)


def truncated_pairs(denoised: pa.Table, pairs: pa.Table, config: Config, *, delta: float) -> int:
    """How many pairs `pairs.truncated: reject` kept out of `pairs`, built from `denoised`; 0 with `allow`."""
    if config.pairs.truncated == "allow":
        return 0
    kept = denoised.filter(denoised["kept"])
    cut = [_cut(chunk.flatten()) for chunk in kept["responses"].chunks]
    if not any(flags.any() for flags in cut):
        return 0
    rule = config.pairs.model_copy(update={"truncated": "allow"})
    allowed = build_pairs(kept, config.model_copy(update={"pairs": rule}), delta=delta)
    return max(0, allowed.num_rows - pairs.num_rows)  # with order mean another chosen one may have taken its place


def _blocks(table: pa.Table) -> Iterator[pa.Table]:
    """The table in pieces of one chunk each."""
    step = max(1, table.num_rows * BLOCK_BYTES // max(1, table.nbytes))
    for start in range(0, table.num_rows, step):
        yield table.slice(start, step).combine_chunks()


@dataclass(frozen=True)
class _Scored:
    """What decides over pairs, for N prompts with at most L responses and k objectives each.

    scores, keys: (k, L, N), as stored and with thresholds. compared: (m, L, N), what the order looks at of `keys`, most
    important first. steps: (m, L, N), the same of `scores`, by which `delta` is reached. usable, choosable, refined:
    (L, N); `choosable` ones may be the chosen.
    """

    scores: Floats
    keys: Floats
    compared: Floats
    steps: Floats
    usable: Bools
    choosable: Bools
    refined: Bools


def _pairs_of(block: pa.Table, config: Config, delta: float, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    answers = _Answers.of(block, len(config.objectives) if RELIABILITY in schema.names else 0)
    view = view_episodes(block, config)
    kept = pc.fill_null(block["kept"], False).to_numpy()
    filled = answers.filled(given=config.episodes.source is not None)
    usable = view.grid.scored & view.grid.scatter(filled) & kept
    if config.denoise.on_inconsistent == "drop_refined":
        usable &= ~view.refined | consistent(view, config)
    ranges = ranges_of(schema)
    if ranges is not None:
        check_ranges(view.grid.values, usable, ranges, config.objectives, answers.prompt_id)
    scores = _rounded(view.grid.values, config.pairs.score_grid)
    caps = np.array([config.pairs.thresholds.get(name, np.inf) for name in config.objectives])
    whole = ~view.grid.scatter(answers.cut) | (config.pairs.truncated == "allow")
    keys = np.minimum(scores, caps[:, None, None])
    seen = _compared(keys, config, ranges), _compared(scores, config, ranges)
    scored = _Scored(scores, keys, *seen, usable, usable & whole, view.refined)
    find = _extremes if config.pairs.order == "mean" else _ordered
    row, i, j = find(scored, config, delta)
    starts = view.grid.starts
    differ = answers.differ(starts[row] + i, starts[row] + j)
    row, i, j = row[differ], i[differ], j[differ]
    weight = np.cumsum(answers.bytes_of(row, starts[row] + i, starts[row] + j))
    cuts = np.searchsorted(weight, np.arange(BATCH_BYTES, weight[-1] if weight.size else 0, BATCH_BYTES))
    for part in np.split(np.arange(len(row)), cuts):
        if part.size:
            yield _rows(answers, scored, config, schema, (row[part], i[part], j[part]), starts)


def _rounded(scores: Floats, grid: float | None) -> Floats:
    if grid is None:
        return scores
    return _clean(np.rint(scores / grid) * grid)


def _clean(sums: Floats) -> Floats:
    """Ten decimals: 0.3 - 0.1 = 0.19999999999999998 must reach a delta of 0.2, and a dead pair's gap be 0."""
    return np.round(sums, 10)


def _compared(scores: Floats, config: Config, ranges: Ranges | None) -> Floats:
    """(m, L, N) what `pairs.order` looks at of (k, L, N) scores: all of them, one, or a mean."""
    order, names = config.pairs.order, config.objectives
    if order == "mean":
        assert ranges is not None
        return _clean(in_unit(scores, ranges).mean(axis=0)[None])
    if order.startswith("only:"):
        return scores[[names.index(order.removeprefix("only:"))]]
    if order != "composite":
        return scores
    weights = np.array([config.pairs.weights.get(name, 0.0 if config.pairs.weights else 1.0) for name in names])
    return _clean(np.tensordot(weights / weights.sum(), scores, axes=1)[None])


def _ordered(scored: _Scored, config: Config, delta: float) -> tuple[Ints, Ints, Ints]:
    """Prompt, chosen position and rejected position of every pair by scores alone, sorted by all three."""
    positions, prompts = scored.usable.shape
    chosen_over = np.zeros((prompts, positions, positions), dtype=bool)
    pareto = config.pairs.order == "pareto"
    for i in range(positions):
        for j in range(i):
            enough = _clean(sum(np.abs(scored.steps[:, i] - scored.steps[:, j]))) >= delta
            both = scored.usable[i] & scored.usable[j] & enough
            above, below = _precedence(scored.compared[:, i], scored.compared[:, j], pareto=pareto)
            chosen_over[:, i, j] = both & above & scored.choosable[i]
            chosen_over[:, j, i] = both & below & scored.choosable[j]
    if config.pairs.include == "refined_only":
        chosen_over &= scored.refined.T[:, :, None]
    elif config.pairs.include == "candidates_only":
        chosen_over &= ~(scored.refined.T[:, :, None] | scored.refined.T[:, None, :])
    row, chosen, rejected = np.nonzero(chosen_over)
    return row, chosen, rejected


def _extremes(scored: _Scored, config: Config, delta: float) -> tuple[Ints, Ints, Ints]:
    """As `_ordered`, of each prompt the highest that may be chosen against the lowest, the first ones among equals."""
    include, (compared,), (steps,) = config.pairs.include, scored.compared, scored.steps
    usable = scored.usable & ~scored.refined if include == "candidates_only" else scored.usable
    choosable = scored.choosable & usable & (scored.refined if include == "refined_only" else True)
    if not len(usable):  # no prompt has an answer
        return (np.zeros(0, np.int64),) * 3
    best = np.where(choosable, compared, -np.inf).argmax(axis=0)
    worst = np.where(usable, compared, np.inf).argmin(axis=0)
    every = np.arange(len(best))
    above = (compared[best, every] > compared[worst, every]) & choosable.any(axis=0)
    row = np.flatnonzero(above & (_clean(np.abs(steps[best, every] - steps[worst, every])) >= delta))
    return row, best[row], worst[row]


def _precedence(a: Floats, b: Floats, *, pareto: bool) -> tuple[Bools, Bools]:
    """Whether a comes before b, and b before a; a, b: (m, N) compared scores."""
    if pareto:
        nowhere_lower, nowhere_higher = np.logical_and.reduce(a >= b), np.logical_and.reduce(a <= b)
        return nowhere_lower & np.logical_or.reduce(a[1:] > b[1:]), nowhere_higher & np.logical_or.reduce(a[1:] < b[1:])
    above, below = a[-1] > b[-1], a[-1] < b[-1]
    for x, y in zip(a[-2::-1], b[-2::-1], strict=True):
        tied = x == y
        above, below = (x > y) | (tied & above), (x < y) | (tied & below)
    return above, below


@dataclass(frozen=True)
class _Answers:
    """The responses of one block as flat Arrow columns, and the prompts that they answer."""

    prompt_id: pa.Array
    messages: pa.Array
    index: Ints
    kind: pa.Array
    text: pa.Array
    ids: pa.ListArray
    system: pa.Array
    cut: Bools
    text_bytes: Ints
    ids_count: Ints
    mean_variance: Floats

    @classmethod
    def of(cls, block: pa.Table, objectives: int) -> _Answers:
        """`objectives`: of how many the draws are looked at; 0 for none."""
        column = block["responses"].combine_chunks()
        flat = column.flatten()
        index = flat.field("index").to_numpy(zero_copy_only=False).astype(np.int64)
        lengths = list_lengths(column)
        first = np.zeros(len(index) + 1, dtype=bool)
        first[np.cumsum(lengths) - lengths] = True
        if (~first[1:-1] & (np.diff(index) <= 0)).any():
            raise InputError("episodes: a prompt's responses are not in ascending `index`; generate the file again")
        text, ids = pc.cast(flat.field("text"), pa.string()), pc.cast(flat.field("token_ids"), pa.list_(pa.int32()))
        messages = pc.cast(block["messages"].combine_chunks(), MESSAGES)
        text_bytes = pc.fill_null(pc.binary_length(text), 0).to_numpy(zero_copy_only=False).astype(np.int64)
        return cls(
            prompt_id=block["prompt_id"].combine_chunks(),
            messages=messages,
            index=index,
            kind=flat.field("kind"),
            text=text,
            ids=ids,
            system=flat.field("system"),
            cut=_cut(flat),
            text_bytes=text_bytes,
            ids_count=list_lengths(ids),
            mean_variance=_mean_variance(flat, objectives),
        )

    def reliability(self, difference: Floats, objective: Ints, left: Ints, right: Ints) -> pa.Array:
        """(P,) d² / (d² + se²) of the two answers' scores on an objective; null where a variance is not known."""
        error = self.mean_variance[left, objective] + self.mean_variance[right, objective]
        with np.errstate(invalid="ignore"):
            return pa.array(difference**2 / (difference**2 + error), from_pandas=True)

    def filled(self, *, given: bool) -> Bools:
        """(M,) true where neither the text nor the token ids are empty; ids of `given` answers may be null."""
        unknown = self.ids.is_null().to_numpy(zero_copy_only=False) & given
        return (self.text_bytes > 0) & ((self.ids_count > 0) | unknown)

    def differ(self, left: Ints, right: Ints) -> Bools:
        """(P,) true where both the texts and the token ids of the two answers differ."""
        same = _same(self.text, self.text_bytes, left, right)
        return ~(same | (_same(_as_bytes(self.ids), self.ids_count, left, right) & (self.ids_count[left] > 0)))

    def bytes_of(self, row: Ints, left: Ints, right: Ints) -> Ints:
        """(P,) size of each pair's texts, token ids and prompt."""
        count = list_lengths(self.messages)
        content = pc.binary_length(self.messages.flatten().field("content")).to_numpy(zero_copy_only=False)
        prompt = np.bincount(np.repeat(np.arange(len(count)), count), weights=content, minlength=len(count))
        answer = self.text_bytes + 4 * self.ids_count
        return answer[left] + answer[right] + prompt.astype(np.int64)[row]

    def prompts(self, row: Ints, chosen: Ints, *, keep_system: bool) -> pa.ListArray:
        """(P,) the messages of each pair, headed by the chosen's system prompt where that is kept and there is one."""
        picked = self.messages.take(pa.array(row))
        if not keep_system:
            return picked
        system = self.system.take(pa.array(chosen))
        given = pc.is_valid(system).to_numpy(zero_copy_only=False)
        lengths, flat = list_lengths(picked), picked.flatten()
        starts = np.cumsum(lengths) - lengths
        own = pc.equal(flat.field("role"), "system").to_numpy(zero_copy_only=False)[starts]
        source = np.arange(len(flat))
        replaced, added = np.flatnonzero(given & own), np.flatnonzero(given & ~own)
        source[starts[replaced]] = len(flat) + replaced
        order = pa.array(np.insert(source, starts[added], len(flat) + added))
        role = pa.concat_arrays([flat.field("role"), pa.repeat("system", len(system))]).take(order)
        content = pa.concat_arrays([flat.field("content"), pc.cast(system, pa.string())]).take(order)
        offsets = np.concatenate([[0], np.cumsum(lengths + (given & ~own))]).astype(np.int32)
        return _message_lists(role, content, offsets)


def _mean_variance(responses: pa.StructArray, objectives: int) -> Floats:
    """(M, k) variance of the mean of a score's draws: their sample variance over their number; NaN below two draws."""
    out = np.full((len(responses), objectives), np.nan)
    if not objectives or responses.type.get_field_index("score_draws") < 0:
        return out
    draws = responses.field("score_draws")
    whole = list_lengths(draws) == objectives
    drawn = draws.filter(pa.array(whole)).flatten()
    count = list_lengths(drawn)
    values = pc.cast(drawn.flatten(), pa.float64()).to_numpy(zero_copy_only=False)
    of = np.repeat(np.arange(len(count)), count)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.bincount(of, values, minlength=len(count)) / count
        squares = np.bincount(of, (values - mean[of]) ** 2, minlength=len(count))
        out[whole] = (squares / (count - 1) / count).reshape(-1, objectives)
    return out


def _cut(responses: pa.StructArray) -> Bools:
    """(M,) which responses were cut by their max_tokens."""
    if responses.type.get_field_index("finish_reason") < 0:
        return np.zeros(len(responses), dtype=bool)
    cut = pc.equal(pc.cast(responses.field("finish_reason"), pa.string()), "length")
    return pc.fill_null(cut, False).to_numpy(zero_copy_only=False)


def _same(values: pa.Array, lengths: Ints, left: Ints, right: Ints) -> Bools:
    """(P,) equality of two picks of the same column; only values of equal length are compared."""
    same = lengths[left] == lengths[right]
    where = np.flatnonzero(same)
    same[where] = pc.equal(values.take(pa.array(left[where])), values.take(pa.array(right[where]))).to_numpy(
        zero_copy_only=False
    )
    return same


def _as_bytes(ids: pa.ListArray) -> pa.Array:
    """The lists of token ids as byte strings over the same memory (Arrow compares strings, not lists)."""
    values = ids.values
    offsets = 4 * (ids.offsets.to_numpy().astype(np.int64) + values.offset)
    return pa.Array.from_buffers(
        pa.large_binary(), len(ids), [None, pa.py_buffer(np.ascontiguousarray(offsets)), values.buffers()[1]]
    )


def _rows(
    answers: _Answers, scored: _Scored, config: Config, schema: pa.Schema, where: tuple[Ints, Ints, Ints], starts: Ints
) -> pa.RecordBatch:
    """The PAIRS rows of the pairs (prompt, chosen position, rejected position)."""
    row, i, j = where
    left, right = starts[row] + i, starts[row] + j
    chosen, rejected = scored.scores[:, i, row], scored.scores[:, j, row]
    decided_by = (scored.keys[:, i, row] != scored.keys[:, j, row]).argmax(axis=0)
    if config.pairs.order.startswith("only:"):
        decided_by[:] = config.objectives.index(config.pairs.order.removeprefix("only:"))
    prompt_id = answers.prompt_id.take(pa.array(row))
    chosen_index, rejected_index = pa.array(answers.index[left], pa.int32()), pa.array(answers.index[right], pa.int32())
    columns = {
        "pair_id": pc.binary_join_element_wise(
            prompt_id, pc.cast(chosen_index, pa.string()), pc.cast(rejected_index, pa.string()), ":"
        ),
        "prompt_id": prompt_id,
        "prompt": answers.prompts(row, left, keep_system=config.pairs.keep_system),
        "chosen": _answer_messages(answers.text.take(pa.array(left))),
        "rejected": _answer_messages(answers.text.take(pa.array(right))),
        "chosen_index": chosen_index,
        "rejected_index": rejected_index,
        "chosen_ids": answers.ids.take(pa.array(left)),
        "rejected_ids": answers.ids.take(pa.array(right)),
        "chosen_scores": _score_lists(chosen),
        "rejected_scores": _score_lists(rejected),
        "margin": pa.array(_clean(sum(np.abs(chosen - rejected)))),
        "gap": pa.array(_clean(np.abs(sum(chosen) - sum(rejected)))),
        "decided_by": pa.array(config.objectives).take(pa.array(decided_by)),
        "kind": pa.array(["candidate", "refined"]).take(pa.array(scored.refined[i, row].astype(np.int8))),
    }
    if RELIABILITY in schema.names:
        difference = np.take_along_axis(chosen - rejected, decided_by[None], axis=0)[0]
        columns[RELIABILITY] = answers.reliability(difference, decided_by, left, right)
    return pa.RecordBatch.from_arrays([pc.cast(columns[f.name], f.type) for f in schema], schema=schema)


def _answer_messages(text: pa.Array) -> pa.ListArray:
    return _message_lists(pa.repeat("assistant", len(text)), text, np.arange(len(text) + 1, dtype=np.int32))


def _message_lists(role: pa.Array, content: pa.Array, offsets: NDArray[np.int32]) -> pa.ListArray:
    messages = pa.StructArray.from_arrays([role, content], fields=list(MESSAGE))
    return pa.ListArray.from_arrays(pa.array(offsets), messages)


def _score_lists(scores: Floats) -> pa.ListArray:
    """(k, P) scores as P lists of k."""
    k, pairs = scores.shape
    return pa.ListArray.from_arrays(
        pa.array(np.arange(0, k * pairs + 1, k, dtype=np.int32)), pa.array(scores.T.ravel())
    )
