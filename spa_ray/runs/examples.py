"""Before and after: the same held-out prompts answered by the model as it was and by an arm's model.

Comes in: a finished run. Goes out: a few examples, those whose ids come first in each category, so that nobody
picks them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from spa_ray.data.episodes import EpisodeFolder
from spa_ray.data.files import AnyPath, as_path, read_json
from spa_ray.logs import printable
from spa_ray.runs.folder import open_run


@dataclass(frozen=True)
class Example:
    question: str
    category: str
    before: str
    after: str
    scores_before: list[float | None]
    scores_after: list[float | None]


def before_after(run_dir: AnyPath, *, arm: str, count: int = 3) -> list[Example]:
    """At most `count` examples, one a category first. Raises: InputError for a folder that is no run."""
    record = read_json(open_run(run_dir).path / "evaluation.json")["answers"]
    if arm not in record:
        return []
    before, after = (_rows(as_path(record[name])) for name in ("vanilla", arm))
    both = [i for i in before if i in after]
    by_category: dict[str, list[str]] = {}
    for prompt_id in both:
        by_category.setdefault(before[prompt_id]["category"], []).append(prompt_id)
    turns = [ids[turn] for turn in range(count) for ids in by_category.values() if turn < len(ids)]
    return [_example(before[i], after[i]) for i in turns[:count]]


def _rows(episodes: AnyPath) -> dict[str, dict[str, Any]]:
    columns = ["prompt_id", "messages", "meta", "responses", "error"]
    table = EpisodeFolder(episodes).table(columns).sort_by("prompt_id")
    rows = {row["prompt_id"]: row for row in table.to_pylist() if row["error"] is None}
    for row in rows.values():
        row["category"] = str(json.loads(row["meta"]).get("category", ""))
    return rows


def _example(before: dict[str, Any], after: dict[str, Any]) -> Example:
    first, second = before["responses"][0], after["responses"][0]
    return Example(
        question=before["messages"][-1]["content"],
        category=before["category"],
        before=first["text"],
        after=second["text"],
        scores_before=first["scores"],
        scores_after=second["scores"],
    )


def print_examples(examples: list[Example]) -> None:
    for example in examples:
        print(printable(f"\n[{example.category}] {example.question}"))
        print(printable(f"  before {_marks(example.scores_before)}: {example.before}"))
        print(printable(f"  after  {_marks(example.scores_after)}: {example.after}"))
    if examples:
        print()


def _marks(scores: list[float | None]) -> str:
    return "/".join("–" if s is None else f"{s:g}" for s in scores)
