"""What each training method makes of its sequences' log-probs: its loss, and the numbers that its log shows.

Comes in: summed log-probs and counts, one a sequence, and the sequences of each pair. Goes out: weighted losses, one a
pair, and statistics, one number a pair each. Never: models, steps, reductions. A new loss is one more entry of
`OBJECTIVES`; that a sequence is in several pairs, and computed once, is nothing that it knows of.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from spa_ray.config.training import Train
from spa_ray.training.losses import dpo_loss, ipo_loss, log_odds_ratio, orpo_loss, sft_loss, simpo_loss

Stats = dict[str, Tensor]
PAIR_STATS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)


@dataclass(frozen=True)
class LossInputs:
    """Some pairs of a step. `sides` are the pairs' sequences, the chosen one first; `summed`, `counts` and `reference`
    (summed log-probs of the policy before step 0) are by sequence."""

    summed: Float[Tensor, " sequences"]
    counts: Int[Tensor, " sequences"]
    sides: Int[Tensor, "pairs sides"]
    weights: Float[Tensor, " pairs"]
    reference: Float[Tensor, " sequences"] | None = None

    def summed_logps(self) -> list[Float[Tensor, " pairs"]]:
        """Of each side, the chosen one first."""
        return self._of_sides(self.summed)

    def mean_logps(self) -> list[Float[Tensor, " pairs"]]:
        """Of each side, over its response's tokens."""
        return self._of_sides(self.summed / self.counts)

    def reference_logps(self, *, mean: bool = False) -> list[Float[Tensor, " pairs"]]:
        """Of each side, of the policy before step 0."""
        assert self.reference is not None
        return self._of_sides(self.reference / self.counts if mean else self.reference)

    def _of_sides(self, values: Tensor) -> list[Tensor]:
        return [values[side] for side in self.sides.unbind(dim=1)]


@dataclass(frozen=True)
class Objective:
    """A method's loss, the statistics it gives, and what it needs: reference log-probs, weights."""

    loss: Callable[[LossInputs, Train], tuple[Float[Tensor, " pairs"], Stats]]
    needs_reference: bool = False
    weighted: bool = False
    stats: tuple[str, ...] = PAIR_STATS


def _simpo(inputs: LossInputs, train: Train) -> tuple[Tensor, Stats]:
    chosen, rejected = inputs.mean_logps()
    losses = simpo_loss(chosen, rejected, beta=train.beta, gamma=train.gamma, weights=inputs.weights)  # type: ignore[arg-type]
    return losses, _pair_stats(chosen, rejected, train.beta * chosen, train.beta * rejected)


def _dpo(inputs: LossInputs, train: Train) -> tuple[Tensor, Stats]:
    (chosen, rejected), (ref_chosen, ref_rejected) = inputs.summed_logps(), inputs.reference_logps()
    losses = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=train.beta, weights=inputs.weights)  # type: ignore[arg-type]
    rewards = [train.beta * (chosen - ref_chosen), train.beta * (rejected - ref_rejected)]
    return losses, _pair_stats(chosen, rejected, *rewards)


def _ipo(inputs: LossInputs, train: Train) -> tuple[Tensor, Stats]:
    (chosen, rejected), (ref_chosen, ref_rejected) = inputs.mean_logps(), inputs.reference_logps(mean=True)
    losses = ipo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=train.beta, weights=inputs.weights)  # type: ignore[arg-type]
    rewards = [train.beta * (chosen - ref_chosen), train.beta * (rejected - ref_rejected)]
    return losses, _pair_stats(chosen, rejected, *rewards)


def _orpo(inputs: LossInputs, train: Train) -> tuple[Tensor, Stats]:
    chosen, rejected = inputs.mean_logps()
    losses = orpo_loss(chosen, rejected, beta=train.beta, weights=inputs.weights)  # type: ignore[arg-type]
    log_odds = log_odds_ratio(chosen, rejected).detach()
    stats = _pair_stats(chosen, rejected, train.beta * chosen, train.beta * rejected)
    # TRL's names: its log_odds_ratio is the log-sigmoid of what it calls log_odds_chosen.
    also = {"nll_loss": -chosen.detach(), "log_odds_chosen": log_odds, "log_odds_ratio": F.logsigmoid(log_odds)}
    return losses, {**stats, **also}


def _sft(inputs: LossInputs, train: Train) -> tuple[Tensor, Stats]:
    at = inputs.sides[:, 0]
    losses = sft_loss(inputs.summed[at], inputs.counts[at], weights=inputs.weights)
    return losses, {"logps/chosen": (inputs.summed / inputs.counts)[at].detach()}


def _pair_stats(chosen: Tensor, rejected: Tensor, chosen_rewards: Tensor, rejected_rewards: Tensor) -> Stats:
    """The field's names (TRL's); `logps/*` as the loss sees them: averaged for SimPO, IPO and ORPO, summed for DPO."""
    stats = {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/margins": chosen_rewards - rejected_rewards,
        "rewards/accuracies": (chosen_rewards > rejected_rewards).to(torch.float32),
        "logps/chosen": chosen,
        "logps/rejected": rejected,
    }
    return {name: value.detach() for name, value in stats.items()}


OBJECTIVES: dict[str, Objective] = {
    "spa": Objective(_simpo, weighted=True),
    "spa_simpo": Objective(_simpo),
    "spa_dpo": Objective(_dpo, needs_reference=True),
    "ipo": Objective(_ipo, needs_reference=True),
    "orpo": Objective(_orpo, stats=(*PAIR_STATS, "nll_loss", "log_odds_chosen", "log_odds_ratio")),
    "sft": Objective(_sft, stats=("logps/chosen",)),
}
