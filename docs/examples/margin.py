"""A training method that needs another model first: DPO on the pairs of the strict order, less a margin model's reward
for the last objective (the loss of MODPO, Zhou et al. 2024, Eq. 8, for two objectives)."""

from pydantic import Field

from spa_ray import LossInputs
from spa_ray.methods.dpo import DPO, DPOConfig


class MarginConfig(DPOConfig):
    share: float = Field(0.5, gt=0, le=1, description="of the first objective; the margin model has the rest")


class Margin(DPO):
    Config = MarginConfig
    stats = (*DPO.stats, "margins")

    def recipe(self, objectives):
        """DPO on the same episodes, by the least strict rule for which answer is better."""
        return {"margin": {"train.method": "spa_dpo", "train.lr": self.config.lr, "pairs.order": "pareto"}}

    def loss(self, inputs: LossInputs):
        from torch.nn.functional import logsigmoid

        beta, share = self.config.beta, self.config.share
        (chosen, rejected), (ref_chosen, ref_rejected) = inputs.summed_logps(), inputs.reference_logps()
        other_chosen, other_rejected = inputs.logps_of("margin")
        ours = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
        margins = beta * ((other_chosen - ref_chosen) - (other_rejected - ref_rejected))
        losses = -inputs.weights * logsigmoid((ours - (1 - share) * margins) / share)
        rewards = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
        return losses, {**self.pair_stats(chosen, rejected, *rewards), "margins": margins.detach()}
