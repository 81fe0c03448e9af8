"""The section `evaluation`: held-out prompts, who judges answers to them, and benchmarks."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator, model_validator

from spa_ray.config.benchmark import BenchmarkSection, named
from spa_ray.config.judge import JudgeKinds, judge_section
from spa_ray.config.pairwise import Pairwise
from spa_ray.config.prompts import Prompts
from spa_ray.config.rollout import EvalSampling, Scoring
from spa_ray.config.section import JudgeSection, Section

MAIN_JUDGE = "main"  # what `evaluation.judge` is called beside `evaluation.judges`


class Evaluation(Section):
    """Held-out prompts, answered once and scored by a judge that training never saw."""

    prompts: Prompts | None = Field(None, description="the main held-out set; null: no evaluation")
    families: dict[str, Prompts] = Field(default_factory=dict, description="further held-out sets, by name")
    judge: str | JudgeKinds = Field(
        "base",
        description="`base` (the model before training), `self`, a model folder or hub id, `module:judge`, or a section"
        " as `scoring.judge` has",
    )
    judges: dict[str, str | JudgeKinds] = Field(
        default_factory=dict,
        description="further judges of the same answers, each under a name of your own; as `evaluation.judge`",
    )
    pairwise: Pairwise | None = Field(None, description="answers compared in pairs; null: none are")
    objectives: tuple[str, ...] | None = Field(None, description="null: the run's objectives")
    scoring: Scoring | None = Field(
        None, description="how its judges rate, with defaults of its own; null: as `scoring`"
    )
    rv: int | None = Field(None, ge=1, description="prompts whose candidates `judge` scores as well, for the RV curve")
    sampling: EvalSampling = EvalSampling()
    unsafe_below: float = Field(
        5.0,
        description="score of the first objective, in the judge's units, below which an answer to a harmful prompt"
        " counts as unsafe",
    )
    bootstrap: int = Field(1000, ge=1, description="resamples of the 95% intervals")
    benchmarks: Annotated[dict[str, BenchmarkSection], BeforeValidator(named)] = Field(
        default_factory=dict, description="further measures by benchmarks, each under a name of your own"
    )

    @property
    def judged_by(self) -> JudgeSection:
        return judge_section(self.judge)

    @property
    def held_out(self) -> list[Prompts]:
        """All sets of prompts."""
        return [*([self.prompts] if self.prompts else []), *self.families.values()]

    @model_validator(mode="after")
    def _are_held_out(self) -> Evaluation:
        if self.scoring is not None and self.scoring.judge is not None:
            raise ValueError("scoring.judge: who judges is evaluation.judge; remove the key")
        if any(prompts.decontaminate for prompts in self.held_out):
            raise ValueError("prompts.decontaminate: of prompts to train on; remove the key")
        return self

    @property
    def all_judges(self) -> dict[str, JudgeSection]:
        """By their place in this section: `judge`, `judges.NAME`, `pairwise.judge`."""
        found = {"judge": self.judged_by, **{f"judges.{n}": judge_section(j) for n, j in self.judges.items()}}
        return found | ({"pairwise.judge": self.pairwise.judged_by} if self.pairwise else {})

    @field_validator("judges")
    @classmethod
    def _names_are_free(cls, given: dict[str, Any]) -> dict[str, Any]:
        for name in given:
            if name in (MAIN_JUDGE, "pairwise"):
                raise ValueError(f"{name} is what tables call a judge that is always there; give this one another name")
            if not re.fullmatch(r"[\w-]+", name):
                raise ValueError(f"{name!r} is no name of a judge: letters, digits, - and _")
        return given

    @field_validator("benchmarks")
    @classmethod
    def _names_are_plain(cls, given: dict[str, Any]) -> dict[str, Any]:
        for name in given:
            if not re.fullmatch(r"[\w-]+", name):  # it names a file and folders
                raise ValueError(f"{name!r} is no name of a benchmark: letters, digits, - and _")
        return given
