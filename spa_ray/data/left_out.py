"""What was left out of a source of prompts, and why: counted by reason, the first of each quoted, the rows listed.

`lines` is what a terminal shows, one line per reason; `write_list` keeps the rows themselves as JSONL. Prompts that
generation leaves out (too long, timed out) are rows of episodes with an error: `error_lines` says the same of them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from spa_ray.storage.files import AnyPath, write_text

FILE = "left_out.jsonl"
LISTED = 10_000  # rows of one source that are listed at most; all are counted
DUPLICATE = "duplicate"


@dataclass
class LeftOut:
    """Rows by reason. `first`: where the first of each was and what was wrong with it."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    rows: list[dict[str, str]] = field(default_factory=list)

    def add(self, reason: str, place: str, why: str) -> None:
        self.counts[reason] += 1
        self.first.setdefault(reason, f"{place}: {why}")
        if len(self.rows) < LISTED:
            self.rows.append({"reason": reason, "row": place, "why": why})


def lines(sources: Mapping[str, LeftOut], *, file: AnyPath | None = None) -> list[str]:
    """One line for each source and reason; `file` is where all of them are listed."""
    listed = f"; listed in {file}" if file is not None else ""
    return [
        f"{where}: {count:,} rows left out: {reason} (the first: {left.first[reason]}){listed}"
        for where, left in sources.items()
        for reason, count in left.counts.items()
    ]


def write_list(sources: Mapping[str, LeftOut], file: AnyPath) -> list[str]:
    """Write the rows of all sources to one file, where there are any. Returns: `lines`."""
    rows = [{"source": where, **row} for where, left in sources.items() for row in left.rows]
    if rows:
        write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return lines(sources, file=file)


ErrorKinds = dict[str, dict[str, Any]]  # kind -> {"count": int, "first": str}


def add_errors(kinds: ErrorKinds, errors: Iterable[str | None]) -> None:
    """Count errors of episodes (`kind: text`) by kind; null is no error."""
    for error in errors:
        if error is not None:
            kinds.setdefault(error.partition(":")[0], {"count": 0, "first": error})["count"] += 1


def error_lines(kinds: ErrorKinds, of: int, *, where: str, episodes: AnyPath | None = None) -> list[str]:
    """One line for each kind of error that stands in the place of answers; `episodes` holds them."""
    listed = f"; listed in {episodes} by their error" if episodes is not None else ""
    return [
        f"{where}: {found['count']:,} of {of:,} prompts left out: {kind} (the first: {found['first']}){listed}"
        for kind, found in kinds.items()
    ]
