"""A pass's pool of engines: how many, how many blocks each works on, and when Ray Data adds one.

Never: the engines themselves, nor how many nodes there are (the cluster's autoscaler follows what the pool asks for).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from ray.data import ActorPoolStrategy, DataContext

from spa_ray.config.models import Config

FULL = 1.0  # blocks handed to an engine, over those that it works on at once
SPARE_BLOCKS = 3  # a block waits for its slowest rows: with one to spare, a tenth of the engine's places stood empty


def blocks_in_engine(concurrency: int, rows_per_block: int) -> int:
    """Blocks that an engine works on at once: enough that rows of others wait at the gate when a block is nearly done.

    The gate holds the engine to `concurrency` prompts. These blocks are what an engine's death repeats at most.
    """
    return SPARE_BLOCKS + math.ceil(concurrency / rows_per_block)


def engine_pool(config: Config) -> ActorPoolStrategy:
    engines = config.resources.engines
    blocks = blocks_in_engine(config.resources.concurrency, config.generation.rows_per_block)
    return ActorPoolStrategy(
        min_size=engines.min,
        max_size=engines.max,
        max_concurrent_calls_per_actor=blocks,
        max_tasks_in_flight_per_actor=blocks + 1,  # one more waits at the actor
    )


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
