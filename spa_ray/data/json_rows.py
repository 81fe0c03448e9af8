"""Rows out of JSON: an object per line, objects one after the other, an array, or one object that holds the rows.

`read` takes an open stream of bytes; rows come as (place, value or `Fault`).
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from spa_ray.data.containers import HEAD, encoding_of, not_utf8
from spa_ray.errors import InputError

ROWS_KEYS = ("rows", "data", "examples", "instances", "items", "records", "prompts", "questions", "samples", "dataset")
SPLITS = ("train", "training", "validation", "valid", "val", "dev", "test", "eval")
PROMPT_KEYS = ("prompt", "messages", "conversations", "conversation", "instruction", "question", "text", "chosen")
DEEPEST = 3  # objects around the rows
_GAP = re.compile(r"[\s,]*")


@dataclass(frozen=True)
class Fault:
    """Why there is no value."""

    reason: str


Item = tuple[str, Any]


def read(file: BinaryIO, path: Path, *, split: str | None, lines: bool) -> Iterator[Item]:
    """Every row. `lines` says that the file's name promises an object per line.

    Raises: InputError for a file that is one JSON text and broken, and for rows in several places.
    """
    head = file.peek(HEAD)[:HEAD] if hasattr(file, "peek") else b""
    encoding = encoding_of(head)
    source: Any = file if encoding in {"utf-8", "utf-8-sig"} else io.TextIOWrapper(file, encoding, newline="\n")
    first, number, text = b"" if source is file else "", 0, ""
    for number, first in enumerate(source, start=1):  # noqa: B007 (the first line that is not blank)
        text = _decoded(first) if isinstance(_decoded(first), str) else "?"  # type: ignore[assignment]
        if text.strip():
            break
    else:
        return
    one = _parse(text.strip().rstrip(","))
    whole = isinstance(one, Fault) and text.rstrip()[-1] in "{[,:"
    if isinstance(one, list) or (isinstance(one, Mapping) and not _is_row(one)) or whole:
        rest = source.read()
        if not isinstance(one, Fault) and not rest.strip():
            yield from unwrap(one, path, split=split)
            return
        if isinstance(one, Fault):
            yield from _whole(first + rest, path, split=split, lines=lines, before=number - 1)
            return
        source = io.BytesIO(rest) if isinstance(rest, bytes) else io.StringIO(rest, newline="\n")
    yield from _of_line(first, f"{path}:{number}")
    for at, line in enumerate(source, start=number + 1):
        yield from _of_line(line, f"{path}:{at}")


def _is_row(value: Mapping[str, Any]) -> bool:
    """Whether the only object of a file is a row, and not what holds the rows."""
    return not _places(value) and not _columns(value) and not _by_id(value) and "columns" not in value


def _of_line(line: bytes | str, place: str) -> Iterator[Item]:
    text = _decoded(line)
    if isinstance(text, Fault):
        yield place, text
    elif text.strip():
        value = _parse(text)
        if isinstance(value, Fault) and text.rstrip().endswith(","):
            bare = _parse(text.rstrip().rstrip(","))
            value = bare if isinstance(bare, Mapping) else value
        yield place, Fault(f"not JSON ({value.reason}); a line holds one object") if isinstance(value, Fault) else value


def _decoded(line: bytes | str) -> str | Fault:
    if isinstance(line, str):
        return line
    try:
        return line.decode("utf-8-sig" if line.startswith(b"\xef\xbb\xbf") else "utf-8")
    except UnicodeDecodeError as e:
        return Fault(not_utf8(line, e))


def _parse(text: str) -> Any:
    """The value; NaN and infinities are numbers. A `Fault` where there is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        return Fault(_reason(e))


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _whole(data: bytes | str, path: Path, *, split: str | None, lines: bool, before: int) -> Iterator[Item]:
    """The file as one JSON text, or as several one after the other."""
    fix = "fix the file, or give one object per line"
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: {not_utf8(bytes(data), e, 'of the file')}") from e  # type: ignore[arg-type]
    try:
        values = list(_values(text))
    except (ValueError, RecursionError) as e:
        if lines and text.lstrip().split("\n", 1)[0].strip() not in {"{", "[", "[{"}:
            for number, line in enumerate(text.split("\n"), start=before + 1):
                yield from _of_line(line, f"{path}:{number}")
            return
        at = f":{e.lineno + before}" if isinstance(e, json.JSONDecodeError) else ""
        reason = e.msg if isinstance(e, json.JSONDecodeError) else _reason(e)
        raise InputError(f"{path}{at}: not JSON ({reason}); {fix}") from e
    if len(values) > 1:
        yield from ((f"{path}:{line + before}", value) for line, value in values)
    elif values:
        yield from unwrap(values[0][1], path, split=split)


