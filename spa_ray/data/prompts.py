"""Prompts: from a data set's rows to validated rows of the `PROMPTS` schema.

Comes in: `config.prompts`. Goes out: dicts (prompt_id, messages, meta), or one Parquet file of them. Every row is
checked before anything else starts: a malformed row ends it (`InputError`), or is left out and counted
(`on_bad_row: skip`); the same prompt twice is left out and counted. In memory stay ids and hashes only.
Never: chat templates, tokenizers.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from spa_ray.config.prompts import Prompts
from spa_ray.data.forms import (
    BadRowError,
    LastAnswer,
    encodable,
    in_words,
    is_missing,
    messages_digest,
    take,
    take_messages,
)
from spa_ray.data.left_out import DUPLICATE, LeftOut
from spa_ray.data.overlap import Grams, Wordings
from spa_ray.data.readers import Row, read_rows
from spa_ray.data.schemas import PROMPTS
from spa_ray.errors import InputError
from spa_ray.logs import printable

ROWS_PER_GROUP = 1024
CONTAMINATED = "in the evaluation"
LONGEST_VECTOR = 64  # numbers in a list that is kept in `meta`
LONGEST_NAME = 80  # characters of a column's name in a note
MOST_NAMES = 50  # columns that notes name
_INDEX = re.compile(r"__index_level_\d+__|Unnamed: \d+|")  # what pandas calls its row numbers; CSV's empty name
LONGEST_MESSAGE = 600  # characters: a column's name, a role or an id can be a whole document

Check = Callable[[Sequence[Mapping[str, str]]], None]  # a prompt's messages; raises ValueError
Prompt = dict[str, Any]  # prompt_id: str, messages: list[Message], meta: str


@dataclass
class PromptCounts:
    """What became of the rows: `rows` are prompts that came out; `first_bad` is the message of the first bad row;
    `dropped` has the duplicates and the bad ones by reason."""

    rows: int = 0
    duplicates: int = 0
    near: int = 0  # prompts that came out and differ from an earlier one in case, punctuation and spaces alone
    bad: int = 0
    first_bad: str | None = None
    left_out: dict[str, int] = field(default_factory=dict)  # column -> rows in which it was left out
    told: dict[str, None] = field(default_factory=dict)  # one line for each thing of the source that was left out
    dropped: LeftOut = field(default_factory=LeftOut, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """What a stage's record says of them."""
        return {
            "rows": self.rows, "duplicates": self.duplicates, "near_duplicates": self.near, "bad": self.bad,
            "first_bad": self.first_bad,
            "left_out": self.left_out, "told": list(self.told),
        }  # fmt: skip

    def refuse(
        self, place: str, fault: BadRowError, on_bad_row: str, *, where: str = "prompts", counted: bool = True
    ) -> None:
        """A bad row: counted with `on_bad_row` skip. Raises: InputError otherwise."""
        message = _brief(f"{place}: {fault}")
        if on_bad_row == "error":
            raise InputError(f"{message} (or leave such rows out with {where}.on_bad_row=skip)") from fault
        if counted:
            self.bad += 1
            self.first_bad = self.first_bad or message
            self.dropped.add(fault.reason, place, message.removeprefix(f"{place}: "))

    def notes(self, where: str = "prompts") -> list[str]:
        """One line for each file and column that was left out, and one for near-duplicates."""
        notes = list(self.told)
        if self.left_out:
            columns = ", ".join(f"{name} ({rows:,} rows)" for name, rows in self.left_out.items())
            notes.append(f"{where}: columns left out (bytes, long lists of numbers, row numbers): {columns}")
        if self.near:
            notes.append(f"{where}: {self.near:,} prompts have the words of an earlier one; they are kept")
        return notes


