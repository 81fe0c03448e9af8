"""SFT on every completion behind a prompt that says its scores: what RiC and CPO have in common.

A pair gives two examples, each answer behind its own prompt, and each distinct one is trained on once. So the pairs are
those of all answers that differ in any score; a prompt whose answers all have the same scores is in no pair.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import pyarrow as pa

from spa_ray.config.models import ANY
from spa_ray.methods.scores import PAIR, checked, named
from spa_ray.methods.sft import SFT
from spa_ray.training.method import Example, Read, Row

SCORES = ("chosen_scores", "rejected_scores")


class Completions(SFT):
    """Cross-entropy on chosen and rejected answers alike. `render` of a method says how its prompts have scores."""

    conditioned = every_answer = True
    columns: ClassVar[tuple[str, ...]] = (PAIR, *SCORES)
    needs_ranges: ClassVar[bool] = False
    defaults: ClassVar[Mapping[str, Any]] = {
        "denoise.consistency": "off",
        "denoise.informativeness": False,
        "pairs.order": "lex",
        "pairs.include": "all",
        "pairs.delta": ANY,
        "pairs.truncated": "allow",
    }

    @property
    def span(self) -> Literal["response", "all"]:
        return "response"

    def fit(self, table: pa.Table) -> Any:
        state = named(table, self.config.method, ranges=self.needs_ranges)
        for column in SCORES:
            checked(table, column, state)
        return state

    def examples(self, row: Row) -> list[Example]:
        found = []
        for ids, column in zip((row.chosen_ids, row.rejected_ids), SCORES, strict=True):
            prompt = row.prompt_ids(self.render(row.messages, row.columns[column], self.state))
            found.append(Example({"chosen": Read(prompt, ids, self.span)}))
        return found
