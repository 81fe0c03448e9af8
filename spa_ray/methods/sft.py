"""SFT: cross-entropy on the chosen responses, each distinct one once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from spa_ray.config.training import Train
from spa_ray.training.method import LossInputs, Method, Stats

if TYPE_CHECKING:
    from torch import Tensor


class SFTConfig(Train):
    beta: float = Field(0.0, ge=0, description="not read")
    gamma: float = Field(0.0, description="not read")
    lr: float = Field(1e-5, gt=0)


class SFT(Method[SFTConfig]):
    """The mean negative log-prob of a response's tokens."""

    Config = SFTConfig
    known_lr = (5e-6, 2e-5)  # Zephyr and Tülu 3 8B; TRL's default
    sides = ("chosen",)
    stats = ("logps/chosen",)

    def loss(self, inputs: LossInputs) -> tuple[Tensor, Stats]:
        from spa_ray.training.losses import sft_loss

        at = inputs.sides[:, 0]
        losses = sft_loss(inputs.summed[at], inputs.counts[at], weights=inputs.weights)
        return losses, {"logps/chosen": inputs.mean_logps()[0].detach()}
