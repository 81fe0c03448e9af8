"""Rows out of a data set, as they stand: JSONL, JSON, CSV, Parquet, a folder of them, or a reader by dotted path.

Comes in: `config.prompts`. Goes out: `Row`s, each with its place (file and line) for messages, and either a dict or
the reason why it cannot be read. Streams: one row (a JSON array: one file) is in memory at a time.
Never: the meaning of a column; that is `prompts.py`.
"""

from __future__ import annotations

import csv
import inspect
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NoReturn

from spa_ray.config.models import Prompts
from spa_ray.data.dotted import is_dotted, load_dotted
from spa_ray.errors import InputError

PARQUET_BATCH = 1024
CSV_CELL_LIMIT = 2**31 - 1  # the csv module's own limit, 131,072 characters, refuses long documents

NAMED = frozenset(
    {
        "arena-hard",
        "helpsteer2",
        "hh-rlhf",
        "honeset",
        "mt-bench",
        "pku-saferlhf",
        "safetybench",
        "saferlhf",
        "trustllm",
        "truthfulqa",
        "ultrafeedback",
        "wildguard",
        "wildguardmix",
    }
)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

SourceKind = Literal["file", "folder", "reader", "named"]


@dataclass(frozen=True)
class Row:
    """One row of a data set: `place` names it in messages; `values` is None where `problem` says why."""

    place: str
    values: Mapping[str, Any] | None = None
    problem: str | None = None


def source_kind(prompts: Prompts, *, where: str = "prompts") -> SourceKind:
    """What `prompts.source` names. Nothing is opened.

    Raises: InputError when it is not set, or names neither a file, a folder, a reader nor a data set.
    """
    source = prompts.source
    if not source:
        raise InputError(f"{where}.source: missing; give a file, a folder or a reader (package.module:function)")
    path = Path(source).expanduser()
    if path.is_file():
        return "file"
    if path.is_dir():
        return "folder"
    if is_dotted(source):
        return "reader"
    if source.lower() in NAMED or (
        _HUB_ID.fullmatch(source) and path.suffix.lower() not in READERS and source[0] != "."
    ):
        return "named"
    raise InputError(
        f"{where}.source: {source!r}: no such file or folder; "
        "give one that is there, or a reader (package.module:function)"
    )


def read_rows(prompts: Prompts, *, where: str = "prompts") -> Iterator[Row]:
    """Every row of the source, in the order of the files' names and of the rows in them.

    A row that cannot be read comes with its `problem`; a file that cannot be read at all ends the reading.
    Raises: InputError (at the first row at the latest), also for a named data set, since none has a loader yet.
    """
    kind = source_kind(prompts, where=where)
    source = str(prompts.source)
    if kind == "reader":
        yield from _rows_of_reader(source, prompts.split, where)
    elif kind == "named":
        _refuse_named(source, where)
    elif kind == "folder":
        for path in _files_of(Path(source).expanduser(), prompts.split, where):
            yield from READERS[path.suffix.lower()](path)
    else:
        path = Path(source).expanduser()
        if prompts.split is not None:
            raise InputError(f"{where}.split: {str(path)!r} is one file and has no splits; remove the key")
        if path.suffix.lower() not in READERS:
            raise InputError(f"{where}.source: {path}: unknown kind of file; the suffix may be {', '.join(READERS)}")
        yield from READERS[path.suffix.lower()](path)


def _refuse_named(source: str, where: str) -> NoReturn:
    missing = " (and there is no file or folder of this name)" if "/" in source else ""
    raise InputError(
        f"{where}.source: the named data set {source!r} has no loader yet{missing}; "
        "give its rows as a JSONL, JSON, CSV or Parquet file, or a reader (package.module:function)"
    )


def _files_of(folder: Path, split: str | None, where: str) -> list[Path]:
    """The folder's readable files by name, hidden ones left out; with a split, those that carry its name."""
    inside = [p for p in sorted(folder.rglob("*")) if p.suffix.lower() in READERS and p.is_file()]
    files = [p for p in inside if not any(part.startswith((".", "_")) for part in p.relative_to(folder).parts)]
    if split is not None:
        files = [p for p in files if _is_of_split(p.relative_to(folder), split)]
    if not files:
        of_split = f" of the split {split!r} (SPLIT.jsonl, SPLIT-00000.parquet or SPLIT/ANY.csv)" if split else ""
        raise InputError(f"{where}.source: {folder}: no {', '.join(READERS)} file{of_split} in it")
    return files


def _is_of_split(path: Path, split: str) -> bool:
    return split in path.parts[:-1] or path.stem == split or path.stem.startswith(f"{split}-")


