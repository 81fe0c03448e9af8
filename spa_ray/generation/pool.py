"""The pool's size while a pass runs: Ray Data adds engines up to `resources.engines.max` when those it has are full.

Never: the engines themselves, nor how many nodes there are (the cluster's autoscaler follows what the pool asks for).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ray.data import DataContext

FULL = 1.0  # blocks handed to an engine, over those that it works on at once


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
