"""What benchmarks that a judge reads have in common: their judge, and asking it until its verdict reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import Field, model_validator

from spa_ray.config.judge import JudgeKinds, judge_section
from spa_ray.config.section import JudgeSection
from spa_ray.evaluation.benchmarks.common import NamedConfig
from spa_ray.generation.benchmark import Ask

T = TypeVar("T")


class JudgedConfig(NamedConfig):
    judge: str | JudgeKinds = Field(
        description="a section of kind endpoint, function or reward, or `self`: the model under test itself"
    )
    judge_max_tokens: int = Field(2048, ge=1, description="of a judgement, its explanation included")
    retries: int = Field(2, ge=0, description="further tries after a judgement that cannot be read")

    @property
    def judged_by(self) -> JudgeSection:
        return judge_section(self.judge)

    @model_validator(mode="after")
    def _beside_the_model(self) -> JudgedConfig:
        if self.judged_by.own_pass:
            raise ValueError(
                f"judge: one of kind {self.judged_by.kind} takes the place of the model under test; give one of kind "
                "endpoint, function or reward, or self"
            )
        return self

    @property
    def writes_text(self) -> bool:
        """Whether the judge is asked by a benchmark's prompt."""
        return self.judged_by.reads_prompts


async def judged(ask: Ask, text: str, read: Callable[[str], T | None], config: JudgedConfig) -> Mapping[str, Any]:
    """What a judge that is asked `text` says: `verdict`, None where no try could be read, and the `text` of the
    last."""
    said = ""
    for attempt in range(1 + config.retries):
        found = await ask.judge(
            [{"role": "user", "content": text}], attempt=attempt, max_tokens=config.judge_max_tokens
        )
        said = found.text
        if (verdict := read(said)) is not None:
            return {"verdict": verdict, "text": said}
    return {"verdict": None, "text": said}


async def rated(ask: Ask, turns: Sequence[Mapping[str, str]]) -> Mapping[str, Any]:
    """The same of a judge that gives the last of these turns a number from 1 to 10; another one is no verdict."""
    found = await ask.rate(turns[:-1], turns[-1]["content"])
    if found.score is not None and not 1 <= found.score <= 10:
        return {"verdict": None, "text": f"{found.score:g} is off the scale 1..10; a reward model needs a transform"}
    return {"verdict": found.score, "text": found.text if found.status == "ok" else found.status}


async def compared(
    ask: Ask, turns: Sequence[Mapping[str, str]], answers: tuple[str, str], names: Mapping[str, T]
) -> Mapping[str, Any]:
    """The same of a judge that says which of two answers is better; `names` of `a`, `b` and `tie`."""
    found = await ask.compare(turns, *answers)
    verdict = None if found.winner is None else names[found.winner]
    return {"verdict": verdict, "text": found.text if found.status == "ok" else found.status}