def read_prompts(
    prompts: Prompts,
    *,
    where: str = "prompts",
    skip: int = 0,
    counts: PromptCounts | None = None,
    check: Check | None = None,
    against: Sequence[Prompts] = (),
    look: int | None = None,
) -> Iterator[Prompt]:
    """The valid prompts of a source, in its order: at most `prompts.limit`, after leaving out the first `skip` of them.

    Two calls with `skip` 0 and `limit` thus share no prompt. `counts` is filled while the iterator runs, and counts
    only what comes after the skipped prompts. Nothing is read beyond the last prompt that is wanted. With
    `prompts.sample` the whole source is read, or its first `look` rows, and the order is that of a sample. Where
    `check` raises a ValueError, the row is a bad one. Prompts that share a gram with those of `against` are left out.
    Raises: InputError naming file, row and the fix: at a bad row (unless `on_bad_row` is skip), and when the source
    cannot be read.
    """
    counts = PromptCounts() if counts is None else counts
    held_out = (row for section in against for row in read_prompts(section, where="evaluation.prompts", look=look))
    grams = Grams(row["messages"] for row in held_out)
    if prompts.sample is None:
        found = _valid(prompts, where, skip, counts, check, grams, None)
    else:
        valid, seed = _valid(prompts, where, 0, counts, check, grams, look), prompts.sample
        drawn = heapq.nsmallest(skip + (prompts.limit or 0), valid, key=lambda prompt: _ticket(prompt, seed))
        found = iter(drawn[skip:])
    wordings = Wordings()
    for prompt in islice(found, prompts.limit):
        counts.near += wordings.repeats(prompt["messages"])
        counts.rows += 1
        yield prompt


def _ticket(prompt: Prompt, seed: int) -> bytes:
    """A prompt's place in a sample: by its text and the seed alone."""
    return hashlib.blake2b(messages_digest(prompt["messages"]), digest_size=16, key=str(seed).encode()).digest()


def _valid(
    prompts: Prompts, where: str, skip: int, counts: PromptCounts, check: Check | None, grams: Grams, look: int | None
) -> Iterator[Prompt]:
    seen = Seen()
    left = skip
    for row in islice(read_rows(prompts, where=where, notes=counts.told), look):
        if row.blank:
            if left == 0:
                counts.dropped.add("empty", row.place, "an empty line")
            continue
        try:
            prompt = to_prompt(
                row, prompts.columns, last_answer=prompts.last_answer, left_out=counts.left_out if left == 0 else None
            )
            if check is not None:
                _checked(prompt, check)
            new = seen.add(prompt)
        except BadRowError as e:
            counts.refuse(row.place, e, prompts.on_bad_row, counted=left == 0)
            continue
        if new and prompt["messages"] in grams:
            if left == 0:
                counts.dropped.add(CONTAMINATED, row.place, "shares 13 words in a row with a held-out prompt")
        elif left > 0:
            left -= new
        elif not new:
            counts.duplicates += 1
            counts.dropped.add(DUPLICATE, row.place, "the same messages as in an earlier row")
        else:
            yield prompt


def _checked(prompt: Prompt, check: Check) -> None:
    try:
        check(prompt["messages"])
    except ValueError as e:
        raise BadRowError(str(e), "refused by the template") from e


def write_prompts(
    prompts: Prompts,
    out: Path,
    *,
    where: str = "prompts",
    skip: int = 0,
    check: Check | None = None,
    against: Sequence[Prompts] = (),
) -> PromptCounts:
    """Write a source's prompts to one Parquet file of the `PROMPTS` schema, as `read_prompts` gives them.

    The file appears whole, by rename, after the last row was checked; on an error nothing is left behind.
    Raises: InputError as `read_prompts` does, and when no prompt is left.
    """
    counts = PromptCounts()

    def rows() -> Iterator[Prompt]:
        yield from read_prompts(prompts, where=where, skip=skip, counts=counts, check=check, against=against)
        if counts.rows == 0:
            raise InputError(_nothing_left(prompts, counts, where, skip))

    write_rows(rows(), PROMPTS, out)
    return counts


