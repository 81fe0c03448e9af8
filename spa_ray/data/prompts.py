"""Prompts: from a data set's rows to validated rows of the `PROMPTS` schema.

Comes in: `config.prompts`. Goes out: dicts (prompt_id, messages, meta), or one Parquet file of them. Every row is
checked before anything else starts: a malformed row ends it (`InputError`), or is left out and counted
(`on_bad_row: skip`); the same prompt twice is left out and counted. In memory stay ids and hashes only.
Never: chat templates, tokenizers.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from spa_ray.config.models import Prompts
from spa_ray.data.readers import Row, read_rows
from spa_ray.data.schemas import PROMPTS
from spa_ray.errors import InputError
from spa_ray.logs import printable

ROLES = ("system", "user", "assistant")
ROWS_PER_GROUP = 1024
LONGEST_MESSAGE = 600  # characters: a column's name, a role or an id can be a whole document

Message = dict[str, str]
Prompt = dict[str, Any]  # prompt_id: str, messages: list[Message], meta: str


@dataclass
class PromptCounts:
    """What became of the rows: `rows` are prompts that came out; `first_bad` is the message of the first bad row."""

    rows: int = 0
    duplicates: int = 0
    bad: int = 0
    first_bad: str | None = None


class BadRowError(Exception):
    """One row is no prompt; the text says why and how to mend it."""


def read_prompts(
    prompts: Prompts, *, where: str = "prompts", skip: int = 0, counts: PromptCounts | None = None
) -> Iterator[Prompt]:
    """The valid prompts of a source, in its order: at most `prompts.limit`, after leaving out the first `skip` of them.

    Two calls with `skip` 0 and `limit` thus share no prompt. `counts` is filled while the iterator runs, and counts
    only what stands behind the skipped prompts. Nothing is read beyond the last prompt that is wanted.
    Raises: InputError naming file, row and mend: at a bad row (unless `on_bad_row` is skip), and when the source
    cannot be read.
    """
    counts = PromptCounts() if counts is None else counts
    seen = _Seen()
    left = skip
    for row in read_rows(prompts, where=where):
        try:
            prompt = to_prompt(row, prompts.columns)
            new = seen.add(prompt)
        except BadRowError as e:
            message = _brief(f"{row.place}: {e}")
            if prompts.on_bad_row == "error":
                raise InputError(f"{message} (or leave such rows out with prompts.on_bad_row=skip)") from e
            if left == 0:
                counts.bad += 1
                counts.first_bad = counts.first_bad or message
            continue
        if left > 0:
            left -= new
        elif not new:
            counts.duplicates += 1
        else:
            counts.rows += 1
            yield prompt
            if counts.rows == prompts.limit:
                return


def write_prompts(prompts: Prompts, out: Path, *, where: str = "prompts", skip: int = 0) -> PromptCounts:
    """Write a source's prompts to one Parquet file of the `PROMPTS` schema.

    The file appears whole, by rename, after the last row was checked; on an error nothing is left behind.
    Raises: InputError as `read_prompts` does, and when no prompt is left.
    """
    counts = PromptCounts()
    rows = read_prompts(prompts, where=where, skip=skip, counts=counts)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        with pq.ParquetWriter(part, PROMPTS) as writer:
            while group := list(islice(rows, ROWS_PER_GROUP)):
                writer.write_table(pa.Table.from_pylist(group, schema=PROMPTS))
        if counts.rows == 0:
            raise InputError(_nothing_left(prompts, counts, where, skip))
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    return counts


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
class _Seen:
    """Which prompts came by: hashes, and under which id each came first."""

    owner: dict[str, bytes] = field(default_factory=dict)
    hashes: set[bytes] = field(default_factory=set)

    def add(self, prompt: Prompt) -> bool:
        """Remember a prompt; False when the same one was there before. Raises: BadRowError for an id that is taken."""
        digest = messages_digest(prompt["messages"])
        name = prompt["prompt_id"]
        if self.owner.get(name, digest) != digest:
            raise BadRowError(
                f"prompt_id {name!r} belongs to another prompt already; give each prompt an id of its own"
            )
        self.owner[name] = digest
        if digest in self.hashes:
            return False
        self.hashes.add(digest)
        return True


def messages_digest(messages: Sequence[Mapping[str, str]]) -> bytes:
    """A hash (16 bytes) of roles and contents, the same on every machine."""
    canonical = json.dumps([[m["role"], m["content"]] for m in messages], ensure_ascii=False, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode(), digest_size=16).digest()


def to_prompt(row: Row, columns: Mapping[Literal["prompt", "messages", "prompt_id"], str]) -> Prompt:
    """One row as a prompt; what is neither prompt nor id goes to `meta`. Raises: BadRowError."""
    if row.values is None:
        raise BadRowError(str(row.problem))
    values = dict(row.values)
    messages = _messages(values, columns)
    name = _prompt_id(_take(values, columns, "prompt_id"))
    return {
        "prompt_id": messages_digest(messages).hex() if name is None else name,
        "messages": messages,
        "meta": _meta(values),
    }


def _messages(values: dict[str, Any], columns: Mapping[Any, str]) -> list[Message]:
    """Take the prompt out of the row: from the column that the config names, else from the one that is there."""
    chosen = [key for key in ("prompt", "messages") if key in columns]
    keys = chosen or ["prompt", "messages"]
    taken = {key: value for key in keys if (value := _take(values, columns, key)) is not None}
    if len(taken) > 1:
        raise BadRowError(
            "has both `prompt` and `messages`; say which one to read, for example prompts.columns={prompt: prompt}"
        )
    if not taken:
        wanted = " or ".join(f"`{columns.get(key, key)}`" for key in keys)
        have = ", ".join(str(name) for name in values) or "none"
        raise BadRowError(f"no value in {wanted} (other columns: {have}); name the column with prompts.columns")
    if "prompt" in taken:
        return [{"role": "user", "content": _text(taken["prompt"], f"`{columns.get('prompt', 'prompt')}`")}]
    return _check_messages(taken["messages"], columns.get("messages", "messages"))


def _take(values: dict[str, Any], columns: Mapping[Any, str], key: str) -> Any:
    """Remove and return our column `key`, None where it is absent. Raises: BadRowError when a named one is absent."""
    name = columns.get(key, key)
    if key in columns and name not in values:
        have = ", ".join(str(n) for n in values) or "none"
        raise BadRowError(f"has no column {name!r}, which prompts.columns names for {key} (columns: {have})")
    return values.pop(name, None)


def _check_messages(value: Any, column: str) -> list[Message]:
    if isinstance(value, str):  # CSV has no lists
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as e:
            raise BadRowError(f"`{column}` is text that is not JSON; give a list of {{role, content}}") from e
    if not isinstance(value, list | tuple) or not value:
        shown = "empty" if isinstance(value, list | tuple) else f"a {type(value).__name__}"
        raise BadRowError(f"`{column}` is {shown}; give a list of {{role, content}}, the last one by the user")
    messages = [_check_message(message, i, f"`{column}`[{i}]") for i, message in enumerate(value)]
    if messages[-1]["role"] != "user":
        raise BadRowError(f"the last message's role is {messages[-1]['role']!r}; a prompt ends with the user's message")
    return messages


def _check_message(value: Any, position: int, name: str) -> Message:
    if not isinstance(value, Mapping) or not {"role", "content"} <= value.keys():
        raise BadRowError(f"{name} is not an object with `role` and `content`")
    extra = sorted(str(key) for key in value if key not in ("role", "content") and value[key] is not None)
    if extra:
        raise BadRowError(f"{name} has the key {extra[0]!r}; only `role` and `content` are read, remove it")
    role = value["role"]
    if role not in ROLES:
        raise BadRowError(f"{name} has the role {role!r}; a role is one of {', '.join(ROLES)}")
    if role == "system" and position > 0:
        raise BadRowError(f"{name} has the role 'system'; a system message may only come first")
    return {"role": role, "content": _text(value["content"], name)}


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        shown = "null" if value is None else f"a {type(value).__name__}"
        raise BadRowError(f"{name} is {shown}; a prompt is text")
    if not value.strip():
        raise BadRowError(f"{name} is empty; give it a text or remove the row")
    return _encodable(value, name)


def _encodable(text: str, name: str) -> str:
    """The text itself. Lone surrogates come from bytes that are not UTF-8, or from half of an escaped pair in JSON."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise BadRowError(f"{name} is not valid Unicode (character {e.start + 1}); save the file as UTF-8") from e
    return text


