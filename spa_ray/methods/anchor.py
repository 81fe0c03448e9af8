"""SPA with an anchor: cross-entropy on the chosen responses beside SPA's loss, as CPO and RPO have it.

SPA and SimPO have no reference model, so nothing keeps the chosen responses' own probability from falling while the
margin grows (docs/THEORY.md). Not in the paper.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from spa_ray.methods.simpo import SimPOConfig
from spa_ray.methods.spa import SPA
from spa_ray.training.method import LossInputs, Stats

if TYPE_CHECKING:
    from torch import Tensor


class AnchoredConfig(SimPOConfig):
    anchor: float = Field(0.1, ge=0, description="weight of the chosen's mean cross-entropy (cpo_alpha, rpo_alpha)")


class Anchored(SPA):
    """SPA's loss - anchor · chosen, the chosen response's mean log-prob; every pair's anchor weighs alike."""

    Config = AnchoredConfig
    config: AnchoredConfig
    stats = (*SPA.stats, "nll_loss")

    def loss(self, inputs: LossInputs) -> tuple[Tensor, Stats]:
        losses, stats = super().loss(inputs)
        chosen, _ = inputs.mean_logps()
        return losses - self.config.anchor * chosen, {**stats, "nll_loss": -chosen.detach()}
