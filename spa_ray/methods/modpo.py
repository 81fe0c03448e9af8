"""MODPO (Zhou et al. 2024): DPO for the first objective, with margins by models of the others.

-log σ((1/w₀) [β Δ - Σ_k w_k (r_k(chosen) - r_k(rejected))]), Δ the difference of the log ratios, r_k β times the log
ratio of a model that DPO trained on pairs by objective k alone. With all weight on the first objective it is DPO.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pydantic import Field, NonNegativeFloat

from spa_ray.config.models import ANY
from spa_ray.config.training import Lora
from spa_ray.errors import InputError
from spa_ray.methods.dpo import DPOConfig
from spa_ray.methods.pairwise import PairwiseMethod
from spa_ray.methods.scores import PAIR, checked, named, shares
from spa_ray.training.method import ANSWERS, Example, LossInputs, Read, Row, Stats

if TYPE_CHECKING:
    from torch import Tensor

SCORES = ("chosen_scores", "rejected_scores")


class MODPOConfig(DPOConfig):
    lr: float = Field(5e-4, gt=0)
    epochs: float = Field(3.0, gt=0)
    max_length: int = Field(512, ge=2, description="prompt + response; longer pairs are dropped and counted")
    lora: Lora | None = Lora(r=64, alpha=1)
    weights: dict[str, NonNegativeFloat] = Field(
        default_factory=dict, description="objective -> w; one left out has none; {}: all alike"
    )


class MODPO(PairwiseMethod[MODPOConfig]):
    """The first objective says which answer is the chosen one, whatever the pairs' order; ties are left out."""

    Config = MODPOConfig
    known_lr = (3e-7, 1e-6)  # DPO's
    needs_reference = True
    columns = (PAIR, *SCORES)
    stats = (*PairwiseMethod.stats, "margins")

    def shares(self, objectives: Sequence[str]) -> dict[str, float]:
        """The objectives that count, the first one first, with their shares of the weights. Raises: InputError."""
        found = dict(zip(objectives, shares(self.config.weights, objectives, key="train.weights"), strict=True))
        if found[objectives[0]] <= 0:
            raise InputError(
                f"train.weights: {objectives[0]}, the first objective, is what is trained; give it a weight"
            )
        return {name: share for name, share in found.items() if share > 0}

    def recipe(self, objectives: Sequence[str]) -> Mapping[str, Mapping[str, Any]]:
        _, *others = self.shares(objectives)
        own = {"train.method": "spa_dpo", "train.lr": self.config.lr, "train.beta": self.config.beta}
        return {_margin(name): {**own, "pairs.order": f"only:{name}", "pairs.delta": ANY} for name in others}

    def fit(self, table: pa.Table) -> Any:
        state = named(table, self.config.method, ranges=False)
        for column in SCORES:
            checked(table, column, state)
        return {**state, "shares": self.shares(state["objectives"])}

    def examples(self, row: Row) -> list[Example]:
        first, second = (row.columns[column][0] for column in SCORES)
        if first == second:
            return []
        prompt = row.prompt_ids(row.messages)
        answers = [row.chosen_ids, row.rejected_ids] if first > second else [row.rejected_ids, row.chosen_ids]
        return [Example({side: Read(prompt, ids) for side, ids in zip(ANSWERS, answers, strict=True)})]

    def loss(self, inputs: LossInputs) -> tuple[Tensor, Stats]:
        from torch.nn.functional import logsigmoid

        beta, (own, *others) = self.config.beta, self.state["shares"].items()
        (chosen, rejected), (ref_chosen, ref_rejected) = inputs.summed_logps(), inputs.reference_logps()
        rewards = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
        margins = chosen.new_zeros(chosen.shape)
        for name, share in others:
            of_chosen, of_rejected = inputs.logps_of(_margin(name))
            margins = margins + share * beta * ((of_chosen - ref_chosen) - (of_rejected - ref_rejected))
        losses = -inputs.weights * logsigmoid((rewards[0] - rewards[1] - margins) / own[1])
        return losses, {**self.pair_stats(chosen, rejected, *rewards), "margins": margins.detach()}


def _margin(objective: str) -> str:
    return "margin_" + re.sub(r"\W", "_", objective)
