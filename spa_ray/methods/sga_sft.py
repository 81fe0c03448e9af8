"""SGA_SFT: cross-entropy on the chosen answers behind their scores, and the head's squared error."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from spa_ray.methods.sga import SGA, SGAConfig
from spa_ray.training.method import LossInputs, Stats

if TYPE_CHECKING:
    from torch import Tensor


class SGASFTConfig(SGAConfig):
    ce_reduction: Literal["sum", "token_mean"] = Field("sum", description="of cross-entropy over an answer's tokens")


class SGASFT(SGA[SGASFTConfig]):
    """-log π(chosen | prompt, scores) + λ · (sensed - scores)²."""

    Config = SGASFTConfig
    known_lr = (1e-6, 2e-5)  # SFT's upper end; the paper's 1e-5 with adapters on 1 to 8 B
    sides = ("chosen", "sensed")
    stats = ("logps/chosen", *SGA.head_stats)

    def loss(self, inputs: LossInputs) -> tuple[Tensor, Stats]:
        chosen, _ = inputs.summed_logps() if self.config.ce_reduction == "sum" else inputs.mean_logps()
        sensing, stats = self.sensing_loss(inputs)
        return sensing - inputs.weights * chosen, {"logps/chosen": inputs.mean_logps()[0].detach(), **stats}
