"""The sections `prompts` and `episodes`: where questions, and answers with scores, come from."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from spa_ray.config.section import Section


class Prompts(Section):
    """Where prompts come from."""

    source: str | None = Field(
        None,
        description="file, folder, data set by name (docs/DATA.md) or of a hub (`hf://owner/name`), dotted path"
        " `module:reader`",
    )
    path: str | None = Field(None, description="local copy of a data set by name: a file or a folder; null: the hub")
    split: str | None = Field(
        None, description="of a folder or a data set; null: `train`, or the only one. Handed to a reader"
    )
    limit: int | None = Field(None, ge=1, description="take N prompts")
    sample: int | None = Field(
        None,
        description="seed of a random sample of `limit` prompts, the same on every machine and in every order of the"
        " rows; null: the first ones",
    )
    decontaminate: Literal["evaluation"] | None = Field(
        None, description="`evaluation`: leave out and count prompts that share 13 words in a row with held-out ones"
    )
    columns: dict[Literal["prompt", "messages", "prompt_id"], str] = Field(
        default_factory=dict, description="names of the user's columns, by ours; `a.b` is `b` inside `a`"
    )
    on_bad_row: Literal["error", "skip"] = Field("error", description="skip leaves such rows out and counts them")
    last_answer: Literal["error", "drop"] = Field(
        "error",
        description="of conversations that end with the assistant's turn (SFT data): refuse the row, or drop it",
    )

    @model_validator(mode="after")
    def _sampled(self) -> Prompts:
        if self.sample is not None and self.limit is None:
            raise ValueError("limit: null, and prompts are sampled; say how many")
        return self


class Episodes(Section):
    """Answers that a data set already holds, in the place of generation, with its scores, or those of `scoring.judge`
    where one is given: docs/DATA.md.

    With a source, `objectives` and `attributes` are one list, denoising is off and `pairs.delta` is `auto` by default.
    """

    source: str | None = Field(None, description="as `prompts.source`; null: episodes are generated")
    attributes: tuple[str, ...] | None = Field(
        None, min_length=1, description="names of scores to read, highest priority first; null: the `objectives`"
    )
    split: str | None = Field(None, description="as `prompts.split`")
    ranges: dict[str, tuple[float, float]] | None = Field(
        None,
        description="name of a score -> [lowest, highest], for `pairs.order: mean` and methods that write scores into"
        " prompts; null: those of a data set by name, or of `scoring.scale`",
    )
    limit: int | None = Field(None, ge=1, description="take the first N prompts")
    on_bad_row: Literal["error", "skip"] = Field("error", description="skip leaves such rows out and counts them")

    @model_validator(mode="after")
    def _ranges_of_attributes(self) -> Episodes:
        for name, (low, high) in (self.ranges or {}).items():
            if low >= high:
                raise ValueError(f"ranges.{name} must ascend, got {[low, high]}; write for example [1, 5]")
            if self.attributes and name not in self.attributes:
                raise ValueError(f"ranges: {name!r} is not one of the attributes {list(self.attributes)}")
        return self
