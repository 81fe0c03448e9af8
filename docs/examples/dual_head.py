"""A training method with a head of its own: DPO on prompts that name the scores to reach, and a small network that
senses those scores from the prompt alone."""

from pydantic import Field

from spa_ray import Example, LossInputs, Read, Row
from spa_ray.methods.dpo import DPO, DPOConfig


class DualHeadConfig(DPOConfig):
    head_weight: float = Field(1.0, ge=0, description="of the head's squared error")
    head_lr: float = Field(1e-3, gt=0, description="the head's peak learning rate")
    top_score: float = Field(10.0, gt=0, description="the scale's upper end")


class DualHead(DPO):
    Config = DualHeadConfig
    sides = ("chosen", "rejected", "sensed")
    columns = ("chosen_scores",)
    outputs = ("logps", "hidden")
    stats = (*DPO.stats, "head/mse")

    def fit(self, table):
        import numpy as np

        scores = np.array(table["chosen_scores"].to_pylist())
        return {"mean": scores.mean(axis=0).tolist(), "std": scores.std(axis=0).tolist()}

    def render(self, messages, scores, state):
        wanted = [(s - mean) / (std or 1.0) for s, mean, std in zip(scores, state["mean"], state["std"], strict=True)]
        *before, question = messages
        sentence = "\nScores to reach: " + ", ".join(f"{score:.1f}" for score in wanted)
        return [*before, {**question, "content": question["content"] + sentence}]

    def examples(self, row: Row):
        (pair,) = super().examples(row)
        raw = Read(row.message_ids(row.messages))
        targets = [score / self.config.top_score for score in row.columns["chosen_scores"]]
        return [Example({**pair.sequences, "sensed": raw}, targets)]

    def modules(self, model):
        from torch import nn

        width = model.config.get_text_config().hidden_size
        return nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, len(self.state["mean"])), nn.Sigmoid())

    @property
    def modules_lr(self):
        return self.config.head_lr

    def loss(self, inputs: LossInputs):
        losses, stats = super().loss(inputs)
        *_, sensed = inputs.hidden_states()
        errors = (inputs.modules(sensed) - inputs.targets).square().mean(dim=1)
        return losses + self.config.head_weight * errors, {**stats, "head/mse": errors.detach()}
