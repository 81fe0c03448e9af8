"""What the built-in benchmarks share: their rows, a subsample by seed, an answer's letter, shares with intervals."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

from pydantic import Field

from spa_ray.config.benchmark import BenchmarkConfig
from spa_ray.config.prompts import Prompts
from spa_ray.data.readers import read_rows
from spa_ray.errors import InputError
from spa_ray.evaluation.bootstrap import mean_interval

LETTERS = "ABCD"
ALONE = r"[(（\[*\s]*([{letters}])[)）\]*]*"  # a letter, in brackets perhaps
FIRST = ALONE + r"(?:[.:,;。：，、\n]|\s*$|\s+(?:is|because)\b|(?<=[)）\]*]))"  # at the beginning; no article
SAID = r"(?i:answer(?:\s+is)?|答案(?:是|为)?|选择?)\s*[:：]?\s*" + ALONE + r"(?![\w'’])"
BRACKETED = r"[(（]([{letters}])[)）]"


class NamedConfig(BenchmarkConfig):
    """A benchmark whose questions are a data set by name (`data/loaders/`)."""

    sources: ClassVar[frozenset[str]] = frozenset({"limit", "path", "seed"})

    path: str | None = Field(None, description="local copy, as its authors publish it; null: the hub")
    limit: int | None = Field(None, ge=1, description="ask N questions, drawn by `seed`; null: all")
    seed: int = Field(0, description="which questions `limit` takes")


def named_rows(
    name: str, config: NamedConfig, *columns: str, split: str | None = None, where: str
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Place and values of every row of a data set by name. Raises: InputError for a row without one of the columns."""
    return _rows(Prompts(source=name, path=config.path, split=split), columns, where)


def file_rows(path: str, *columns: str, where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Place and values of every row of a file. Raises: InputError for a row without one of the columns."""
    return _rows(Prompts(source=path), columns, where)


def _rows(source: Prompts, columns: Sequence[str], where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for row in read_rows(source, where=where):
        if row.blank:
            continue
        missing = [name for name in columns if row.values is not None and row.values.get(name) is None]
        if row.values is None or missing:
            raise InputError(f"{row.place}: {row.problem or f'no {missing[0]!r} in it, which {where} has'}")
        yield row.place, row.values


def drawn(rows: Iterable[Mapping[str, Any]], config: NamedConfig) -> list[Mapping[str, Any]]:
    """At most `limit` rows in their order: those whose `prompt_id` and the seed have the lowest hashes, so that a
    smaller limit takes some of a larger one's, whatever the files' order."""
    rows = list(rows)
    if config.limit is None or config.limit >= len(rows):
        return rows

    def lot(at: int) -> str:
        return hashlib.sha256(f"{config.seed} {rows[at]['prompt_id']}".encode()).hexdigest()

    return [rows[at] for at in sorted(sorted(range(len(rows)), key=lot)[: config.limit])]


def letter(text: str, options: Sequence[str]) -> int | None:
    """Which option an answer names, by its letter or else by the option's text; None where it names none or several.

    A letter counts at the answer's beginning, after "answer" ("The answer is (B)"), or as the only one in brackets; an
    option's text counts where the first line holds that of one option alone.
    """
    text, letters = text.strip(), LETTERS[: len(options)]
    found = re.match(FIRST.format(letters=letters), text)
    names = {found[1]} if found else set(re.findall(SAID.format(letters=letters), text))
    names = names or set(re.findall(BRACKETED.format(letters=letters), text))
    if names:
        return letters.index(names.pop()) if len(names) == 1 else None
    line = text.partition("\n")[0].casefold()
    held = [at for at, option in enumerate(options) if (bare := option.strip(" .。").casefold()) and bare in line]
    return held[0] if len(held) == 1 else None


def share(values: Iterable[float]) -> dict[str, float]:
    """A mean over prompts with its interval."""
    return asdict(mean_interval(list(values), resamples=1000, seed=0))
