"""ORPO (Hong et al. 2024): cross-entropy on the chosen response and a log odds ratio, without a reference model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from spa_ray.methods.pairwise import PairwiseConfig, PairwiseMethod
from spa_ray.training.method import LossInputs, Stats

if TYPE_CHECKING:
    from torch import Tensor


class ORPOConfig(PairwiseConfig):
    beta: float = Field(0.1, gt=0, description="the paper's λ, under TRL's name")
    lr: float = Field(8e-6, gt=0)


class ORPO(PairwiseMethod[ORPOConfig]):
    """-chosen - β log σ(log odds ratio) over mean log-probs (Eq. 6 and 7)."""

    Config = ORPOConfig
    known_lr = (1e-6, 8e-6)  # TRL's default; Hong et al. 2024
    stats = (*PairwiseMethod.stats, "nll_loss", "log_odds_chosen", "log_odds_ratio")

    def loss(self, inputs: LossInputs) -> tuple[Tensor, Stats]:
        from torch.nn import functional as F

        from spa_ray.training.losses import log_odds_ratio, orpo_loss

        beta = self.config.beta
        chosen, rejected = inputs.mean_logps()
        losses = orpo_loss(chosen, rejected, beta=beta, weights=inputs.weights)
        log_odds = log_odds_ratio(chosen, rejected).detach()
        # TRL's names: its log_odds_ratio is the log-sigmoid of what it calls log_odds_chosen.
        also = {"nll_loss": -chosen.detach(), "log_odds_chosen": log_odds, "log_odds_ratio": F.logsigmoid(log_odds)}
        return losses, {**self.pair_stats(chosen, rejected, beta * chosen, beta * rejected), **also}
