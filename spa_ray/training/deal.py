"""One optimizer step's distinct sequences, dealt to ranks and micro-batches.

Comes in: the step's pairs, and of every sequence its tokens and its prompt. Goes out: a `Step`. Never: ids, tensors,
files, models. A sequence is one (prompt, response), in however many pairs: it is computed once a step.

A loss needs both log-probs of a pair. Where they come from one micro-batch, its backward pass follows at once. Where
they do not, the micro-batch is `shared`: its log-probs go to all ranks first, so all but one of a rank's shared
micro-batches run forward twice. `deal` therefore keeps a prompt's sequences together where that costs less.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from spa_ray.training.batches import Order

AGAIN = 1 / 3  # a forward pass more, against a forward and a backward pass
# What a copy of a prompt's token takes in memory, against a token that passes through the whole model: attention alone
# sees it. By training/memory.py's formulas 0.10 for Llama-3.1-8B; test_training_packing.py measures a small model.
COPY = 0.2
UNEVEN = 1.05  # the busiest rank's tokens over the mean, up to which whole prompts are dealt without a look at parts


@dataclass(frozen=True)
class Sequences:
    """The distinct sequences of a run. `tokens` counts the prompt too, `responses` what the loss looks at, `heads` the
    first tokens that a sequence has in common with its prompt's others; `of_pair` are each pair's sequences, the chosen
    one first (and alone, where the method looks at no other)."""

    tokens: Int[np.ndarray, " sequences"]
    responses: Int[np.ndarray, " sequences"]
    heads: Int[np.ndarray, " sequences"]
    prompt: Int[np.ndarray, " sequences"]
    of_pair: Int[np.ndarray, "pairs sides"]

    def tokens_together(self, which: Int[np.ndarray, " some"]) -> int:
        """Tokens of these sequences in one packed micro-batch: what is common to a prompt's stands there once."""
        prompts, place = np.unique(self.prompt[which], return_inverse=True)
        heads = np.zeros(len(prompts), dtype=np.int64)
        np.maximum.at(heads, place, self.heads[which])
        return int((self.tokens[which] - self.heads[which]).sum() + heads.sum())

    @property
    def prompt_of_pair(self) -> Int[np.ndarray, " pairs"]:
        return self.prompt[self.of_pair[:, 0]]


@dataclass(frozen=True)
class Part:
    """A micro-batch: sequences of the step, by their place in `Step.sequences`, and the pairs (places in `Step.pairs`)
    whose loss it gives by itself: all that have a sequence here, none where the micro-batch is shared."""

    sequences: Int[np.ndarray, " n"]
    pairs: Int[np.ndarray, " m"]


@dataclass(frozen=True)
class Step:
    """One optimizer step. `sides` are the pairs' sequences by their place in `sequences`; `shared` and `whole` are, by
    rank, the micro-batches of each kind. All ranks have equally many of a kind: an empty one runs at weight zero."""

    pairs: Int[np.ndarray, " pairs"]
    weights: Float[np.ndarray, " pairs"]
    sequences: Int[np.ndarray, " sequences"]
    sides: Int[np.ndarray, "pairs sides"]
    shared: list[list[Part]]
    whole: list[list[Part]]
    shared_pairs: Int[np.ndarray, " shared_pairs"]


@dataclass(frozen=True)
class Plan:
    """A run's steps, each dealt when it is asked for."""

    order: Order
    weights: Float[np.ndarray, " entries"]
    sequences: Sequences
    ranks: int
    micro_batch_tokens: int
    packed: bool

    @property
    def steps(self) -> int:
        return self.order.steps

    @cached_property
    def starts(self) -> Int[np.ndarray, " steps_plus_1"]:
        return self.order.starts

    def step(self, step: int) -> Step:
        """Step number `step`, from 0."""
        at = slice(int(self.starts[step]), int(self.starts[step + 1]))
        pairs = self.order.pairs[at]
        found, sides = np.unique(self.sequences.of_pair[pairs], return_inverse=True)
        sides = sides.reshape(len(pairs), -1)
        dealt = deal(
            self.sequences.tokens[found].tolist(),
            self.sequences.prompt[found].tolist(),
            self.sequences.heads[found].tolist() if self.packed else None,
            ranks=self.ranks,
            budget=self.micro_batch_tokens,
            packed=self.packed,
            again=AGAIN if sides.shape[1] > 1 else 0.0,  # a sequence alone waits for no other
        )
        shared, whole, shared_pairs = _sort_parts(dealt, sides, len(found))
        return Step(pairs, self.weights[at], found, sides, shared, whole, shared_pairs)


Places = list[int]  # of sequences in a step
Dealt = list[list[Places]]  # by rank, by micro-batch


def deal(
    tokens: list[int],
    group: list[int],
    heads: list[int] | None,
    *,
    ranks: int,
    budget: int,
    packed: bool,
    again: float = AGAIN,
) -> Dealt:
    """Places in `tokens` of every rank's micro-batches; plain lists, which are faster than arrays of a few dozen.

    A micro-batch holds at most `budget` tokens, but always one sequence: packed, the sum of its sequences' tokens, a
    group's first `heads` tokens once and its copies of them by `COPY`; padded, every sequence counts as the longest.
    The longest goes to the rank with the least, which balances them. `again`: what a second forward pass costs.
    """
    work = _Work(tokens, group, heads or [0] * len(tokens))
    units = _units(work, budget, packed)
    whole = [_fill(rank, budget, packed) for rank in _to_ranks(units, ranks)]
    if ranks == 1 or _uneven(whole, work) <= UNEVEN:
        return whole
    single = [Unit([i], n, n) for i, n in enumerate(tokens)]
    parts = [_fill(rank, budget, packed) for rank in _to_ranks(single, ranks)]
    return min(whole, parts, key=lambda dealt: _cost(dealt, work, again))


