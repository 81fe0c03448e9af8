"""A training method in a file of one's own: SLiC-HF's hinge loss (Zhao et al. 2023, Eq. 2) over mean log-probs."""

from pydantic import Field

from spa_ray import LossInputs, PairwiseConfig, PairwiseMethod


class SLiCConfig(PairwiseConfig):
    beta: float = Field(1.0, gt=0)
    lr: float = Field(5e-7, gt=0)
    margin: float = Field(1.0, gt=0, description="in nats per token, times beta; pairs beyond it have no loss")


class SLiC(PairwiseMethod[SLiCConfig]):
    Config = SLiCConfig
    known_lr = (1e-7, 1e-6)
    stats = (*PairwiseMethod.stats, "hinge/active")

    def loss(self, inputs: LossInputs):
        beta = self.config.beta
        chosen, rejected = inputs.mean_logps()
        losses = (self.config.margin - beta * (chosen - rejected)).clamp(min=0)
        stats = self.pair_stats(chosen, rejected, beta * chosen, beta * rejected)
        return inputs.weights * losses, {**stats, "hinge/active": (losses > 0).float().detach()}
