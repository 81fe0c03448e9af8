"""CPO, Controllable Preference Optimization, its SFT (Guo et al. 2024): every completion behind its raw ratings.

`< helpfulness: 5 > < honesty: 3 > x`, and at inference the highest rating of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field

from spa_ray.errors import InputError
from spa_ray.methods.completions import Completions
from spa_ray.methods.scores import last_turn
from spa_ray.methods.sft import SFTConfig
from spa_ray.training.method import Messages


class CPOConfig(SFTConfig):
    epochs: float = Field(3.0, gt=0)
    train_on_inputs: bool = Field(True, description="cross-entropy on the prompt's tokens too")


class CPO(Completions):
    """SFT, on the prompt's tokens as well."""

    Config = CPOConfig
    config: CPOConfig
    known_lr = (5e-6, 2e-5)  # SFT's; the paper's 1e-5 on all weights
    needs_ranges = True

    @property
    def span(self) -> Literal["response", "all"]:
        return "all" if self.config.train_on_inputs else "response"

    def render(self, messages: Messages, scores: Sequence[float] | None, state: Any) -> Messages:
        if scores is None:
            return messages
        if not np.isfinite(scores).all():
            raise InputError(f"train.method: {self.config.method}: finite scores are needed, got {list(scores)}")
        ratings = zip(state["objectives"], scores, strict=True)
        return last_turn(messages, before="".join(f"< {name}: {value:g} > " for name, value in ratings))

    def wanted(self) -> Sequence[float]:
        return [high for _, high in self.state["ranges"]]
