"""Before and after: the same held-out prompts answered by the model as it was and by an arm's model.

Nobody picks the examples: of each category the prompt whose scores changed by the median and the one whose scores
changed for the worst are shown, so failures are among them (`RULE`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from spa_ray.data.episodes import EpisodeFolder
from spa_ray.logs import printable
from spa_ray.storage.files import AnyPath, as_path, read_json
from spa_ray.storage.folder import open_run


@dataclass(frozen=True)
class Example:
    question: str
    category: str
    before: str
    after: str
    scores_before: list[float | None]
    scores_after: list[float | None]
    shown_as: str = ""

    @property
    def change(self) -> tuple[float, ...] | None:
        """Of each objective's score, after minus before; None where a score is missing."""
        both = list(zip(self.scores_before, self.scores_after, strict=True))
        changes = [after - before for before, after in both if before is not None and after is not None]
        return tuple(changes) if len(changes) == len(both) else None


RULE = (
    "Examples, by rule and not by hand: of each category the median change of the first objective's score (then of the "
    "next ones'), and the worst change."
)


def before_after(run_dir: AnyPath, *, arm: str) -> list[Example]:
    """The median and the worst change of each category, the median first; one example where they are the same prompt.

    Changes are compared as the objectives are: by the first one's score, equal ones by the next. A prompt without all
    scores on both sides has no change. Raises: InputError for a folder that is no run.
    """
    record = read_json(open_run(run_dir).path / "evaluation.json")["answers"]
    if arm not in record:
        return []
    before, after = (_rows(as_path(record[name])) for name in ("vanilla", arm))
    by_category: dict[str, list[Example]] = {}
    for prompt_id in before:
        if prompt_id in after:
            example = _example(before[prompt_id], after[prompt_id])
            by_category.setdefault(example.category, []).append(example)
    return [example for group in by_category.values() for example in median_and_worst(group)]


def median_and_worst(group: Sequence[Example]) -> list[Example]:
    """The median (of an even number the upper one) and the worst change. Empty where nothing was scored."""
    changed = sorted((e for e in group if e.change is not None), key=lambda e: e.change or ())
    if not changed:
        return []
    median, worst = changed[len(changed) // 2], changed[0]
    if median is worst:
        return [replace(worst, shown_as="the only one")]
    return [replace(median, shown_as="median change"), replace(worst, shown_as="worst change")]


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
    if examples:
        print(f"\n{RULE}")
    for example in examples:
        change = "" if example.change is None else f", {'/'.join(f'{c:+g}' for c in example.change)}"
        print(printable(f"\n[{example.category}: {example.shown_as or 'example'}{change}] {example.question}"))
        print(printable(f"  before {_marks(example.scores_before)}: {example.before}"))
        print(printable(f"  after  {_marks(example.scores_after)}: {example.after}"))
    if examples:
        print()


def _marks(scores: list[float | None]) -> str:
    return "/".join("–" if s is None else f"{s:g}" for s in scores)
