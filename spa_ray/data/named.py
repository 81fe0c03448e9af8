"""Public data sets by name: where each is published, and what its rows become.

A `DataSet` is a file of `loaders/`, or of one's own (`prompts.source: my_file:MY_SET`). It reads the hub, or the local
copy at `prompts.path`, and gives rows whose prompt is in `messages`; every other column is kept.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from spa_ray.config.prompts import Prompts
from spa_ray.data.forms import BadRowError, check_text, messages_digest
from spa_ray.data.hub import UnreachableError
from spa_ray.data.readers import Row, read_rows
from spa_ray.errors import InputError

HALVES = ("train", "test")
Values = dict[str, Any]


class Answer(NamedTuple):
    """`scores` by name, null where there is none; `system` is what it was sampled under."""

    text: str
    scores: Mapping[str, float | None]
    system: str | None = None


@dataclass(frozen=True)
class DataSet:
    """A public data set. `splits` are its published ones, of which the first is read where none is named; one that is
    published in a single part has two halves instead, `train` and `test`, by a hash of the prompt."""

    page: str  # where its terms and its files are
    row: Callable[[Values], Values]  # a published row with `messages`, or `prompt`, and the columns to keep
    hub: str | None = None  # what `datasets` reads; `{split}` in it is the split
    splits: tuple[str, ...] = ()
    read: Callable[[Path, str | None], Iterator[Row]] | None = (
        None  # a local copy in a form that `readers` does not know
    )
    answers: Callable[[Values], list[Answer]] | None = None  # those of a published row, taken out of it
    shown_by: tuple[str, ...] = ()  # columns that show such a row, wherever it comes from
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # the lowest and highest of each score
    reference: str | None = None  # the column of its prompts that holds an answer

    def rows(self, section: Prompts, *, where: str, notes: dict[str, None], raw: bool = False) -> Iterator[Row]:
        """The rows of a split; `raw`: as they are published. Raises: InputError where they cannot be had."""
        name, split = section.source, section.split
        known = self.splits or HALVES
        if split is not None and split not in known:
            raise InputError(f"{where}.split: {name} has {', '.join(known)}, not {split!r}")
        published = (split or self.splits[0]) if self.splits else None
        for row in self._published(section, published, where, notes):
            if row.values is None:
                yield row
                continue
            try:
                values = self.row(dict(row.values))
            except BadRowError as e:
                yield Row(row.place, problem=str(e))
                continue
            except (AttributeError, IndexError, KeyError, TypeError) as e:
                yield Row(row.place, problem=f"is no row of {name} as {self.page} has it ({type(e).__name__}: {e})")
                continue
            if self.splits or split is None or _half(values) == split:
                yield Row(row.place, row.values if raw else values)

    def _published(self, section: Prompts, split: str | None, where: str, notes: dict[str, None]) -> Iterator[Row]:
        if section.path is not None:
            path = Path(os.path.expanduser(section.path))
            if not path.exists():
                raise InputError(f"{where}.path: {section.path!r}: no such file or folder; a copy is at {self.page}")
            part = section.split if self.splits and path.is_dir() else None  # one file is the split that is asked for
            local = Prompts(source=str(path.absolute()), split=part)
            yield from self.read(path, split) if self.read else read_rows(local, where=where, notes=notes)
            return
        fix = f"{where}.path=FILE, a copy from {self.page}"
        if self.hub is None:
            raise UnreachableError(f"{where}.source: {section.source} is on no hub; give {fix}")
        try:
            hub = Prompts(source=self.hub.format(split=split), split=split)
            yield from read_rows(hub, where=where, notes=notes)
        except InputError as e:
            raise type(e)(f"{e}: {fix}") from e


def _half(values: Values) -> str:
    return HALVES[messages_digest(values["messages"])[0] % 2]


def columns(prompt: str | tuple[str, ...], **ours: str | tuple[str, ...]) -> Callable[[Values], Values]:
    """Makes a `DataSet.row`: the prompt is the text in the first of these columns that is there, and others get names
    of ours. Case does not count, since forks of a set change it.

    The function raises BadRowError where there is no such prompt.
    """

    def row(values: Values) -> Values:
        named = _find(values, prompt)
        if named is None:
            wanted = prompt if isinstance(prompt, str) else " or ".join(prompt)
            raise BadRowError(f"has no column {wanted}; columns: {', '.join(map(str, values))}")
        text = check_text(values.pop(named), f"`{named}`")
        for name, published in ours.items():
            if (found := _find(values, published)) is not None:
                values[name] = values.pop(found)
        return {**values, "messages": [{"role": "user", "content": text}]}

    return row


def _find(values: Values, published: str | tuple[str, ...]) -> str | None:
    there = {str(name).lower(): name for name in values}
    names = (published,) if isinstance(published, str) else published
    return next((there[name.lower()] for name in names if name.lower() in there), None)


def rating(value: Any, name: str, low: float, high: float) -> float:
    """A rating from `low` to `high` as a number. Raises: BadRowError."""
    try:
        given = float("nan" if isinstance(value, bool) else value)
    except (TypeError, ValueError):
        given = math.nan
    if not low <= given <= high:
        raise BadRowError(f"{name} is {value!r}; a rating is a number from {low} to {high}")
    return given


def lettered(question: str, choices: list[str], form: str = "{}. {}") -> str:
    """A question with its choices below it, A to Z."""
    return "\n".join([question, *(form.format(chr(ord("A") + k), choice) for k, choice in enumerate(choices))])