def write_rows(rows: Iterator[dict[str, Any]], schema: pa.Schema, out: Path, **options: Any) -> None:
    """Write rows to one Parquet file, by rename; on an error of theirs nothing is left behind."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        with pq.ParquetWriter(part, schema, **options) as writer:
            while group := list(islice(rows, ROWS_PER_GROUP)):
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)


def _nothing_left(prompts: Prompts, counts: PromptCounts, where: str, skip: int) -> str:
    if skip:
        return (
            f"{where}.source: {prompts.source}: no prompt beyond the first {skip}; give more prompts or a smaller limit"
        )
    why = f"; {counts.bad} bad rows, the first: {counts.first_bad}" if counts.bad else ""
    return f"{where}.source: {prompts.source}: no prompt in it{why}"


def _brief(message: str) -> str:
    """One line that can be shown and kept, however long or strange the row is that it quotes."""
    line = printable(" ".join(message.split()))
    return line if len(line) <= LONGEST_MESSAGE else f"{line[: LONGEST_MESSAGE - 1]}…"


@dataclass
class Seen:
    """Which prompts came by: hashes, and under which id each came first."""

    owner: dict[str, bytes] = field(default_factory=dict)
    hashes: set[bytes] = field(default_factory=set)

    def add(self, prompt: Prompt) -> bool:
        """Remember a prompt; False when the same one was there before. Raises: BadRowError for an id that is taken."""
        digest = messages_digest(prompt["messages"])
        name = prompt["prompt_id"]
        if self.owner.get(name, digest) != digest:
            raise BadRowError(
                f"prompt_id {name!r} belongs to another prompt already; give each prompt an id of its own",
                "prompt_id taken",
            )
        self.owner[name] = digest
        if digest in self.hashes:
            return False
        self.hashes.add(digest)
        return True


def to_prompt(
    row: Row,
    columns: Mapping[Literal["prompt", "messages", "prompt_id"], str],
    *,
    last_answer: LastAnswer = "error",
    left_out: dict[str, int] | None = None,
) -> Prompt:
    """One row as a prompt; what is neither prompt nor id goes to `meta`, or to the count of what is left out.

    Raises: BadRowError.
    """
    if row.values is None:
        raise BadRowError(str(row.problem), "unreadable")
    values = dict(row.values)
    messages = take_messages(values, columns, last_answer)
    name = _prompt_id(take(values, columns, "prompt_id"))
    return {
        "prompt_id": messages_digest(messages).hex() if name is None else name,
        "messages": messages,
        "meta": _meta(values, {} if left_out is None else left_out),
    }


def _prompt_id(value: Any) -> str | None:
    if is_missing(value):
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BadRowError(f"prompt_id is {in_words(value)}; an id is text or a whole number")
    try:
        text = str(value)
    except ValueError as e:  # a whole number of more digits than Python writes
        raise BadRowError(f"prompt_id cannot be written ({e})") from e
    if not text.strip():
        raise BadRowError("prompt_id is empty; give each row one, or none for all")
    return encodable(text, "prompt_id")


def _meta(values: Mapping[str, Any], left_out: dict[str, int]) -> str:
    """The other columns as a JSON string, keys sorted, without bytes, embeddings and the row numbers of pandas."""
    try:
        heavy = [name for name, value in values.items() if _INDEX.fullmatch(str(name)) or _is_heavy(value)]
        for name in heavy:
            shown = printable(str(name)[:LONGEST_NAME])
            if shown in left_out or len(left_out) < MOST_NAMES:
                left_out[shown] = left_out.get(shown, 0) + 1
        kept = {name: value for name, value in values.items() if name not in heavy}
        text = json.dumps(_jsonable(kept), ensure_ascii=False, sort_keys=True, allow_nan=False)
    except RecursionError as e:
        raise BadRowError("a further column is nested too deeply to be kept in `meta`") from e
    except ValueError as e:  # a whole number of more digits than Python writes
        raise BadRowError(f"a further column cannot be kept in `meta` ({e})") from e
    return encodable(text, "a further column")


def _is_heavy(value: Any) -> bool:
    """Bytes anywhere in it (images, audio), or a long list of numbers (an embedding, token ids)."""
    if isinstance(value, bytes | bytearray | memoryview):
        return True
    if isinstance(value, Mapping):
        return any(_is_heavy(inner) for inner in value.values())
    if isinstance(value, list | tuple | set):
        if len(value) > LONGEST_VECTOR and all(isinstance(entry, int | float) for entry in value):
            return True
        return any(_is_heavy(inner) for inner in value)
    return False


def _jsonable(value: Any) -> Any:
    """The value in JSON's types: NaN and infinities are null, dates and decimals their text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _jsonable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set):
        return [_jsonable(inner) for inner in value]
    return str(value)
