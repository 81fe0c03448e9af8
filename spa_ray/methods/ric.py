"""RiC, Rewards-in-Context (Yang et al. 2024): SFT on every completion behind its rewards, as z-scores of one decimal.

`x <rm1_score> 0.7 <rm2_score> -1.2 `. At inference each reward is asked for by its share of a preference. The online
stage is a second iteration (docs/METHODS.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, NonNegativeFloat

from spa_ray.config.training import Lora
from spa_ray.errors import InputError
from spa_ray.methods.completions import SCORES, Completions
from spa_ray.methods.scores import checked, last_turn, shares
from spa_ray.methods.sft import SFTConfig
from spa_ray.training.method import Messages

DRAWS = 50_000  # of N(0, 1), whose lowest and highest bound the z-scores to ask for


class RiCConfig(SFTConfig):
    lr: float = Field(1.414e-4, gt=0)
    scheduler: Literal["cosine", "linear", "constant"] = Field("linear", description="after the warmup")
    lora: Lora | None = Lora(r=64, alpha=128, dropout=0.05)
    preference: dict[str, NonNegativeFloat] = Field(
        default_factory=dict, description="objective -> what it counts at inference; {}: all alike"
    )


class RiC(Completions):
    """SFT; the mean and the deviation of every objective over all completions are learnt from the pairs."""

    Config = RiCConfig
    config: RiCConfig
    known_lr = (5e-6, 2e-5)  # SFT's; with adapters the paper's 1.4e-4
    columns = (*Completions.columns, "prompt_id", "chosen_index", "rejected_index")

    def fit(self, table: pa.Table) -> Any:
        state = super().fit(table)
        shares(self.config.preference, state["objectives"], key="train.preference")
        every: dict[tuple[str, int], list[float]] = {}
        for scores, indices in zip(SCORES, ("chosen_index", "rejected_index"), strict=True):
            answers = zip(table.column("prompt_id").to_pylist(), table.column(indices).to_pylist(), strict=True)
            every |= dict(zip(answers, checked(table, scores, state).tolist(), strict=True))
        values = np.array(list(every.values()))
        for name, low, high in zip(state["objectives"], values.min(axis=0), values.max(axis=0), strict=True):
            if low == high:
                raise InputError(f"train.method: {self.config.method}: every answer has {name} {low:g}; leave it out")
        return {**state, "mean": values.mean(axis=0).tolist(), "std": values.std(axis=0).tolist()}

    def render(self, messages: Messages, scores: Sequence[float] | None, state: Any) -> Messages:
        if scores is None:
            return messages
        z = (np.array(scores, dtype=np.float64) - state["mean"]) / state["std"]
        if not np.isfinite(z).all():
            raise InputError(f"train.method: {self.config.method}: finite scores are needed, got {list(scores)}")
        rewards = "".join(f"<rm{k}_score> {value:.1f} " for k, value in enumerate(z.round(1) + 0.0, 1))  # no -0.0
        return last_turn(messages, behind=f" {rewards}")

    def wanted(self) -> Sequence[float]:
        """R_k = w_k / ‖w‖₂ · (high - low) + low, in the scores' own units."""
        weights = np.array(shares(self.config.preference, self.state["objectives"], key="train.preference"))
        draws = np.random.default_rng(0).standard_normal((DRAWS, len(weights)))
        low, high = draws.min(axis=0), draws.max(axis=0)
        z = weights / np.linalg.norm(weights) * (high - low) + low
        found: list[float] = (np.array(self.state["mean"]) + np.array(self.state["std"]) * z).tolist()
        return found