def _prompt_id(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BadRowError(f"prompt_id is a {type(value).__name__}; an id is text or a whole number")
    try:
        text = str(value)
    except ValueError as e:  # a whole number of more digits than Python writes
        raise BadRowError(f"prompt_id cannot be written ({e})") from e
    if not text.strip():
        raise BadRowError("prompt_id is empty; give each row one, or none for all")
    return _encodable(text, "prompt_id")


def _meta(values: Mapping[str, Any]) -> str:
    """The other columns as a JSON string, keys sorted."""
    try:
        text = json.dumps(_jsonable(values), ensure_ascii=False, sort_keys=True, allow_nan=False)
    except RecursionError as e:
        raise BadRowError("a further column is nested too deeply to be kept in `meta`") from e
    except ValueError as e:  # a whole number of more digits than Python writes
        raise BadRowError(f"a further column cannot be kept in `meta` ({e})") from e
    return _encodable(text, "a further column")


def _jsonable(value: Any) -> Any:
    """The value in JSON's types: NaN and infinities are null, dates and decimals their text. Raises: BadRowError."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _jsonable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set):
        return [_jsonable(inner) for inner in value]
    if isinstance(value, bytes):
        raise BadRowError("a further column holds bytes, which `meta` (JSON) cannot carry; remove that column")
    return str(value)