def _values(text: str) -> Iterator[tuple[int, Any]]:
    """Every value of the text and its line."""
    decoder = json.JSONDecoder()
    end, line, counted = 0, 1, 0
    while True:
        start = _GAP.match(text, end).end()  # type: ignore[union-attr]
        if start == len(text):
            return
        line += text.count("\n", counted, start)
        counted = start
        try:
            value, end = decoder.raw_decode(text, start)
        except json.JSONDecodeError:
            closed = re.sub(r",(\s*[\]}])", r"\1", text) if end == 0 else text  # a comma before the last bracket
            if closed == text or text[start] != "[":
                raise
            yield line, json.loads(closed)
            return
        yield line, value


def unwrap(value: Any, path: Path, *, split: str | None) -> Iterator[Item]:
    """The rows inside one JSON value. Raises: InputError when they may be in several places."""
    if not isinstance(value, Mapping):
        rows = value if isinstance(value, list) else [value]
        yield from ((f"{path}: item {number}", row) for number, row in enumerate(rows, start=1))
        return
    names = value.get("columns")
    if isinstance(names, list) and isinstance(value.get("data"), list) and all(isinstance(n, str) for n in names):
        for number, cells in enumerate(value["data"], start=1):  # pandas, orient="split"
            fits = isinstance(cells, list) and len(cells) == len(names)
            row = (
                dict(zip(names, cells, strict=True)) if fits else Fault(f"not {len(names)} values, as `columns` names")
            )
            yield f"{path}: data[{number}]", row
        return
    columns = _columns(value)
    if columns:
        for number, cells in enumerate(zip(*columns.values(), strict=True), start=1):
            yield f"{path}: entry {number}", dict(zip(columns, cells, strict=True))
        return
    if _by_id(value):
        yield from ((f"{path}: {key!r}", row) for key, row in value.items())
        return
    places = _places(value)
    if not places:
        yield f"{path}:1", value
        return
    name = _choose(places, path, split)
    for number, row in enumerate(places[name], start=1):
        inner = row.get("row") if isinstance(row, Mapping) and "row_idx" in row else row  # the hub's own server
        yield f"{path}: {name}[{number}]", inner


def _choose(places: Mapping[str, Sequence[Any]], path: Path, split: str | None) -> str:
    told = ", ".join(f"{name} ({len(rows):,})" for name, rows in places.items())
    if split is not None:
        found = [name for name in places if name == split or name.endswith(f".{split}")]
        if not found:
            raise InputError(
                f"{path}: no rows under {split!r}; the file holds {told}; set prompts.split to one of them"
            )
        return found[0]
    if len(places) == 1:
        return next(iter(places))
    known = [name for key in ROWS_KEYS for name in places if name.rpartition(".")[2] == key]
    if known and not any(name.rpartition(".")[2] in SPLITS for name in places):
        return known[0]
    raise InputError(f"{path}: rows are in several places: {told}; say which with prompts.split={next(iter(places))}")


def _places(value: Mapping[str, Any], above: str = "", depth: int = 0) -> dict[str, list[Any]]:
    """Dotted name -> rows of each list of objects inside an object that is no row itself."""
    if depth >= DEEPEST or any(isinstance(value.get(key), str) for key in PROMPT_KEYS):
        return {}
    found: dict[str, list[Any]] = {}
    for key, inner in value.items():
        if isinstance(inner, list) and inner and all(isinstance(row, Mapping) for row in inner):
            if not all(_is_turn(row) for row in inner):
                found[f"{above}{key}"] = inner
        elif isinstance(inner, Mapping):
            found |= _places(inner, f"{above}{key}.", depth + 1)
    return found if depth or any(found) else {}


def _is_turn(row: Mapping[str, Any]) -> bool:
    return {"role", "content"} <= row.keys() or {"from", "value"} <= row.keys()


def _columns(value: Mapping[str, Any]) -> dict[str, list[Any]] | None:
    """Columns of equal length, one of them of prompts: lists, or pandas' mappings of row numbers."""
    wide = {
        key: list(inner.values()) if isinstance(inner, Mapping) and all(str(k).isdigit() for k in inner) else inner
        for key, inner in value.items()
    }
    lists = [inner for inner in wide.values() if isinstance(inner, list)]
    same = len(lists) == len(wide) > 0 and len({len(inner) for inner in lists}) == 1 and len(lists[0]) > 0
    prompts = [wide[key] for key in PROMPT_KEYS if isinstance(wide.get(key), list)]
    first = prompts[0][0] if prompts and prompts[0] else None
    return wide if same and isinstance(first, str | list) else None


def _by_id(value: Mapping[str, Any]) -> bool:
    """Whether each value is a row of its own, under its id."""
    inner = list(value.values())
    return len(inner) > 1 and all(isinstance(v, Mapping) and any(key in v for key in PROMPT_KEYS) for v in inner)
