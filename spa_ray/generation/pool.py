"""A pass's pool of engines: how many, how many blocks each works on, and when Ray Data adds one.

Never: the engines themselves, nor how many nodes there are (the cluster's autoscaler follows what the pool asks for).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ray.data import ActorPoolStrategy, DataContext

from spa_ray.config.models import Config

FULL = 1.0  # blocks handed to an engine, over those that it works on at once
SHARE_BLOCKS = 4  # of a small set, that each engine gets at least
SPARE_BLOCKS = 3  # a block waits for its slowest rows: with one to spare, a tenth of the engine's places stood empty


def blocks_in_engine(concurrency: int, rows_per_block: int) -> int:
    """Blocks that an engine works on at once: enough that rows of others wait at the gate when a block is nearly done.

    The gate holds the engine to `concurrency` prompts. These blocks are what an engine's death repeats at most.
    """
    return SPARE_BLOCKS + math.ceil(concurrency / rows_per_block)


@dataclass(frozen=True)
class Layout:
    """How a pass's rows are spread: at least `least` and at most `most` engines, `rows_per_block` rows in a block, and
    at most `blocks` blocks in an engine at once, with `queued` more that wait at its actor."""

    least: int
    most: int
    rows_per_block: int
    blocks: int
    queued: int

    @property
    def pool(self) -> ActorPoolStrategy:
        return ActorPoolStrategy(
            min_size=self.least,
            max_size=self.most,
            max_concurrent_calls_per_actor=self.blocks,
            max_tasks_in_flight_per_actor=self.blocks + self.queued,
        )


def layout(config: Config, rows: int) -> Layout:
    """The layout of a pass over `rows` rows.

    Ray Data hands blocks to the first engine that is ready, so an engine takes no more than its share of a small set:
    the engines that start later find theirs, and one that never starts holds up nobody, since its share is taken by
    the others once theirs is done. A small set is cut into small blocks, so that the shares are even and rows are
    committed early. Beyond `engines.min`, an engine is started for a quarter of its places, not for less.
    """
    engines, limit = config.resources.engines, config.generation.rows_per_block
    worth = math.ceil(rows / math.ceil(config.resources.concurrency / 4))
    most = max(1, min(engines.max, max(engines.min, worth), rows))
    size, share = min(
        (_share(rows, most, limit, blocks) for blocks in range(SHARE_BLOCKS, 2 * SHARE_BLOCKS + 1)),
        key=lambda found: found[0] * found[1],  # the rows of the engine that has most
    )
    blocks = blocks_in_engine(config.resources.concurrency, size)
    return Layout(min(engines.min, most), most, size, min(blocks, share), queued=1 if share > blocks else 0)


def _share(rows: int, engines: int, limit: int, blocks: int) -> tuple[int, int]:
    """Rows per block, at most `limit`, for at least `blocks` blocks per engine; and the blocks of an engine's share."""
    size = max(1, min(limit, math.ceil(rows / (engines * blocks))))
    return size, max(1, math.ceil(math.ceil(rows / size) / engines))


@contextmanager
def growing_pool() -> Iterator[None]:
    """For the pass, an engine with all its concurrent blocks counts as full; afterwards the context is as it was.

    Ray's own mark is 1.75: a backlog that an engine here never gets (one block waits at it, no more, so that its death
    repeats little), and with which a pool would stay at its minimum for ever.
    """
    scaling = DataContext.get_current().autoscaling_config
    before = scaling.actor_pool_util_upscaling_threshold
    scaling.actor_pool_util_upscaling_threshold = FULL
    try:
        yield
    finally:
        scaling.actor_pool_util_upscaling_threshold = before
