"""DPO (Rafailov et al. 2023) on SPA's pairs, SPA's Eq. 7."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from spa_ray.methods.pairwise import PairwiseConfig, PairwiseMethod
from spa_ray.training.method import LossInputs, Stats

if TYPE_CHECKING:
    from torch import Tensor


class DPOConfig(PairwiseConfig):
    beta: float = Field(0.1, gt=0)
    lr: float = Field(5e-7, gt=0)


def dpo_of(inputs: LossInputs, beta: float) -> tuple[Tensor, Stats]:
    """DPO's losses and statistics; `chosen` and `rejected` are the first sides."""
    from spa_ray.training.losses import dpo_loss

    (chosen, rejected, *_), (ref_chosen, ref_rejected, *_) = inputs.summed_logps(), inputs.reference_logps()
    losses = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=beta, weights=inputs.weights)
    rewards = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    return losses, PairwiseMethod.pair_stats(chosen, rejected, *rewards)


class DPO(PairwiseMethod[DPOConfig]):
    """-log σ(β [(chosen - its reference) - (rejected - its reference)]) over summed log-probs."""

    Config = DPOConfig
    known_lr = (3e-7, 1e-6)  # SimPO's tuned DPO 3e-7 to 7e-7, Tülu 3 8B 5e-7; TRL's default and Rafailov et al. 1e-6
    needs_reference = True

    def loss(self, inputs: LossInputs) -> tuple[Tensor, Stats]:
        return dpo_of(inputs, self.config.beta)
