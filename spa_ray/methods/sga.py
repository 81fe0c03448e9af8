"""SGA, Self-Guided Alignment: a head senses from the prompt which scores its answer should have, and the prompt with
those scores in words steers the answer (the paper's Eq. 8 to 15).

What `sga_sft` and `sga_dpo` have in common: the score sentence, the head, its squared error, and what they leave in a
model folder: `sga.json` and `sga_head.safetensors`. `load` gives the head of a folder back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import pyarrow as pa
from pydantic import Field, PositiveInt

from spa_ray.config.models import ANY
from spa_ray.config.training import Betas, Lora
from spa_ray.errors import InputError
from spa_ray.methods.dpo import DPOConfig
from spa_ray.methods.pairwise import PairwiseMethod
from spa_ray.methods.scores import PAIR, checked, in_unit, last_turn, named
from spa_ray.training.method import Example, LossInputs, Messages, Read, Row, Stats

if TYPE_CHECKING:
    from torch import Tensor, nn

ABOUT, HEAD = "sga.json", "sga_head.safetensors"
SENTENCE = "\nYour response must satisfy the following scores: "
SCORE, BETWEEN, DECIMALS = "<{name}_score:{value:.2f}>", " and ", 2
POOLING = "after the final norm, at the last token of the prompt in the chat template without a generation prompt"


class SGAConfig(DPOConfig):
    """The paper's settings."""

    lr: float = Field(1e-5, gt=0)
    warmup: float = Field(0.0, ge=0, lt=1, description="share of the steps")
    adam_betas: Betas = Field((0.95, 0.95), description="AdamW's decay of the gradient's mean and of its square")
    grad_clip: float | None = Field(5.0, gt=0, description="global norm; null: none")
    epochs: float = Field(2.0, gt=0)
    batch_size: int = Field(64, ge=1, description="pairs in an optimizer step, over all ranks")
    max_length: int = Field(1024, ge=2, description="prompt + response; longer pairs are dropped and counted")
    lora: Lora | None = Lora(r=32, alpha=64, dropout=0.05)
    mse_weight: float = Field(1000.0, ge=0, description="λ, of the squared error between sensed and given scores")
    mse_reduction: Literal["mean", "sum"] = Field("mean", description="of the squared error over the objectives")
    head_lr: float | None = Field(None, gt=0, description="the head's peak learning rate; null: lr")
    head_seed: int | None = Field(None, description="of the head's first weights; null: the run's")
    head_widths: tuple[PositiveInt, ...] = Field((1024, 1024, 1024), description="of the head's hidden layers")
    head_dropout: float = Field(0.1, ge=0, lt=1, description="of the hidden state, in training")


C = TypeVar("C", bound=SGAConfig)


class SGA(PairwiseMethod[C]):
    """The chosen answer's scores, as parts of their ranges, are said in both answers' prompt and sensed from it as it
    was."""

    conditioned = senses = True
    columns = (PAIR, "chosen_scores")
    outputs = ("logps", "hidden")
    defaults: ClassVar[Mapping[str, Any]] = {
        "denoise.consistency": "off",
        "denoise.informativeness": False,
        "pairs.order": "mean",
        "pairs.delta": ANY,
    }
    head_stats: ClassVar[tuple[str, ...]] = ("head/mse", "head/mae")

    def fit(self, table: pa.Table) -> Any:
        state = named(table, self.config.method, ranges=True)
        checked(table, "chosen_scores", state)
        return state

    def render(self, messages: Messages, scores: Sequence[float] | None, state: Any) -> Messages:
        if scores is None:
            return messages
        told = zip(state["objectives"], in_unit(scores, state), strict=True)
        return last_turn(messages, behind=SENTENCE + BETWEEN.join(SCORE.format(name=n, value=v) for n, v in told))

    def examples(self, row: Row) -> list[Example]:
        (pair,) = super().examples(row)
        raw = Read(row.message_ids(row.messages))
        scores = in_unit(row.columns["chosen_scores"], self.state)
        return [Example({**pair.sequences, "sensed": raw}, [round(score, DECIMALS) for score in scores])]

    def modules(self, model: Any) -> nn.Module:
        import torch

        if self.config.head_seed is not None:
            torch.manual_seed(self.config.head_seed)
        return _head(model.config.get_text_config().hidden_size, self.config.head_widths, len(self.state["objectives"]))

    @property
    def modules_lr(self) -> float:
        return self.config.head_lr or self.config.lr

    def sensing_loss(self, inputs: LossInputs) -> tuple[Tensor, Stats]:
        """λ times the squared errors of the sensed scores, and the head's statistics."""
        assert inputs.modules is not None
        *_, hidden = inputs.hidden_states()
        hidden = inputs.dropout(hidden, self.config.head_dropout) if inputs.modules.training else hidden
        errors = inputs.modules(hidden) - inputs.targets
        squared = errors.square()
        reduced = squared.mean(dim=1) if self.config.mse_reduction == "mean" else squared.sum(dim=1)
        stats = {"head/mse": squared.mean(dim=1).detach(), "head/mae": errors.abs().mean(dim=1).detach()}
        return self.config.mse_weight * reduced, stats

    def sense(self, modules: nn.Module, hidden: Tensor) -> Tensor:
        sensed: Tensor = modules(hidden)
        return sensed

    def save(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        from safetensors.torch import save_file

        save_file(dict(tensors), folder / HEAD)
        first = next(iter(tensors.values()))
        about = {
            "attributes": self.state["objectives"],
            "ranges": self.state["ranges"],
            "sentence": SENTENCE,
            "score": SCORE,
            "between": BETWEEN,
            "hidden_size": first.shape[1],
            "widths": list(self.config.head_widths),
            "pooling": POOLING,
        }
        (folder / ABOUT).write_text(json.dumps(about, indent=2), encoding="utf-8")

    def load(self, folder: Path, *, trust_remote_code: bool = False) -> nn.Module:
        return load(folder, trust_remote_code=trust_remote_code)


def load(folder: Path, *, trust_remote_code: bool = False) -> nn.Module:
    """The head of an SGA model folder, in evaluation mode: hidden states (prompts × width) in, scores in [0, 1] out.

    Raises: InputError for a folder without one, and for a head that is not this model's.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from transformers import AutoConfig

    folder = Path(folder)
    if missing := [name for name in (ABOUT, HEAD) if not (folder / name).is_file()]:
        raise InputError(f"{folder}: no {missing[0]} in it; give a model that SGA trained, with all of its files")
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        head = _head(about["hidden_size"], about["widths"], len(about["attributes"]))
        head.load_state_dict(load_file(folder / HEAD))
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as e:
        raise InputError(f"{folder / HEAD}: not the head of {ABOUT} ({str(e).splitlines()[-1].strip()})") from e
    width = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code).get_text_config().hidden_size
    if width != about["hidden_size"]:
        raise InputError(f"{folder / HEAD}: reads {about['hidden_size']} numbers, and this model's states have {width}")
    return head.eval()


def _head(width: int, widths: Sequence[int], attributes: int) -> nn.Sequential:
    from torch import nn

    layers = [layer for sizes in pairwise((width, *widths)) for layer in (nn.Linear(*sizes), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear((width, *widths)[-1], attributes), nn.Sigmoid())
