"""The funnel: how many prompts came in, why each dropped one was dropped, and what pairs the kept ones gave.

Comes in: one block's denoised episodes and pairs. Goes out: a frozen `Funnel` whose numbers add up, checked when it is
made; blocks add up with `+`. Never: files, Ray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, model_validator

from spa_ray.config.models import Config
from spa_ray.preferences.denoising import DROP_REASONS
from spa_ray.preferences.pairing import resolve_delta, truncated_pairs

Counts = dict[str, NonNegativeInt]
ALL_REASONS = (*DROP_REASONS, "no_pair")


class Funnel(BaseModel):
    """Counts of one build: prompts = kept + all dropped; pairs = sum by kind = sum by decided_by."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompts: NonNegativeInt
    dropped: Counts = Field(description="by the first failing reason, every reason named, in the order of testing")
    kept: NonNegativeInt = Field(description="prompts with at least one pair")
    pairs: NonNegativeInt
    pairs_by_kind: Counts = Field(description="`refined` where the chosen is the refined answer, else `candidate`")
    pairs_by_decided_by: Counts = Field(description="the first objective that differs, highest priority first")
    dead_pairs: NonNegativeInt = Field(description="pairs whose gap (SPA, Eq. 3's Δ_i) is 0: no weight under `abs_sum`")
    tau: float | None = Field(description="upper bound of det Σ that was used; null: none")
    ddof: Literal[0, 1]
    delta: float | None = Field(None, description="least margin of a pair that was used")
    truncated_pairs: NonNegativeInt = Field(
        0, description="pairs left out because the chosen answer was cut by its max_tokens; not part of `pairs`"
    )

    @model_validator(mode="after")
    def _adds_up(self) -> Funnel:
        if set(self.dropped) != set(ALL_REASONS):
            raise ValueError(f"dropped names {list(self.dropped)}, not {list(ALL_REASONS)}")
        if self.prompts != self.kept + sum(self.dropped.values()):
            raise ValueError(f"{self.prompts} prompts in, but {self.kept} kept and {self.dropped} dropped")
        for counts in (self.pairs_by_kind, self.pairs_by_decided_by):
            if sum(counts.values()) != self.pairs:
                raise ValueError(f"{self.pairs} pairs, but {counts}")
        if self.dead_pairs > self.pairs or (self.kept == 0) != (self.pairs == 0):
            raise ValueError(f"{self.pairs} pairs, {self.dead_pairs} of them dead, from {self.kept} prompts")
        return self

    @classmethod
    def of(
        cls, denoised: pa.Table, pairs: pa.Table, config: Config, *, tau: float | None, delta: float | None = None
    ) -> Funnel:
        """Count one block: `denoised` from `denoise`, `pairs` from `build_pairs` on it, `tau` and `delta` as given to
        them.

        A prompt that denoising kept and that gave no pair is dropped as `no_pair`.
        """
        least = resolve_delta(denoised["scores"], config) if delta is None else delta
        reasons = _counted(denoised["drop_reason"], DROP_REASONS)
        kept = int(pc.count_distinct(pairs["prompt_id"]).as_py())
        return cls(
            prompts=denoised.num_rows,
            dropped=reasons | {"no_pair": denoised.num_rows - sum(reasons.values()) - kept},
            kept=kept,
            pairs=pairs.num_rows,
            pairs_by_kind=_counted(pairs["kind"], ("refined", "candidate")),
            pairs_by_decided_by=_counted(pairs["decided_by"], config.objectives),
            dead_pairs=int(np.count_nonzero(pairs["gap"].to_numpy() == 0)),
            tau=tau,
            ddof=config.denoise.ddof,
            delta=least,
            truncated_pairs=truncated_pairs(denoised, pairs, config, delta=least),
        )

    def __add__(self, other: Funnel) -> Funnel:
        """Both blocks together. Raises: ValueError when they were filtered by different bounds or objectives."""
        rules = [(f.tau, f.ddof, f.delta, set(f.pairs_by_decided_by)) for f in (self, other)]
        if rules[0] != rules[1]:
            raise ValueError("funnels of builds with another tau, ddof, delta or objectives do not add up")
        return Funnel(
            prompts=self.prompts + other.prompts,
            dropped=_sum(self.dropped, other.dropped),
            kept=self.kept + other.kept,
            pairs=self.pairs + other.pairs,
            pairs_by_kind=_sum(self.pairs_by_kind, other.pairs_by_kind),
            pairs_by_decided_by=_sum(self.pairs_by_decided_by, other.pairs_by_decided_by),
            dead_pairs=self.dead_pairs + other.dead_pairs,
            tau=self.tau,
            ddof=self.ddof,
            delta=self.delta,
            truncated_pairs=self.truncated_pairs + other.truncated_pairs,
        )

    def to_dict(self) -> dict[str, Any]:
        """The object that funnel.json holds; `Funnel(**d)` reads it back."""
        return self.model_dump(mode="json")


def _counted(column: pa.ChunkedArray, names: Sequence[str]) -> Counts:
    """How often each name stands in the column, in the order of `names`; nulls are not counted."""
    found = {entry["values"]: entry["counts"] for entry in pc.value_counts(column.drop_null()).to_pylist()}
    stray = set(found) - set(names)
    if stray:
        raise ValueError(f"{sorted(stray)[0]!r} is none of {list(names)}")
    return {name: found.get(name, 0) for name in names}


def _sum(a: Mapping[str, int], b: Mapping[str, int]) -> Counts:
    return {name: count + b[name] for name, count in a.items()}
