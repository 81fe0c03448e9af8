"""Seeds: a stable hash of what is being drawn, never of a position, an actor or a batch.

So the same run seed gives the same draws for any pool size, batch size or interruption.
"""

from __future__ import annotations

import hashlib
import json

BITS = 63  # fits an int64


def seed_for(
    run_seed: int,
    iteration: int,
    prompt_id: str,
    role: str,
    *,
    response: int = 0,
    objective: str = "",
    draw: int = 0,
    attempt: int = 0,
) -> int:
    """The seed of one request, in [0, 2**63). `role` is sample, score, refine or answer; `attempt` counts tries."""
    key = json.dumps([run_seed, iteration, prompt_id, role, response, objective, draw, attempt], ensure_ascii=False)
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> (64 - BITS)
