"""One optimizer step's sequences over ranks and micro-batches: within the token budget, evenly, with little run twice.

Takes token counts and returns places in them, as plain lists, which are faster than arrays of a few dozen.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field
from typing import NamedTuple

AGAIN = 1 / 3  # a forward pass more, against a forward and a backward pass
# What a copy of a prompt's token takes in memory, against a token that passes through the whole model: attention alone
# sees it. By training/memory.py's formulas 0.10 for Llama-3.1-8B; test_training_packing.py measures a small model.
COPY = 0.2
UNEVEN = 1.05  # the busiest rank's tokens over the mean, up to which no prompt is split over ranks
FINE = 0.02  # how near a padded micro-batch's size comes to the smallest that will do

Places = list[int]  # of sequences in a step
Dealt = list[list[Places]]  # by rank, by micro-batch


class Unit(NamedTuple):
    """Sequences that stay together: a group, a part of one, or a micro-batch. `tokens` are those of its packed row."""

    places: Places
    tokens: int
    longest: int

    def laid_out(self, packed: bool) -> int:
        """Tokens of its rows: packed, one row; padded, every sequence as long as the longest."""
        return self.tokens if packed else len(self.places) * self.longest

    def with_other(self, other: Unit) -> Unit:
        """Both in one micro-batch, of other groups."""
        longest = max(self.longest, other.longest)
        return Unit(self.places + other.places, self.tokens + other.tokens, longest)


@dataclass(frozen=True)
class Work:
    """A step's sequences: their tokens, which of them belong together, and how many first tokens those share (none
    where rows are padded)."""

    tokens: list[int]
    group: list[int]
    heads: list[int]
    packed: bool

    def of_group(self, places: Places) -> Unit:
        """Sequences of one group; copies of what they share count by what they take."""
        lengths = [self.tokens[i] for i in places]
        if not self.packed or len(places) == 1:
            return Unit(places, sum(lengths), max(lengths))
        heads = [self.heads[i] for i in places]
        copies = sum(heads) - max(heads)
        return Unit(places, sum(lengths) - copies + math.ceil(COPY * copies), max(lengths))

    def units(self, places: Places, budget: int) -> list[Unit]:
        """By group, complete where a micro-batch takes it, else in parts that it takes."""
        members: dict[int, Places] = {}
        for i in places:
            members.setdefault(self.group[i], []).append(i)
        units = []
        for of_group in members.values():
            unit = self.of_group(of_group)
            units += [unit] if unit.laid_out(self.packed) <= budget else self._cut(of_group, budget)
        return units

    def _cut(self, places: Places, budget: int) -> list[Unit]:
        """A group in parts of at most `budget`, the longest sequences first; a part has one sequence at least."""
        parts: list[Unit] = []
        for i in sorted(places, key=lambda i: -self.tokens[i]):
            if parts and (joined := self.of_group([*parts[-1].places, i])).laid_out(self.packed) <= budget:
                parts[-1] = joined
            else:
                parts.append(self.of_group([i]))
        return parts


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
    """Places in `tokens` of every rank's micro-batches.

    A micro-batch holds at most `budget` tokens, but always one sequence: packed, the sum of its sequences' tokens, a
    group's first `heads` tokens once and its copies of them by `COPY`; padded, every sequence counts as the longest.
    Groups stay together unless ranks are more even, or rows less padded, without that. `again`: what a second forward
    pass costs.
    """
    work = Work(tokens, group, heads or [0] * len(tokens), packed)
    units = _to_ranks(work.units(list(range(len(tokens))), budget), ranks)
    together = [_fill(of_rank, budget, packed) for of_rank in units]
    if packed and (ranks == 1 or _uneven(together) <= UNEVEN):
        best = together
    else:
        apart = _apart(units, work, budget) if packed else _by_length(work, budget, ranks)
        best = min(together, apart, key=lambda dealt: _cost(dealt, work, again))
    return [[unit.places for unit in of_rank] for of_rank in best]


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


def _fill(units: list[Unit], budget: int, packed: bool) -> list[Unit]:
    """Units into as few micro-batches as first-fit makes, the one with the longest sequence first."""
    bins: list[Unit] = []
    for unit in sorted(units, key=lambda unit: -unit.longest):
        for k, held in enumerate(bins):
            # A bin's first unit has the longest sequence.
            size = held.tokens + unit.tokens if packed else (len(held.places) + len(unit.places)) * held.longest
            if size <= budget:
                bins[k] = held.with_other(unit)
                break
        else:
            bins.append(unit)
    return bins


def _apart(units: list[list[Unit]], work: Work, budget: int) -> list[list[Unit]]:
    """Groups on several ranks: single sequences moved from the busiest rank to the least busy while that helps."""
    ranks = [_Rank(work) for _ in units]
    for rank, of_rank in zip(ranks, units, strict=True):
        for i in (i for unit in of_rank for i in unit.places):
            rank.put(i)
    enough = UNEVEN * sum(rank.tokens for rank in ranks) / len(ranks)
    while (busiest := max(ranks, key=lambda rank: rank.tokens)).tokens > enough:
        idlest = min(ranks, key=lambda rank: rank.tokens)
        most, i = min((max(busiest.without(i), idlest.plus(i)), i) for i in busiest.places)
        if most >= busiest.tokens:
            break
        busiest.drop(i)
        idlest.put(i)
    return [_fill(work.units(rank.places, budget), budget, work.packed) for rank in ranks]


@dataclass
class _Rank:
    """A rank's sequences and their tokens. It has what a group shares once: a sequence is cheaper beside its own."""

    work: Work
    places: Places = field(default_factory=list)
    tokens: int = 0
    of_group: dict[int, int] = field(default_factory=dict)

    def plus(self, i: int) -> int:
        return self.tokens + self._own(i, alone=self.of_group.get(self.work.group[i], 0) == 0)

    def without(self, i: int) -> int:
        return self.tokens - self._own(i, alone=self.of_group[self.work.group[i]] == 1)

    def put(self, i: int) -> None:
        self.tokens = self.plus(i)
        self.places.append(i)
        self.of_group[self.work.group[i]] = self.of_group.get(self.work.group[i], 0) + 1

    def drop(self, i: int) -> None:
        self.tokens = self.without(i)
        self.places.remove(i)
        self.of_group[self.work.group[i]] -= 1

    def _own(self, i: int, *, alone: bool) -> int:
        return self.work.tokens[i] - (0 if alone else round((1 - COPY) * self.work.heads[i]))


