"""The base of every section of a config, and of the sections of judges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of every section: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class JudgeSection(Section):
    """What all kinds of judges say of themselves: nothing else in the package asks for a judge's kind."""

    kind: str
    asks_engine: ClassVar[bool] = False  # whether judging is work of the engine that answers, or of one of its kind
    own_pass: ClassVar[bool] = False  # whether it is a model that takes the policy's place, in a pass of its own
    reads_prompts: ClassVar[bool] = False  # whether it is asked by `scoring`'s prompts

    @property
    def only_mode(self) -> str | None:
        """The `scoring.mode` that it can be asked in."""
        return None

    @property
    def on_scale(self) -> bool:
        """Whether its scores are on `scoring.scale`."""
        return True

    @property
    def folder(self) -> str | None:
        """Of the model with a pass of its own; None: the model before training."""
        return None

    @property
    def on_gpu(self) -> bool:
        """Whether it computes on a GPU of the engine's machine without being an engine."""
        return False

    def bill(self, work: Mapping[str, float], *, seconds: float = 0.0) -> dict[str, float | None]:
        """For `requests`, `prompt_tokens` and `generated_tokens` that no engine of ours answers, each request in so
        many seconds: `usd`, null without a price, and the `seconds` that its limits make of all of them. Empty where
        our engines answer all."""
        return {}

    def plugs(self) -> list[str]:
        """Dotted paths of the user's own code."""
        return []

    def key(self) -> Any:
        """What a stage's key covers of it; None where the rest of the key says it all."""
        return None
