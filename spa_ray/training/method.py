"""What training asks of a method: what it learns from the pairs first, which sequences an example has, which modules it
trains beside the model, its loss, its statistics, its defaults; and of a trained model: how its prompts are written.

Planning, packing, distinct sequences, the step loop, resuming and export are the same for all methods and know none of
them by name. This module and the methods import torch only inside the functions that need it, because a config is read
without it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int
from pydantic import ValidationError

from spa_ray.config.faults import explain
from spa_ray.config.plugs import source_hash
from spa_ray.config.training import BY_METHOD, Train, method_class
from spa_ray.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

ANSWERS = ("chosen", "rejected")  # what every pair has
METHOD, MODULES = "method.json", "modules.safetensors"  # in a model folder
BESIDE = ("fit", "render", "modules")  # what leaves something beside a model, or asks something of its prompts
Messages = list[dict[str, str]]
Stats = dict[str, "Tensor"]
Gaps = Float[np.ndarray, " pairs"]
C = TypeVar("C", bound=Train)


@dataclass(frozen=True)
class Read:
    """One sequence that the model reads: a prompt and a response, which may be empty. The loss gets the log-probs of
    the response's tokens, or with span `all` those of every token but the first."""

    prompt: Sequence[int]
    response: Sequence[int] = ()
    span: Literal["response", "all"] = "response"


@dataclass(frozen=True)
class Example:
    """What one loss is computed from: sequences by the names in the method's `sides`, and numbers for the loss, equally
    many in every example."""

    sequences: Mapping[str, Read]
    targets: Sequence[float] = ()


@dataclass(frozen=True)
class Row:
    """One row of `pairs/` as `Method.examples` sees it. `columns` are those that the method names."""

    messages: Messages
    chosen_ids: list[int]
    rejected_ids: list[int]
    columns: Mapping[str, Any]
    prompt_ids: Callable[[Messages], list[int]]  # rendered up to where the answer begins
    message_ids: Callable[[Messages], list[int]]  # rendered to the last message's end: no generation prompt


@dataclass(frozen=True)
class LossInputs:
    """Some pairs of a step. `sides` are the pairs' sequences, in the order of the method's `sides`; `summed`, `counts`,
    `reference` (summed log-probs of the policy before step 0), `others` (those of the models of `recipe`) and `hidden`
    are by sequence, `targets` by pair. A sequence is computed once, in however many pairs it is."""

    summed: Float[Tensor, " sequences"]
    counts: Int[Tensor, " sequences"]
    sides: Int[Tensor, "pairs sides"]
    weights: Float[Tensor, " pairs"]
    reference: Float[Tensor, " sequences"] | None = None
    others: Mapping[str, Float[Tensor, " sequences"]] = field(default_factory=dict)
    hidden: Float[Tensor, "sequences width"] | None = None
    targets: Float[Tensor, "pairs k"] | None = None
    modules: nn.Module | None = None
    state: Any = None
    seeds: Sequence[int] = ()  # by pair, another one in every step

    def summed_logps(self) -> list[Float[Tensor, " pairs"]]:
        """Of each side, in the order of the method's `sides`."""
        return self._of_sides(self.summed)

    def mean_logps(self) -> list[Float[Tensor, " pairs"]]:
        """Of each side, over its response's tokens; 0 where it has none."""
        return self._of_sides(self.summed / self.counts.clamp(min=1))

    def reference_logps(self, *, mean: bool = False) -> list[Float[Tensor, " pairs"]]:
        """Of each side, of the policy before step 0."""
        assert self.reference is not None
        return self._of_sides(self.reference / self.counts.clamp(min=1) if mean else self.reference)

    def logps_of(self, model: str) -> list[Float[Tensor, " pairs"]]:
        """Of each side, summed, of a model of the method's `recipe`."""
        return self._of_sides(self.others[model])

    def hidden_states(self) -> list[Float[Tensor, "pairs width"]]:
        """Of each side, float32."""
        assert self.hidden is not None
        return self._of_sides(self.hidden)

    def dropout(self, values: Float[Tensor, "pairs width"], p: float) -> Float[Tensor, "pairs width"]:
        """Dropout that is a pair's own: the same in whatever micro-batch and on whatever rank the pair is, and after a
        resume."""
        import torch

        if p == 0:
            return values
        drawn = [torch.rand(values.shape[1], generator=torch.Generator().manual_seed(seed)) for seed in self.seeds]
        return values * (torch.stack(drawn) >= p).to(values) / (1 - p)

    def _of_sides(self, values: Tensor) -> list[Tensor]:
        return [values[side] for side in self.sides.unbind(dim=1)]


