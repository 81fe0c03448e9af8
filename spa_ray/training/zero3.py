"""Building a model under ZeRO-3 so that no rank ever holds all of it.

`partitioned` is a context manager around the model's construction; it takes DeepSpeed's config. All ranks enter it
together and build the same model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# DeepSpeed's own limits of what is gathered at a time, in elements.
MAX_LIVE = 1_000_000_000
MAX_PREFETCH = 50_000_000


def gathered_at_once(parameters: int) -> dict[str, int]:
    """Limits, in elements, of what ZeRO-3 keeps gathered and fetches ahead: a 32nd of the model, about one layer.

    DeepSpeed's own limits alone would let a model of a billion parameters be gathered completely in every pass.
    """
    live = min(MAX_LIVE, parameters // 32)
    return {
        "stage3_max_live_parameters": live,
        "stage3_max_reuse_distance": live,
        "stage3_prefetch_bucket_size": min(MAX_PREFETCH, live // 2),
    }


@contextmanager
def partitioned(deepspeed_config: dict[str, Any]) -> Iterator[None]:
    """A model that is built inside this block is partitioned over the ranks from the start, if the config is ZeRO-3's.

    transformers looks for DeepSpeed's config in a global when it builds and fills a model: each parameter is cut up as
    soon as it exists, and the tensors of the weight files (mapped, not read) are gathered, filled on rank 0 and cut up
    again, one module at a time. Without it every rank would hold the complete model until DeepSpeed's engine partitions
    it. Outside of the block models are built as usual: rank 0 alone merges adapters. Other stages: does nothing.
    """
    if deepspeed_config["zero_optimization"]["stage"] < 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    alive = HfDeepSpeedConfig(deepspeed_config)  # transformers keeps a weak reference to it
    try:
        yield
    finally:
        del alive