def _rows_of_reader(source: str, split: str | None, where: str) -> Iterator[Row]:
    reader = load_dotted(source, where=f"{where}.source")
    if not callable(reader):
        raise InputError(f"{where}.source: {source!r} is a {type(reader).__name__}; a reader is a function")
    try:
        inspect.signature(reader).bind(split=split)
    except TypeError as e:
        raise InputError(f"{where}.source: {source!r} must take the keyword `split`: def reader(split=None)") from e
    rows = reader(split=split)
    try:
        numbered = enumerate(rows, start=1)
    except TypeError as e:
        raise InputError(f"{where}.source: {source!r} returned a {type(rows).__name__}; a reader yields dicts") from e
    for number, values in numbered:
        yield _row(f"{source}: row {number}", values)


def _row(place: str, values: object) -> Row:
    if not isinstance(values, Mapping):
        shown = "null" if values is None else f"a {type(values).__name__}"
        return Row(place, problem=f"a row is an object with named columns, this is {shown}")
    return Row(place, values)


def _read_jsonl(path: Path) -> Iterator[Row]:
    """Lines end at "\\n" alone: U+2028 and its kin are legal inside a JSON string."""
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            place = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as e:
                yield Row(place, problem=f"not UTF-8 (byte {e.start + 1} of the line); save the file as UTF-8")
                continue
            if not text.strip():
                continue
            try:
                values = json.loads(text, parse_constant=_no_constant)
            except (ValueError, RecursionError) as e:
                yield Row(place, problem=f"not JSON ({_json_reason(e)}); a line holds one object")
                continue
            yield _row(place, values)


def _read_json(path: Path) -> Iterator[Row]:
    """A JSON array of objects. Files that do not open with a bracket hold one object a line, as many `.json` do."""
    with _open(path) as file:
        if not file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            yield from _read_jsonl(path)
            return
        file.seek(0)
        data = file.read()
    try:
        items = json.loads(data.decode("utf-8-sig"), parse_constant=_no_constant)
    except json.JSONDecodeError as e:
        raise InputError(f"{path}:{e.lineno}: not JSON ({e.msg}); mend the file, or give one object a line") from e
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path}: not JSON ({_json_reason(e)}); mend the file, or give one object a line") from e
    del data
    for number, values in enumerate(items, start=1):
        yield _row(f"{path}: item {number}", values)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _json_reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.colno}"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return str(error)


def _read_csv(path: Path) -> Iterator[Row]:
    """The first line names the columns. An empty cell is a missing value."""
    csv.field_size_limit(CSV_CELL_LIMIT)
    # A byte that is not UTF-8 becomes a lone surrogate, which makes that one row bad and not the file.
    with _open(path) as raw, io.TextIOWrapper(raw, "utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        header = _csv_header(reader, path)
        while True:
            place = f"{path}:{reader.line_num + 1}"
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as e:
                yield Row(place, problem=f"not CSV ({e}); double the quotes inside a quoted cell")
                continue
            if not cells:
                continue
            if len(cells) != len(header):
                yield Row(place, problem=f"{len(cells)} cells, the header names {len(header)}; quote commas")
                continue
            yield Row(place, {name: cell or None for name, cell in zip(header, cells, strict=True)})


def _csv_header(reader: Iterator[list[str]], path: Path) -> list[str]:
    try:
        header = next(reader, [])
    except csv.Error as e:
        raise InputError(f"{path}:1: not CSV ({e}); the first line names the columns") from e
    _refuse_twins(header, f"{path}:1")
    return header


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            _refuse_twins(file.schema_arrow.names, f"{path}")
            number = 0
            for batch in file.iter_batches(batch_size=PARQUET_BATCH):
                for row in _rows_of_batch(batch, path, number):
                    number += 1
                    yield row
    except (pa.ArrowException, OSError) as e:
        raise InputError(f"{path}: not a Parquet file that can be read ({_first_line(e)})") from e


def _rows_of_batch(batch: Any, path: Path, before: int) -> Iterator[Row]:
    """A value that Python cannot hold (text that is not UTF-8, a date beyond the year 9999) costs its row alone."""
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError):
        rows = None
    for number in range(batch.num_rows):
        place = f"{path}: row {before + number + 1}"
        if rows is not None:
            yield _row(place, rows[number])
            continue
        try:
            values = batch.slice(number, 1).to_pylist()[0]
        except (ValueError, OverflowError) as e:
            yield Row(place, problem=f"a value cannot be read ({_first_line(e)}); mend it or leave its column out")
            continue
        yield _row(place, values)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _refuse_twins(names: Sequence[str], place: str) -> None:
    """Raises: InputError for two columns of one name, of which a row could hold only one."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"{place}: the column {twice[0]!r} stands twice in the header; rename one")


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from e


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
