"""What pairwise methods have in common: β, and the statistics of chosen and rejected responses."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, TypeVar

from jaxtyping import Float
from pydantic import Field

from spa_ray.config.training import Train
from spa_ray.training.method import Method, Stats

if TYPE_CHECKING:
    from torch import Tensor


class PairwiseConfig(Train):
    """β scales the difference of chosen and rejected: at 0 every pair would be alike."""

    beta: float = Field(gt=0)
    gamma: float = 0.0
    lr: float = Field(gt=0)


C = TypeVar("C", bound=PairwiseConfig)


class PairwiseMethod(Method[C]):
    """A method that compares a chosen and a rejected response."""

    stats: ClassVar[tuple[str, ...]] = (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
    )

    @staticmethod
    def pair_stats(
        chosen: Float[Tensor, " pairs"],
        rejected: Float[Tensor, " pairs"],
        chosen_rewards: Float[Tensor, " pairs"],
        rejected_rewards: Float[Tensor, " pairs"],
    ) -> Stats:
        """The field's names (TRL's). `chosen` and `rejected` are log-probs as the loss sees them, means or sums."""
        stats = {
            "rewards/chosen": chosen_rewards,
            "rewards/rejected": rejected_rewards,
            "rewards/margins": chosen_rewards - rejected_rewards,
            "rewards/accuracies": (chosen_rewards > rejected_rewards).float(),
            "logps/chosen": chosen,
            "logps/rejected": rejected,
        }
        return {name: value.detach() for name, value in stats.items()}
