"""Judges as a config names them: a section with a `kind`, or one of the short forms that are texts.

This is the one place that knows which kinds there are; `plugs.JUDGES` names the code of each.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

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
    path: str = Field(description="its folder or URI")


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
    path: str = Field(description="its local folder, with safetensors")
    attributes: dict[str, int] | None = Field(
        None, description="objective -> its output; null: the outputs in the objectives' order"
    )
    scale: tuple[float, float] = Field((1.0, 0.0), description="[a, b]: the score is a times the output plus b")
    sigmoid: bool = Field(False, description="of the output, before `scale`")
    input: Literal["chat", "pair"] | None = Field(
        None,
        description="chat: the conversation by the model's chat template; pair: the last question and the answer as a"
        " sentence pair; null: chat where there is a template",
    )
    batch_size: int = Field(16, ge=1, description="answers in one forward pass")
    device: str = Field("cpu", description="where it computes")

    def key(self) -> Any:
        return [self.model_dump(mode="json", exclude={"path", "batch_size", "device"}), _files(self.path)]


@functools.lru_cache(maxsize=8)
def _files(path: str) -> list[tuple[str, str]]:
    """Names and SHA-256 of a model folder's files, read once in a process."""
    import hashlib

    def digest(file: Path) -> str:
        with file.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()

    kept = (".safetensors", ".json", ".jinja", ".txt", ".model")
    return [(f.name, digest(f)) for f in sorted(Path(path).expanduser().glob("*")) if f.suffix in kept]


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
