"""What benchmarks that a judge reads have in common: their judge, and asking it until its verdict reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pydantic import Field, model_validator

from spa_ray.config.endpoint import Endpoint
from spa_ray.config.judge import JudgeKinds, Policy, judge_section
from spa_ray.config.section import JudgeSection
from spa_ray.evaluation.benchmarks.common import NamedConfig
from spa_ray.generation.benchmark import Ask

T = TypeVar("T")


class JudgedConfig(NamedConfig):
    judge: str | JudgeKinds = Field(description="a section of kind endpoint, or `self`: the model under test itself")
    judge_max_tokens: int = Field(2048, ge=1, description="of a judgement, its explanation included")
    retries: int = Field(2, ge=0, description="further tries after a judgement that cannot be read")

    @property
    def judged_by(self) -> JudgeSection:
        return judge_section(self.judge)

    @model_validator(mode="after")
    def _writes_text(self) -> JudgedConfig:
        if not isinstance(self.judged_by, Policy | Endpoint):
            raise ValueError(
                f"judge: one of kind {self.judged_by.kind} cannot be asked here; give one of kind endpoint, or self"
            )
        return self


async def judged(ask: Ask, text: str, read: Callable[[str], T | None], config: JudgedConfig) -> Mapping[str, Any]:
    """`verdict`, None where no try could be read, and the `text` of the last."""
    said = ""
    for attempt in range(1 + config.retries):
        found = await ask.judge(
            [{"role": "user", "content": text}], attempt=attempt, max_tokens=config.judge_max_tokens
        )
        said = found.text
        if (verdict := read(said)) is not None:
            return {"verdict": verdict, "text": said}
    return {"verdict": None, "text": said}
