"""What a run may spend before it stops."""

from __future__ import annotations

from pydantic import Field

from spa_ray.config.section import Section


class Budget(Section):
    """What all calls of a run may spend together; then it stops with exit status 1, and goes on where there is more.
    No stage's key covers it. docs/JUDGES.md says what is counted and when it is looked at."""

    usd: float | None = Field(
        None, gt=0, description="endpoints by their `price`, and GPU-hours by `resources.price_per_gpu_hour`"
    )
    tokens: int | None = Field(None, gt=0, description="of engines and endpoints, prompts and answers")
    hours: float | None = Field(None, gt=0, description="that stages work, by the clock")
