"""Judges as a config names them: a section with a `kind`, or one of the short forms that are texts.

This is the one place that knows which kinds there are; `plugs.JUDGES` names the code of each.
"""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from spa_ray.config.endpoint import Endpoint
from spa_ray.config.plugs import is_dotted, source_hash
from spa_ray.config.section import JudgeSection


class Policy(JudgeSection):
    """The model that answers judges itself."""

    asks_engine: ClassVar[bool] = True
    reads_prompts: ClassVar[bool] = True
    kind: Literal["self"] = "self"


class Base(JudgeSection):
    """The model before training, in the policy's place."""

    asks_engine: ClassVar[bool] = True
    own_pass: ClassVar[bool] = True
    reads_prompts: ClassVar[bool] = True
    kind: Literal["base"] = "base"


class Folder(JudgeSection):
    """Another model, in the policy's place."""

    asks_engine: ClassVar[bool] = True
    own_pass: ClassVar[bool] = True
    reads_prompts: ClassVar[bool] = True
    kind: Literal["model"]
    path: str = Field(description="its folder, URI or hub id")

    @property
    def folder(self) -> str | None:
        return self.path


class Function(JudgeSection):
    """A function, or a class derived from `spa_ray.Judge`, in a file of the user's own."""

    kind: Literal["function"]
    name: str = Field(pattern=r"^[\w.]+:\w+$", description="`module:judge`")
    config: dict[str, Any] = Field(default_factory=dict, description="keys of a class's own `Config`")

    def plugs(self) -> list[str]:
        return [self.name]

    def key(self) -> Any:
        return [self.name, source_hash(self.name), *([self.config] if self.config else [])]


class Reward(JudgeSection):
    """A reward model: a sequence classifier whose outputs are scores, on the engine's machine."""

    kind: Literal["reward"]
    path: str | None = Field(None, description="its folder with safetensors, which every node sees")
    models: dict[str, str] | None = Field(
        None, description="in the place of `path`, a reward model for each objective: objective -> folder"
    )
    attribute: int | str | None = Field(
        None,
        description="the output that scores every objective, by its number or its label in config.json; 0 of `models`",
    )
    attributes: dict[str, int | str] | None = Field(
        None, description="objective -> its output; with neither: the outputs in the objectives' order"
    )
    output: str = Field("logits", description="what the model calls the tensor of its outputs; of ArmoRM `rewards`")
    standardize: dict[str, tuple[float, Annotated[float, Field(gt=0)]]] | None = Field(
        None, description="objective -> [mean, deviation] of its output, which becomes a z-score before `transform`"
    )
    transform: Literal["identity", "sigmoid"] | tuple[float, float] = Field(
        "identity",
        description="of the output; sigmoid: onto `scoring.scale`, worst + (best - worst) / (1 + exp(-output)); [a, b]:"
        " a times the output plus b",
    )
    input: Literal["chat", "pair", "transcript"] | None = Field(
        None,
        description="chat: the conversation by the model's chat template; pair: the question (all turns of a"
        " conversation, with their roles) and the answer as a sentence pair; transcript: the same with turns as in"
        " HH-RLHF, `Human:` and `Assistant:`; null: chat where there is a template, else pair",
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(None, description="null: as its files are")
    batch_size: int = Field(16, ge=1, description="answers in one forward pass")
    device: str = Field("cpu", description="where it computes")

    @field_validator("path", "models")
    @classmethod
    def _seen_from_anywhere(cls, given: Any) -> Any:  # engines work in folders of their own
        if isinstance(given, dict):
            return {name: _absolute(path) for name, path in given.items()}
        return given if given is None else _absolute(given)

    @model_validator(mode="after")
    def _one_choice(self) -> Reward:
        if (self.path is None) == (not self.models):
            raise ValueError("path: give the folder of one reward model, or models: {objective: folder}, and not both")
        both = "attribute" if self.attribute is not None else "models" if self.models else None
        if both and self.attributes is not None:
            raise ValueError(f"{both} and attributes are both given; remove one")
        return self

    def each(self) -> dict[str, Reward]:
        """Of several `models`: objective -> the section of its own."""
        own = {"models": None, "attribute": 0 if self.attribute is None else self.attribute}
        return {name: self.model_copy(update={**own, "path": path}) for name, path in (self.models or {}).items()}

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def on_scale(self) -> bool:
        return self.transform == "sigmoid"

    def key(self) -> Any:
        as_before = {"output"} if self.output == "logits" else set()  # these keys
        as_before |= {"standardize"} if self.standardize is None else set()
        settings = self.model_dump(mode="json", exclude={"path", "models", "batch_size", "device", *as_before})
        models = self.models or {}
        files = _files(self.path) if self.path else {name: _files(models[name]) for name in sorted(models)}
        return [settings, files, VERSION]


VERSION = 2  # of how a reward model is shown a conversation
KEPT = (".safetensors", ".json", ".jinja", ".txt", ".model", ".py")  # what of a model's folder decides its scores


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _files(folder: str) -> list[tuple[str, str]]:
    """Names and SHA-256 of a model folder's files."""
    found = [(f, f.stat()) for f in sorted(Path(folder).glob("*")) if f.suffix in KEPT]
    return [(f.name, _sha256(f, stat.st_mtime_ns, stat.st_size)) for f, stat in found]


@functools.lru_cache(maxsize=256)
def _sha256(file: Path, *version: int) -> str:
    """Read once in a process, until the file is another version."""
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


JudgeKinds = Annotated[Folder | Function | Reward | Endpoint, Field(discriminator="kind")]


def judge_section(given: str | JudgeSection | None) -> JudgeSection:
    """The section that a short form stands for: `base`, `self` (or null), `module:judge`, or a model folder."""
    if isinstance(given, JudgeSection):
        return given
    if given in (None, "self"):
        return Policy()
    if given == "base":
        return Base()
    return Function(kind="function", name=given) if is_dotted(str(given)) else Folder(kind="model", path=str(given))