class _Work(NamedTuple):
    """A step's sequences: their tokens, which of them belong together, and how many first tokens those share."""

    tokens: list[int]
    group: list[int]
    heads: list[int]

    def size(self, places: Places) -> int:
        """Tokens of these sequences in one packed micro-batch, copies by what they take."""
        shared: dict[int, int] = {}
        every = own = 0
        for i in places:
            every += self.tokens[i]
            own += self.tokens[i] - self.heads[i]
            shared[self.group[i]] = max(shared.get(self.group[i], 0), self.heads[i])
        laid_out = own + sum(shared.values())
        return laid_out + math.ceil(COPY * (every - laid_out))


class Unit(NamedTuple):
    """Sequences that stay together."""

    places: Places
    tokens: int
    longest: int


def _units(work: _Work, budget: int, packed: bool) -> list[Unit]:
    """A group's sequences where a micro-batch takes them all, else in parts that it takes."""
    members: dict[int, Places] = {}
    tokens = work.tokens
    for place, name in enumerate(work.group):
        members.setdefault(name, []).append(place)
    units = []
    for places in members.values():
        total, longest = work.size(places), max(tokens[i] for i in places)
        if (total if packed else longest * len(places)) <= budget:
            units.append(Unit(places, total, longest))
        else:
            units += _cut(places, work, budget, packed)
    return units


def _cut(places: Places, work: _Work, budget: int, packed: bool) -> list[Unit]:
    """A group in parts of at most `budget`, the longest sequences first; a part has one sequence at least."""
    parts: list[Unit] = []
    for i in sorted(places, key=lambda i: -work.tokens[i]):
        if parts:
            joined = [*parts[-1].places, i]
            longest = parts[-1].longest
            total = work.size(joined)
            if (total if packed else longest * len(joined)) <= budget:
                parts[-1] = Unit(joined, total, longest)
                continue
        parts.append(Unit([i], work.tokens[i], work.tokens[i]))
    return parts


def _to_ranks(units: list[Unit], ranks: int) -> list[list[Unit]]:
    """The largest unit first, each to the rank that has the fewest tokens (LPT; Graham 1969)."""
    if ranks == 1:
        return [units]
    load = [(0, rank) for rank in range(ranks)]
    dealt: list[list[Unit]] = [[] for _ in range(ranks)]
    for unit in sorted(units, key=lambda unit: -unit.tokens):
        tokens_of_rank, rank = load[0]
        heapq.heapreplace(load, (tokens_of_rank + unit.tokens, rank))
        dealt[rank].append(unit)
    return dealt


def _fill(units: list[Unit], budget: int, packed: bool) -> list[Places]:
    """Units into as few micro-batches as first-fit makes, the one with the longest sequence first."""
    bins: list[Unit] = []
    for unit in sorted(units, key=lambda unit: -unit.longest):
        for k, (places, tokens, longest) in enumerate(bins):
            size = tokens + unit.tokens if packed else (len(places) + len(unit.places)) * max(longest, unit.longest)
            if size <= budget:
                bins[k] = Unit(places + unit.places, tokens + unit.tokens, max(longest, unit.longest))
                break
        else:
            bins.append(unit)
    return [places for places, *_ in bins]


def _uneven(dealt: Dealt, work: _Work) -> float:
    """The busiest rank's tokens over the mean."""
    load = [sum(work.size(part) for part in rank) for rank in dealt]
    return max(load) * len(load) / sum(load)


def _cost(dealt: Dealt, work: _Work, again: float) -> float:
    """The busiest rank's tokens, those of a second forward pass counted as well."""
    homes: dict[int, set[int]] = {}
    for number, (_, part) in enumerate(_parts(dealt)):
        for i in part:
            homes.setdefault(work.group[i], set()).add(number)
    costs = []
    for rank in dealt:
        sizes = [(work.size(part), any(len(homes[work.group[i]]) > 1 for i in part)) for part in rank]
        twice = sorted(size for size, shared in sizes if shared)[:-1]
        costs.append(sum(size for size, _ in sizes) + again * sum(twice))
    return max(costs)


def _sort_parts(
    dealt: Dealt, sides: Int[np.ndarray, "pairs sides"], n: int
) -> tuple[list[list[Part]], list[list[Part]], Int[np.ndarray, " shared_pairs"]]:
    """Every rank's shared and whole micro-batches, filled up with empty ones, and the pairs of the shared ones."""
    parts = list(_parts(dealt))
    homes = np.empty(n, dtype=np.int64)
    for number, (_, places) in enumerate(parts):
        homes[places] = number
    of_pair = homes[sides]
    across = (of_pair != of_pair[:, :1]).any(axis=1)
    is_shared = np.zeros(len(parts), dtype=bool)
    is_shared[of_pair[across].ravel()] = True
    late = is_shared[of_pair[:, 0]]
    shared: list[list[Part]] = [[] for _ in dealt]
    whole: list[list[Part]] = [[] for _ in dealt]
    for number, (rank, places) in enumerate(parts):
        own = np.flatnonzero((of_pair[:, 0] == number) & ~late)
        (shared if is_shared[number] else whole)[rank].append(Part(np.array(places), own))
    nothing = np.empty(0, dtype=np.int64)
    for kind in (shared, whole):
        most = max(len(of_rank) for of_rank in kind)
        for of_rank in kind:
            of_rank += [Part(nothing, nothing)] * (most - len(of_rank))
    return shared, whole, np.flatnonzero(late)


def _parts(dealt: Dealt) -> Iterator[tuple[int, Places]]:
    """Every micro-batch with its rank."""
    for rank, parts in enumerate(dealt):
        for part in parts:
            yield rank, part
