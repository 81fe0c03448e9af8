"""Which pair goes to which optimizer step, decided before training starts.

Comes in: gaps, prompts, a seed and sizes. Goes out: an `Order` and weights. Never: tokens, tensors, files, models.
What a step contains depends on the seed alone; `deal` only cuts it up over ranks and micro-batches, so the loss is the
same for any number of ranks and any micro-batch size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float, Int

from spa_ray.errors import InputError

# Independent random streams of one seed.
ORDER, SUBSET, LABELS, PROMPTS = 0, 1, 2, 3


@dataclass(frozen=True)
class Order:
    """The pairs in training order and the optimizer step of each; `epoch` is by step."""

    pairs: Int[np.ndarray, " entries"]
    step: Int[np.ndarray, " entries"]
    epoch: Int[np.ndarray, " steps"]

    @property
    def steps(self) -> int:
        return len(self.epoch)

    @property
    def starts(self) -> Int[np.ndarray, " steps_plus_1"]:
        """Where each step's entries begin, and the number of all entries."""
        return np.searchsorted(self.step, np.arange(self.steps + 1))


def stream(seed: int, *key: int) -> np.random.Generator:
    """The generator of one named random stream of a run."""
    return np.random.default_rng([seed & 0xFFFFFFFFFFFFFFFF, *key])


def order_pairs(
    n: int,
    *,
    seed: int,
    batch_size: int,
    epochs: float,
    max_steps: int | None,
    prompts: Int[np.ndarray, " pairs"] | None = None,
) -> Order:
    """Shuffle every epoch anew and cut it into steps; an epoch's last step may be short, and no step spans two epochs.

    Without `prompts` pairs are shuffled alone. With `prompts`, each pair's, prompts are shuffled and so are the pairs
    of each, which stay together: a step then has few prompts, and many of its pairs share their sequences. A prompt
    that a step cuts goes on in the next one. A fractional epoch takes the first share of its permutation. `max_steps`
    replaces `epochs`: exactly that many steps, over as many epochs as they need. Raises: InputError without pairs.
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
        order = stream(seed, ORDER, epoch).permutation(n)
        if prompts is not None:
            turn = stream(seed, PROMPTS, epoch).permutation(int(prompts.max()) + 1)
            order = order[np.argsort(turn[prompts[order]], kind="stable")]
        chunks.append(order[:take])
        step_of.append(first_step + np.arange(take) // batch_size)
        steps = math.ceil(take / batch_size)
        epoch_of.append(np.full(steps, epoch))
        first_step += steps
    return Order(np.concatenate(chunks), np.concatenate(step_of), np.concatenate(epoch_of))


def step_weights(
    order: Order,
    gap: Float[np.ndarray, " pairs"],
    weigh: Callable[[Float[np.ndarray, " some"]], Float[np.ndarray, " some"]],
) -> Float[np.ndarray, " entries"]:
    """The pairs' weights: `weigh` of the gaps of each complete optimizer step."""
    weights = np.empty(len(order.pairs))
    for start, stop in pairwise(order.starts):
        weights[start:stop] = weigh(gap[order.pairs[start:stop]])
    return weights
