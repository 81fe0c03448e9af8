"""The section `steer` of an arm: which scores a model that is conditioned on scores is asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator

from spa_ray.config.section import Section


class Steer(Section):
    """Which scores are asked of a model whose prompts say them (STEERING.md). `sense` or `none` alone, or a mapping:
    `NAME: value` for any objective of the model, from 0, the lowest end of its range, to 1, the highest; the others are
    sensed, or what the method asks for by itself."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Any]

    how: Literal["sense", "none"] = Field(
        "sense", description="none: the prompt as it is, without scores; written `steer: none`"
    )
    column: str | None = Field(
        None, description="a column of the prompts that holds {NAME: value} for each; null: none does"
    )
    floors: dict[str, float] = Field(
        default_factory=dict, description="objective -> the least that is asked for, in [0, 1]"
    )
    discretize: bool = Field(False, description="round sensed scores to 0, 0.25, 0.5, 0.75 and 1")

    WORDS: ClassVar[tuple[str, ...]] = ("sense", "none")

    @model_validator(mode="before")
    @classmethod
    def _one_word(cls, given: Any) -> Any:
        if isinstance(given, str):
            if given not in cls.WORDS:
                raise ValueError(f"{given!r} is not sense, none, or a mapping such as {{helpful: 0.9}}")
            return {"how": given}
        return given

    @model_validator(mode="after")
    def _in_the_unit_interval(self) -> Steer:
        for where, values in (("", self.values), ("floors: ", self.floors)):
            check_values(values, where=where)
        if self.values and self.column:
            raise ValueError(f"column: {self.column!r} gives the scores; remove {next(iter(self.values))}")
        if self.how == "none" and (self.values or self.column or self.floors):
            raise ValueError("none asks for no scores; remove the other keys, or how")
        return self

    @property
    def values(self) -> dict[str, float]:
        """Objective -> what is asked of it for every prompt."""
        return self.model_extra or {}

    @property
    def names(self) -> list[str]:
        """The objectives that the section names."""
        return sorted({*self.values, *self.floors})

    @property
    def is_default(self) -> bool:
        return self == Steer()


def check_values(values: Mapping[str, Any], *, where: str = "") -> None:
    """Raises: ValueError for what is no number in [0, 1]."""
    for name, value in values.items():
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or not 0 <= value <= 1:
            raise ValueError(f"{where}{name}: {value!r} is no number from 0 to 1, the ends of the objective's range")
