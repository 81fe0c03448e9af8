"""SGA_DPO: DPO behind the chosen answer's scores, the reference behind the same, and the head's squared error."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spa_ray.methods.dpo import dpo_of
from spa_ray.methods.pairwise import PairwiseMethod
from spa_ray.methods.sga import SGA, SGAConfig
from spa_ray.training.method import LossInputs, Stats

if TYPE_CHECKING:
    from torch import Tensor


class SGADPO(SGA[SGAConfig]):
    """DPO(chosen, rejected | prompt, scores) + λ · (sensed - scores)²."""

    Config = SGAConfig
    known_lr = (3e-7, 2e-6)  # DPO's; the paper's 1e-5 with adapters on 1 to 8 B
    sides = ("chosen", "rejected", "sensed")
    needs_reference = True
    stats = (*PairwiseMethod.stats, *SGA.head_stats)

    def loss(self, inputs: LossInputs) -> tuple[Tensor, Stats]:
        losses, stats = dpo_of(inputs, self.config.beta)
        sensing, of_head = self.sensing_loss(inputs)
        return losses + sensing, {**stats, **of_head}
