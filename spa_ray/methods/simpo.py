"""SimPO (Meng et al. 2024): no reference model, length-averaged log-probs, a target margin γ."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from spa_ray.methods.pairwise import PairwiseConfig, PairwiseMethod
from spa_ray.training.method import LossInputs, Stats

if TYPE_CHECKING:
    from torch import Tensor


class SimPOConfig(PairwiseConfig):
    beta: float = Field(2.5, gt=0)
    gamma: float = 1.375
    lr: float = Field(1e-6, gt=0)


class SimPO(PairwiseMethod[SimPOConfig]):
    """-log σ(β (chosen - rejected) - γ) over mean log-probs (SPA's ablation without weights)."""

    Config = SimPOConfig
    known_lr = (3e-7, 1e-6)  # SimPO's README: grid and released models; «1e-5 … completely repetitive responses»

    def loss(self, inputs: LossInputs) -> tuple[Tensor, Stats]:
        from spa_ray.training.losses import simpo_loss

        beta, gamma = self.config.beta, self.config.gamma
        chosen, rejected = inputs.mean_logps()
        losses = simpo_loss(chosen, rejected, beta=beta, gamma=gamma, weights=inputs.weights)
        return losses, self.pair_stats(chosen, rejected, beta * chosen, beta * rejected)