def _by_length(work: Work, budget: int, ranks: int) -> list[list[Unit]]:
    """Padded micro-batches of equally long sequences: as many as the budget needs, equally many on every rank, and none
    larger than it has to be."""
    longest_first = sorted(range(len(work.tokens)), key=lambda i: -work.tokens[i])
    cut = _cut_by_length(longest_first, work, budget)
    wanted = math.ceil(len(cut) / ranks) * ranks
    low, high = sum(work.tokens) // wanted, budget
    while high - low > max(1, FINE * low):
        middle = (low + high) // 2
        tried = _cut_by_length(longest_first, work, middle)
        if len(tried) <= wanted:
            cut, high = tried, middle
        else:
            low = middle
    return [cut[rank::ranks] for rank in range(ranks)]


def _cut_by_length(longest_first: Places, work: Work, budget: int) -> list[Unit]:
    """Neighbours in the order of length in micro-batches of at most `budget`, or of one sequence."""
    cut = []
    start = 0
    while start < len(longest_first):
        longest = work.tokens[longest_first[start]]
        places = longest_first[start : start + max(1, budget // longest)]
        cut.append(Unit(places, len(places) * longest, longest))
        start += len(places)
    return cut


def _uneven(dealt: list[list[Unit]]) -> float:
    """The busiest rank's tokens over the mean, in packed rows."""
    load = [sum(unit.tokens for unit in of_rank) for of_rank in dealt]
    return max(load) * len(load) / sum(load)


def _cost(dealt: list[list[Unit]], work: Work, again: float) -> float:
    """The busiest rank's tokens, those of a second forward pass counted as well."""
    home: dict[int, int] = {}
    split: set[int] = set()
    for number, unit in enumerate(unit for of_rank in dealt for unit in of_rank):
        for group in {work.group[i] for i in unit.places}:
            if home.setdefault(group, number) != number:
                split.add(group)
    costs = []
    for of_rank in dealt:
        sizes = [unit.laid_out(work.packed) for unit in of_rank]
        twice = [
            size
            for size, unit in zip(sizes, of_rank, strict=True)
            if not split.isdisjoint(work.group[i] for i in unit.places)
        ]
        costs.append(sum(sizes) + again * (sum(twice) - max(twice, default=0)))
    return max(costs)
