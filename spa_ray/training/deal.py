"""One optimizer step's distinct sequences, dealt to ranks and micro-batches.

Comes in: the step's pairs, and of every sequence its tokens and its prompt. Goes out: a `Step`. Never: ids, tensors,
files, models. A sequence is one (prompt, response), in however many pairs: it is computed once a step.

A loss needs both log-probs of a pair. Where they come from one micro-batch, its backward pass follows at once. Where
they do not, the micro-batch is `shared`: its log-probs go to all ranks first, so all but one of a rank's shared
micro-batches run forward twice. `deal` therefore keeps a prompt's sequences together where that costs less.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int

from spa_ray.training.balance import AGAIN, Dealt, deal
from spa_ray.training.batches import Order


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


def _sort_parts(
    dealt: Dealt, sides: Int[np.ndarray, "pairs sides"], n: int
) -> tuple[list[list[Part]], list[list[Part]], Int[np.ndarray, " shared_pairs"]]:
    """Every rank's shared and whole micro-batches, filled up with empty ones, and the pairs of the shared ones."""
    rank_of = [rank for rank, parts in enumerate(dealt) for _ in parts]
    parts = [places for of_rank in dealt for places in of_rank]
    homes = np.empty(n, dtype=np.int64)
    for number, places in enumerate(parts):
        homes[places] = number
    of_pair = homes[sides]
    is_shared = _shared(of_pair, rank_of)
    late = is_shared[of_pair[:, 0]]
    shared: list[list[Part]] = [[] for _ in dealt]
    whole: list[list[Part]] = [[] for _ in dealt]
    for number, (rank, places) in enumerate(zip(rank_of, parts, strict=True)):
        own = np.flatnonzero((of_pair[:, 0] == number) & ~late)
        (shared if is_shared[number] else whole)[rank].append(Part(np.array(places), own))
    nothing = np.empty(0, dtype=np.int64)
    for kind in (shared, whole):
        most = max(len(of_rank) for of_rank in kind)
        for of_rank in kind:
            of_rank += [Part(nothing, nothing)] * (most - len(of_rank))
    return shared, whole, np.flatnonzero(late)


def _shared(of_pair: Int[np.ndarray, "pairs sides"], rank_of: list[int]) -> Bool[np.ndarray, " parts"]:
    """Which micro-batches a pair has only one of its sequences in.

    Where there are such, every rank shares one: the only one of a rank runs once as any other does, and a rank without
    would have to run an empty one beside the others'.
    """
    shared = np.zeros(len(rank_of), dtype=bool)
    across = (of_pair != of_pair[:, :1]).any(axis=1)
    shared[of_pair[across].ravel()] = True
    if across.any():
        ranks = np.array(rank_of)
        first = np.unique(ranks, return_index=True)[1]
        shared[first[~np.isin(ranks[first], ranks[shared])]] = True
    return shared
