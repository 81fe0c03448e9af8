"""From the episodes of an evaluation to the arrays that metrics read, family by family.

Comes in: a folder of episodes with one response a prompt. Goes out: `FamilyAnswers`. A prompt that failed has no answer
and is counted; an answer whose judgement failed keeps NaN as its score, which the metrics leave out and count.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from spa_ray.data.episodes import EpisodeFolder
from spa_ray.data.schemas import attributes_of, ranges_of
from spa_ray.evaluation.refusals import is_refusal
from spa_ray.evaluation.repetition import repetition
from spa_ray.evaluation.tables import Answers
from spa_ray.evaluation.wishes import ASKED, COLUMNS, SENSED
from spa_ray.storage.files import AnyPath

SAFE = {"safe": 1.0, "unsafe": 0.0}  # a prompt's column `label`, as XSTest has it


@dataclass(frozen=True)
class FamilyAnswers:
    """One model's answers to one family of held-out prompts.

    `categories` maps prompt_id -> category for prompts that have one; `errors` counts prompts without an answer.
    """

    answers: Answers
    categories: dict[str, str]
    errors: int

    @property
    def exact(self) -> float | None:
        """Share of answers that equal the prompt's own exact answer; None where no prompt has one."""
        exact = self.answers.exact
        return None if exact is None else float(np.nanmean(exact))


@dataclass
class _Rows:
    ids: list[str] = field(default_factory=list)
    scores: list[list[float]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    refused: list[bool] = field(default_factory=list)
    repetition: list[float] = field(default_factory=list)
    categories: dict[str, str] = field(default_factory=dict)
    safe: list[float] = field(default_factory=list)
    exact: list[float] = field(default_factory=list)
    beside: dict[str, list[dict[str, float]]] = field(default_factory=lambda: defaultdict(list))
    errors: int = 0


def read_answers(episodes: AnyPath) -> dict[str, FamilyAnswers]:
    """Family -> its answers, sorted by prompt_id so that every model's arrays line up."""
    families: dict[str, _Rows] = {}
    folder = EpisodeFolder(episodes)
    steered = [name for name in (SENSED, ASKED) if name in folder.schema.names]
    names = attributes_of(folder.schema) or []
    ranges = ranges_of(folder.schema) or [(0.0, 1.0)] * len(names)
    table = folder.table(["prompt_id", "meta", "responses", "error", *steered]).sort_by("prompt_id")
    for row in table.to_pylist():
        meta = json.loads(row["meta"])
        rows = families.setdefault(meta["family"], _Rows())
        if row["error"] is not None:
            rows.errors += 1
        else:
            _add(rows, row["prompt_id"], meta, row["responses"][0])
            for name in steered:
                parts = zip(names, ranges, row[name] or [], strict=row[name] is not None)
                rows.beside[name].append({n: low + part * (high - low) for n, (low, high), part in parts})
            for name in COLUMNS:
                rows.beside[name].append(_numbers(meta.get(name)))
    return {name: _close(rows) for name, rows in families.items()}


def _numbers(column: Any) -> dict[str, float]:
    """What a prompt's column says of objectives; a user's own column of that name may hold anything."""
    given = column.items() if isinstance(column, Mapping) else ()
    return {name: value for name, value in given if isinstance(value, int | float) and not isinstance(value, bool)}


def _add(rows: _Rows, prompt_id: str, meta: dict[str, Any], response: dict[str, Any]) -> None:
    rows.ids.append(prompt_id)
    rows.scores.append([np.nan if score is None else score for score in response["scores"]])
    rows.lengths.append(len(response["token_ids"]))
    rows.refused.append(is_refusal(response["text"]))
    rows.repetition.append(repetition(response["token_ids"]))
    if "category" in meta:
        rows.categories[prompt_id] = meta["category"]
    label = meta.get("label")
    rows.safe.append(SAFE.get(label, np.nan) if isinstance(label, str) else np.nan)
    rows.exact.append(float(response["text"].strip() == meta["answer"]) if "answer" in meta else np.nan)


def _close(rows: _Rows) -> FamilyAnswers:
    width = len(rows.scores[0]) if rows.scores else 0
    exact, safe = (np.asarray(values, dtype=np.float64) for values in (rows.exact, rows.safe))
    answers = Answers(
        prompt_ids=rows.ids,
        scores=np.asarray(rows.scores, dtype=np.float64).reshape(len(rows.ids), width),
        lengths=np.asarray(rows.lengths, dtype=np.int64),
        refused=np.asarray(rows.refused, dtype=np.bool_),
        safe=safe if np.isfinite(safe).any() else None,
        exact=exact if np.isfinite(exact).any() else None,
        repetition=np.asarray(rows.repetition, dtype=np.float64),
        beside={name: found for name, found in rows.beside.items() if any(found)},
    )
    return FamilyAnswers(answers, rows.categories, rows.errors)
