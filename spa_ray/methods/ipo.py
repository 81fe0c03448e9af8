"""IPO (Azar et al. 2023, Eq. 17): a squared loss towards a margin of 1 / (2β)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spa_ray.methods.dpo import DPOConfig
from spa_ray.methods.pairwise import PairwiseMethod
from spa_ray.training.method import LossInputs, Stats

if TYPE_CHECKING:
    from torch import Tensor


class IPO(PairwiseMethod[DPOConfig]):
    """(h - 1/(2β))², h the difference of chosen and rejected over their references, of mean log-probs.

    β is the paper's τ. The paper trains no language model: the defaults are TRL's τ and DPO's learning rate.
    """

    Config = DPOConfig
    known_lr = (3e-7, 1e-6)  # SimPO's tuned IPO, from the same grid as its DPO
    needs_reference = True

    def loss(self, inputs: LossInputs) -> tuple[Tensor, Stats]:
        from spa_ray.training.losses import ipo_loss

        beta = self.config.beta
        (chosen, rejected), (ref_chosen, ref_rejected) = inputs.mean_logps(), inputs.reference_logps(mean=True)
        losses = ipo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=beta, weights=inputs.weights)
        rewards = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
        return losses, self.pair_stats(chosen, rejected, *rewards)
