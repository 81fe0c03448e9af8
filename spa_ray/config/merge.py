"""The section `merge` of an arm: its model is the weighted mean of other arms' models (Reward Soups)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from spa_ray.config.section import Section


class Merge(Section):
    """A model that is the weighted mean of other arms' models, all tuned from one (Reward Soups)."""

    of: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(
        min_length=1, description="arm -> weight, as 9 and 1; they are divided by their sum"
    )
    what: Literal["weights", "adapters"] = Field(
        "weights",
        description="the complete weights, a shard at a time; or of LoRA arms the adapters' products B·A, which the"
        " soup keeps as one adapter beside its merged weights",
    )

    @field_validator("of")
    @classmethod
    def _weigh_something(cls, given: dict[str, float]) -> dict[str, float]:
        if not any(given.values()):
            raise ValueError("all weights are 0; give one of them more")
        return given

    @property
    def shares(self) -> dict[str, float]:
        """The weights, divided by their sum."""
        total = sum(self.of.values())
        return {arm: weight / total for arm, weight in self.of.items()}
