"""The section `evaluation.pairwise`: two answers to one prompt compared, by which judge and how it is asked."""

from __future__ import annotations

from pydantic import Field, model_validator

from spa_ray.config.judge import JudgeKinds, judge_section
from spa_ray.config.rollout import Compare
from spa_ray.config.section import JudgeSection

REFERENCE = "reference"  # what every arm is compared with where the prompts bring an answer of their own

PROTOCOL = 1  # of the built-in prompts, how they are read, and the rule of both orders


class Pairwise(Compare):
    """Every model's answers against one other's."""

    against: str = Field(
        "vanilla",
        description="`vanilla` (the model before training), an arm, or `reference`: an answer that each prompt brings",
    )
    reference: str = Field(REFERENCE, description="the prompts' column with that answer, of HelpSteer2 `response`")
    judge: str | JudgeKinds = Field(
        "base",
        description="as `evaluation.judge`, or a class derived from `spa_ray.PairwiseJudge`; one that scores single"
        " answers gives the higher score the win, and equal ones are a tie",
    )
    both_orders: bool = Field(
        True, description="ask with either answer first; the same winner twice is a win, all else a tie"
    )

    @property
    def judged_by(self) -> JudgeSection:
        return judge_section(self.judge)

    @model_validator(mode="after")
    def _fits_its_judge(self) -> Pairwise:
        only = self.judged_by.only_mode
        if only not in (None, self.mode):
            raise ValueError(f"a judge of kind {self.judged_by.kind} is asked in mode {only}, not {self.mode}")
        return self
