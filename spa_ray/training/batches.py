"""Which pair goes to which optimizer step, rank and micro-batch, decided before training starts.

Comes in: sequence lengths, gaps, a seed and sizes. Goes out: a `Plan`. Never: tokens, tensors, files, models.
What a step contains depends on the seed alone; ranks and micro-batches only cut it up, so the loss is the same for any
number of ranks and any micro-batch size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from spa_ray.errors import InputError
from spa_ray.training.losses import pair_weights

# Independent random streams of one seed.
ORDER, SUBSET, LABELS = 0, 1, 2


@dataclass(frozen=True)
class Order:
    """The pairs in training order and the optimizer step of each; `epoch` is by step."""

    pairs: Int[np.ndarray, " entries"]
    step: Int[np.ndarray, " entries"]
    epoch: Int[np.ndarray, " steps"]


@dataclass(frozen=True)
class PairTokens:
    """Tokens of every pair, prompts included. `longest` is its longest sequence, `total` all that are trained on."""

    longest: Int[np.ndarray, " pairs"]
    total: Int[np.ndarray, " pairs"]


@dataclass(frozen=True)
class Plan:
    """Every micro-batch of a run. Entries are sorted by step, rank, micro-batch.

    `starts[s, r, m]` to `stops[s, r, m]` are the entries of micro-batch m of rank r in step s; an empty range is a
    micro-batch that this rank runs at weight zero, because all ranks run `micros[s]` of them.
    """

    pairs: Int[np.ndarray, " entries"]
    weights: Float[np.ndarray, " entries"]
    starts: Int[np.ndarray, "steps ranks micros"]
    stops: Int[np.ndarray, "steps ranks micros"]
    micros: Int[np.ndarray, " steps"]
    sizes: Int[np.ndarray, " steps"]
    epoch: Int[np.ndarray, " steps"]

    @property
    def steps(self) -> int:
        return len(self.sizes)

    def micro_batches(self, step: int, rank: int) -> list[slice]:
        """The entries of this rank's micro-batches in one step, as slices into `pairs` and `weights`."""
        return [
            slice(int(self.starts[step, rank, m]), int(self.stops[step, rank, m])) for m in range(self.micros[step])
        ]

    def step_entries(self, step: int) -> slice:
        """All entries of one step, over all ranks."""
        start = int(self.sizes[:step].sum())
        return slice(start, start + int(self.sizes[step]))


def stream(seed: int, *key: int) -> np.random.Generator:
    """The generator of one named random stream of a run."""
    return np.random.default_rng([seed & 0xFFFFFFFFFFFFFFFF, *key])


def order_pairs(n: int, *, seed: int, batch_size: int, epochs: float, max_steps: int | None) -> Order:
    """Shuffle every epoch anew and cut it into steps; an epoch's last step may be short, and no step spans two epochs.

    A fractional epoch takes the first share of its permutation. `max_steps` replaces `epochs`: exactly that many steps,
    over as many epochs as they need. Raises: InputError without pairs.
    """
    if n == 0:
        raise InputError("no pairs to train on: every pair was dropped or the pairs table is empty")
    per_epoch = math.ceil(n / batch_size)
    total = epochs if max_steps is None else math.ceil(max_steps / per_epoch)
    chunks, step_of, epoch_of = [], [], []
    first_step = 0
    for epoch in range(math.ceil(total)):
        take = min(n, math.ceil((total - epoch) * n - 1e-9))
        if max_steps is not None:
            take = min(take, (max_steps - first_step) * batch_size)
        chunks.append(stream(seed, ORDER, epoch).permutation(n)[:take])
        step_of.append(first_step + np.arange(take) // batch_size)
        steps = math.ceil(take / batch_size)
        epoch_of.append(np.full(steps, epoch))
        first_step += steps
    return Order(np.concatenate(chunks), np.concatenate(step_of), np.concatenate(epoch_of))


def step_weights(
    order: Order, gap: Float[np.ndarray, " pairs"], *, alpha: float, w_max: float | None
) -> Float[np.ndarray, " entries"]:
    """The pairs' weights, Δ̄ being the mean over the whole optimizer step, then clipped at `w_max`."""
    starts = np.flatnonzero(np.r_[True, np.diff(order.step) > 0])
    weights = np.empty(len(order.pairs))
    for start, stop in zip(starts, np.r_[starts[1:], len(order.pairs)], strict=True):
        weights[start:stop] = pair_weights(gap[order.pairs[start:stop]], alpha=alpha)
    return weights if w_max is None else np.minimum(weights, w_max)


def make_plan(
    order: Order,
    weights: Float[np.ndarray, " entries"],
    tokens: PairTokens,
    *,
    ranks: int,
    micro_batch_tokens: int,
    packed: bool,
    sequences_per_pair: int = 2,
) -> Plan:
    """Deal every step's pairs to ranks and micro-batches.

    A micro-batch holds at most `micro_batch_tokens` tokens, but always one pair: packed, the sum of its pairs' totals;
    padded, every sequence counts as the longest. Pairs are dealt longest first, to and fro over the ranks, which
    balances the ranks and, padded, puts pairs of like length together.
    """
    size = tokens.total if packed else tokens.longest
    by_length = np.lexsort((order.pairs, -size[order.pairs], order.step))
    step = order.step[by_length]
    sizes = np.bincount(order.step, minlength=len(order.epoch))
    position = np.arange(len(step)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    turn, seat = np.divmod(position, ranks)
    rank = np.where(turn % 2 == 0, seat, ranks - 1 - seat)
    dealt = np.lexsort((position, rank, step))
    entries = by_length[dealt]
    groups = np.bincount(step * ranks + rank, minlength=len(sizes) * ranks)
    cost = size[order.pairs[entries]] * (1 if packed else sequences_per_pair)
    starts, stops = _cut(groups, cost, micro_batch_tokens, packed=packed)
    micros = (stops > starts).reshape(len(sizes), ranks, -1).sum(axis=2).max(axis=1)
    shape = (len(sizes), ranks, starts.shape[1])
    return Plan(
        pairs=order.pairs[entries],
        weights=weights[entries],
        starts=starts.reshape(shape),
        stops=stops.reshape(shape),
        micros=micros,
        sizes=sizes,
        epoch=order.epoch,
    )


def _cut(
    groups: Int[np.ndarray, " groups"], cost: Int[np.ndarray, " entries"], budget: int, *, packed: bool
) -> tuple[Int[np.ndarray, "groups micros"], Int[np.ndarray, "groups micros"]]:
    """Cut each group of consecutive entries, costs descending, into runs of at most `budget`; all groups at once."""
    stop_of = np.cumsum(groups)
    at = stop_of - groups
    spent = np.concatenate([[0], np.cumsum(cost)])
    starts, stops = [], []
    while (at < stop_of).any():
        if packed:
            to = np.searchsorted(spent, spent[at] + budget, side="right") - 1
        else:
            to = at + budget // cost[np.minimum(at, len(cost) - 1)]
        to = np.minimum(np.maximum(to, at + 1), stop_of)
        starts.append(at)
        stops.append(to)
        at = to
    return np.stack(starts, axis=1), np.stack(stops, axis=1)