class Method(Generic[C]):
    """A training method. Derive from it, or from `PairwiseMethod`, and give `train.method: my_file:MyMethod`."""

    Config: ClassVar[type[Train]] = Train  # the method's keys under `train`, with their defaults
    # Keys of other sections, dotted, that an arm of this method has unless it gives them: above those of the file where
    # the arm names the method, else below them.
    defaults: ClassVar[Mapping[str, Any]] = {}
    # Learning rates that are known to work with AdamW on every weight of a model of 7 to 8 billion parameters.
    known_lr: ClassVar[tuple[float, float] | None] = None
    sides: ClassVar[tuple[str, ...]] = ANSWERS  # the sequences of an example, by name
    columns: ClassVar[tuple[str, ...]] = ()  # of pairs/, that `fit` and `examples` read: `chosen_scores`, say
    # What the loss gets of every sequence: log-probs, and the backbone's last hidden state at the prompt's last token.
    outputs: ClassVar[tuple[Literal["logps", "hidden"], ...]] = ("logps",)
    needs_reference: ClassVar[bool] = False  # log-probs of the policy before step 0
    every_answer: ClassVar[bool] = False  # each answer of a pair is an example of its own
    weighted: ClassVar[bool] = False  # whether `weights` looks at the gaps
    stats: ClassVar[tuple[str, ...]] = ()  # the names of `loss`'s statistics
    # Of a trained model. Its prompts say which scores an answer should have: `state` has `objectives`, their names in
    # order, and `ranges`, their [low, high] (null where they are not known and not needed).
    conditioned: ClassVar[bool] = False
    senses: ClassVar[bool] = False  # `sense` reads such scores off the prompt

    def __init__(self, config: C) -> None:
        self.config = config
        self.state: Any = None  # what `fit` returned, once it has

    def recipe(self, objectives: Sequence[str]) -> Mapping[str, Mapping[str, Any]]:
        """Models that are trained first, on the same episodes: name -> dotted keys of the config that differ (MODPO's
        margin model: `{"margin": {"train.method": "spa_dpo", "pairs.order": "only:helpful"}}`). The loss sees their
        log-probs by `LossInputs.logps_of`."""
        return {}

    def fit(self, table: pa.Table) -> Any:
        """What is learnt from the pairs before training, as JSON: written into the model folder, and the same for the
        same table. `table` has `columns`, and the objectives in its metadata (`spa_ray.data.schemas.objectives_of`)."""
        return None

    def render(self, messages: Messages, scores: Sequence[float] | None, state: Any) -> Messages:
        """The prompt in training and inference. `scores`: in the order of the objectives and in their own units; None
        leaves the prompt as it is."""
        return messages

    def wanted(self) -> Sequence[float] | None:
        """The scores to ask a trained model for where nothing else is said, as `render` takes them; None where there
        are none, or where the model senses them."""
        return None

    def sense(self, modules: nn.Module, hidden: Float[Tensor, "prompts width"]) -> Float[Tensor, "prompts k"]:
        """The scores that each prompt asks for, in [0, 1], by the model's hidden state at the end of the prompt as
        `Row.message_ids` renders it (not the one that `render` makes)."""
        raise NotImplementedError

    def examples(self, row: Row) -> list[Example]:
        """What a pair is trained on: by default both answers behind the prompt, which the chosen one's scores may
        change. No example leaves the pair out."""
        prompt = row.prompt_ids(self.render(row.messages, row.columns.get("chosen_scores"), self.state))
        return [Example({"chosen": Read(prompt, row.chosen_ids), "rejected": Read(prompt, row.rejected_ids)})]

    def modules(self, model: Any) -> nn.Module | None:
        """Modules that are trained beside the model, in float32; every rank starts from the job's seed."""
        return None

    @property
    def modules_lr(self) -> float | None:
        """Their peak learning rate; by default the model's."""
        return self.config.lr

    def save(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write the modules' tensors into a model folder, in files of their own."""
        from safetensors.torch import save_file

        save_file(dict(tensors), folder / MODULES)

    def load(self, folder: Path, *, trust_remote_code: bool = False) -> nn.Module:
        """The modules that `save` wrote, in evaluation mode. Raises: InputError when they are not this model's."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        modules = self.modules(SimpleNamespace(config=config))
        assert modules is not None
        try:
            modules.load_state_dict(load_file(folder / MODULES))
        except (OSError, RuntimeError, SafetensorError) as e:
            raise InputError(f"{folder / MODULES}: not this model's ({str(e).splitlines()[-1].strip()})") from e
        return modules.eval()

    @classmethod
    def leaves_more_than_a_model(cls) -> bool:
        return any(getattr(cls, own) is not getattr(Method, own) for own in BESIDE)

    def about(self) -> dict[str, Any]:
        """What a model folder's `method.json` says of it, for `method_of_folder`."""
        own = {key for key in type(self.config).model_fields if key in BY_METHOD or key not in Train.model_fields}
        train = self.config.model_dump(mode="json", include=own)
        return {"method": self.config.method, "train": train, "state": self.state}

    def weights(self, gap: Gaps, *, mean_gap: float | None = None) -> Gaps:
        """Constant weights of the pairs of one optimizer step; `mean_gap` is all pairs' with `gap_mean: epoch`."""
        return np.ones_like(gap)

    def check_gaps(self, gap: Gaps) -> None:
        """Raises: InputError when a run's pairs cannot be trained on by their gaps."""

    def loss(self, inputs: LossInputs) -> tuple[Float[Tensor, " pairs"], Stats]:
        """Losses, one per pair, weighted and not reduced; and statistics, one number per pair each."""
        raise NotImplementedError


def method_of(train: Train, state: Any = None) -> Method[Train]:
    """The method that a `train` section names, with what it learnt from the pairs."""
    method: Method[Train] = method_class(train.method)(train)
    method.state = state
    return method


def method_of_folder(folder: Path) -> Method[Train] | None:
    """The method that a model was trained with and what it learnt from the pairs, ready to render and to sense; None
    for a model that is read as any other.

    Raises: InputError for a `method.json` that training did not write, a file that it names and that is not there, and
    a method that is not there.
    """
    file = folder / METHOD
    if not file.is_file():
        return None
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        name, state, files = about["method"], about["state"], about.get("files", [])
        section = {**about.get("train", {}), "method": name}
        lacking = [each for each in files if not (folder / each).is_file()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise InputError(f"{file}: not as training writes it ({type(e).__name__}: {e}); export the model again") from e
    if lacking:
        raise InputError(f"{folder}: {lacking[0]} is missing, which {name} left there; copy the complete folder")
    try:
        found = method_class(name)
    except InputError as e:
        raise InputError(f"{file}: {e}") from e
    try:
        return method_of(found.Config.model_validate(section), state)
    except ValidationError as e:
        raise InputError(f"{file}: train: {explain(e, found.Config)}") from e


def check_section_of_method(train: Train, *, name: str) -> None:
    """Raises: InputError for a job's section without its method's defaults."""
    if not isinstance(train, method_class(train.method).Config):
        raise InputError(f"job {name}: train is no section of {train.method}; make it with train_section({{..}})")


def method_source(train: Train) -> list[str]:
    """The hash of a user's own method's source, which decides a result as a setting does; none for built-in ones."""
    found = source_hash(train.method)
    return [] if found is None else [found]
