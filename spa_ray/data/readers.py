"""Rows out of a data set: JSONL, JSON, CSV, TSV, Parquet, Arrow, lines of text, each also compressed; folders; what
`datasets` reads (`hub.py`); readers by dotted path.

Takes `config.prompts`; gives `Row`s, each with its place (file and line) for messages, and either a dict or the reason
why it cannot be read. One row (a JSON text that is no line: one file) is in memory at a time. What a column means is
decided in `forms.py`; what the rows of a public data set become, in its own file (`named.py`).
"""

from __future__ import annotations

import csv
import difflib
import inspect
import io
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from spa_ray.config.plugs import SOURCES, is_dotted, load_plug
from spa_ray.config.prompts import Prompts
from spa_ray.data import json_rows
from spa_ray.data.containers import HEAD, Unreadable, encoding_of, is_compressed, kind_of, open_data
from spa_ray.data.folders import files_of
from spa_ray.data.forms import OUR_COLUMNS, in_words
from spa_ray.data.hub import address_of, read_tables
from spa_ray.data.json_rows import Fault
from spa_ray.errors import InputError

PARQUET_BATCH = 1024
UNHOLDABLE = (ValueError, OverflowError, LookupError)
CSV_CELL_LIMIT = 2**31 - 1  # the csv module's own limit, 131,072 characters, refuses long documents

SourceKind = Literal["file", "folder", "reader", "datasets", "named"]


@dataclass(frozen=True)
class Row:
    """One row of a data set: `place` names it in messages; `values` is None where `problem` says why. A `blank` one,
    an empty line of a text file, is no fault."""

    place: str
    values: Mapping[str, Any] | None = None
    problem: str | None = None
    blank: bool = False


def source_kind(prompts: Prompts, *, where: str = "prompts") -> SourceKind:
    """What `prompts.source` names. Nothing is opened.

    Raises: InputError when it is not set, or names neither a file, a folder, a reader nor a data set.
    """
    source = prompts.source
    if not source:
        raise InputError(
            f"{where}.source: missing; give a file, a folder, a data set by name or of a hub (hf://owner/name) or a "
            "reader (package.module:function)"
        )
    if source in SOURCES:
        return "named"
    path = Path(os.path.expanduser(source))
    try:
        if path.is_file():
            return "file"
        if not is_dotted(source) and address_of(source) is not None:
            return "datasets"
        if path.is_dir():
            return "folder"
    except OSError as e:  # a name that is too long, a folder that may not be entered
        raise InputError(f"{where}.source: {source[:200]!r}: {e.strerror}") from e
    if is_dotted(source):
        return "reader"
    near = difflib.get_close_matches(source.lower().replace("-", "_"), SOURCES, n=1)
    meant = f"did you mean {near[0]}? Or " if near else ""
    hint = f"{meant}give one that is there, a hub's data set (hf://owner/name) or a reader (package.module:function)"
    if "://" in source:
        hint = "only Parquet is read from afar (its name ends in .parquet); copy others to this machine's disks"
    elif any(sign in source for sign in "*?["):
        hint = "patterns are not expanded; give the folder"
    raise InputError(f"{where}.source: {source!r}: no such file or folder; {hint}")


def read_rows(
    prompts: Prompts, *, where: str = "prompts", notes: dict[str, None] | None = None, raw: bool = False
) -> Iterator[Row]:
    """Every row of the source, in the order of the files' names and of the rows in them; with `raw` those of a named
    data set as they are published.

    A row that cannot be read comes with its `problem`; a file that cannot be read at all ends the reading. `notes`
    is told what is left out. Raises: InputError (at the first row at the latest).
    """
    from spa_ray.data.named import DataSet  # reads by this module

    kind, notes = source_kind(prompts, where=where), {} if notes is None else notes
    column = prompts.columns.get("prompt", "prompt")
    source = str(prompts.source)
    path = Path(os.path.expanduser(source))
    plug = load_plug(SOURCES, source, where=f"{where}.source") if kind in ("named", "reader") else None
    if prompts.path is not None and not isinstance(plug, DataSet):
        raise InputError(f"{where}.path: {source!r} is no data set by name; give the file as {where}.source")
    if isinstance(plug, DataSet):
        yield from plug.rows(prompts, where=where, notes=notes, raw=raw)
    elif kind == "reader":
        yield from _rows_of_reader(source, plug, prompts.split, where)
    elif kind == "datasets":
        yield from _read_datasets(str(address_of(source)), prompts.split, where, notes)
    elif kind == "folder":
        for file in files_of(path, prompts.split, where, notes):
            yield from _read(file, _told_kind(kind_of(file), file, where, notes), None, column)
    else:
        of_file = kind_of(path)
        if isinstance(of_file, Unreadable):
            raise InputError(f"{where}.source: {path}: {of_file.form}; {of_file.fix}")
        if prompts.split is not None and of_file not in ("json", "jsonl"):
            raise InputError(f"{where}.split: {str(path)!r} is one file and has no splits; remove the key")
        yield from _read(path, _told_kind(of_file, path, where, notes), prompts.split, column)


def _told_kind(kind: str | Unreadable, path: Path, where: str, notes: dict[str, None]) -> str:
    if kind == "text":
        notes[f"{where}: {path}: a text file: every line is one prompt"] = None
    return str(kind)


def _read_datasets(address: str, split: str | None, where: str, notes: dict[str, None]) -> Iterator[Row]:
    number = 0
    for place, table in read_tables(address, split, where, notes):
        yield from _rows_of_batch(_slim(table), place, number)
        number += table.num_rows


def _rows_of_reader(source: str, reader: Any, split: str | None, where: str) -> Iterator[Row]:
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
        return Row(place, problem=f"a row is an object with named columns, this is {in_words(values)}")
    return Row(place, values)


def _read(path: Path, kind: str, split: str | None, column: str) -> Iterator[Row]:
    """The rows of one file; `column` names the lines of a text file. What is wrong with the file as a whole is an
    InputError."""
    if kind in ("parquet", "arrow"):
        yield from _read_arrow(path, kind)
        return
    with open_data(path) as buffered:
        if kind in ("csv", "tsv"):
            yield from _read_csv(buffered, path, tabs=kind == "tsv")
            return
        if kind == "text":
            yield from _read_lines(buffered, path, column)
            return
        for place, value in json_rows.read(buffered, path, split=split, lines=kind == "jsonl"):
            yield Row(place, problem=value.reason) if isinstance(value, Fault) else _row(place, value)


def _read_csv(file: BinaryIO, path: Path, *, tabs: bool) -> Iterator[Row]:
    """The first line names the columns; what parts the cells is found there. An empty cell is a missing value."""
    csv.field_size_limit(CSV_CELL_LIMIT)
    with _text(file, path, newline="") as text:
        yield from _csv_rows(text, path, tabs=tabs)


def _read_lines(file: BinaryIO, path: Path, column: str) -> Iterator[Row]:
    """Every line is a row with one column, as the `text` builder of `datasets` reads them."""
    with _text(file, path, newline=None) as text:
        for number, line in enumerate(text, start=1):
            place = f"{path}:{number}"
            yield _row(place, {column: line.rstrip("\n")}) if line.strip() else Row(place, blank=True)


@contextmanager
def _text(file: BinaryIO, path: Path, *, newline: str | None) -> Iterator[io.TextIOWrapper]:
    """The file as text, in the encoding that its first bytes show. Raises: InputError for bytes that are not in it."""
    encoding = encoding_of(file.peek(HEAD)[:HEAD])  # type: ignore[attr-defined]
    encoding = "utf-8-sig" if encoding == "utf-8" else encoding
    # A byte that is not UTF-8 becomes a lone surrogate, which makes that one row bad and not the file.
    errors = "surrogateescape" if encoding == "utf-8-sig" else "strict"
    try:
        with io.TextIOWrapper(file, encoding, errors=errors, newline=newline) as text:
            yield text
    except UnicodeError as e:
        raise InputError(f"{path}: not {encoding.upper()} ({e}); save the file as UTF-8") from e


def _csv_rows(text: io.TextIOWrapper, path: Path, *, tabs: bool) -> Iterator[Row]:
    lines = iter(text)
    first = next(lines, "")
    skipped = 0
    told = re.fullmatch(r"sep=(.)\r?\n", first)  # as spreadsheets write it
    if told:
        first, skipped = next(lines, ""), 1
    delimiter = told[1] if told else _delimiter(first, tabs=tabs)
    reader = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
    header = [name.strip() for name in _csv_header(reader, path)]
    while True:
        place = f"{path}:{reader.line_num + 1 + skipped}"
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
            commas = "commas" if delimiter == "," else f"cells that hold {delimiter!r}"
            yield Row(place, problem=f"{len(cells)} cells, the header names {len(header)}; quote {commas}")
            continue
        yield Row(place, {name: cell or None for name, cell in zip(header, cells, strict=True) if name or cell})


def _delimiter(header: str, *, tabs: bool) -> str:
    """What parts the cells of the header: of comma, semicolon, tab and bar the one that gives most names."""
    if tabs and "\t" in header:
        return "\t"
    counts = {}
    for delimiter in (",", ";", "\t", "|"):
        try:
            counts[delimiter] = len(next(csv.reader([header], delimiter=delimiter, strict=True), []))
        except csv.Error:
            counts[delimiter] = 0
    return max(counts, key=lambda delimiter: counts[delimiter])  # the first of equals: the comma


def _csv_header(reader: Iterator[list[str]], path: Path) -> list[str]:
    try:
        header = next(reader, [])
    except csv.Error as e:
        raise InputError(f"{path}:1: not CSV ({e}); the first line names the columns") from e
    _refuse_twins([name for name in header if name], f"{path}:1")
    return header


def _read_arrow(path: Path, kind: str) -> Iterator[Row]:
    import pyarrow as pa

    form = "a Parquet file" if kind == "parquet" else "an Arrow file"
    try:
        source: Path | bytes = path
        if is_compressed(path):
            with open_data(path) as file:
                source = file.read()
        number = 0
        for batch in _parquet_batches(path, source) if kind == "parquet" else _ipc_batches(path, source):
            for row in _rows_of_batch(batch, f"{path}: ", number):
                number += 1
                yield row
    except (pa.ArrowException, OSError) as e:
        raise InputError(f"{path}: not {form} that can be read ({_first_line(e)})") from e


def _parquet_batches(path: Path, source: Path | bytes) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(source if isinstance(source, Path) else pa.BufferReader(source)) as file:
        names = file.schema_arrow.names
        _refuse_twins(names, f"{path}")
        heavy = _heavy(file.schema_arrow)
        columns = [name for name in names if name not in heavy] if heavy else None
        for batch in file.iter_batches(batch_size=PARQUET_BATCH, columns=columns):
            yield _with_marks(batch, heavy)


def _ipc_batches(path: Path, source: Path | bytes) -> Iterator[Any]:
    """Arrow's file and stream formats; `datasets` writes streams."""
    import pyarrow as pa

    def opened() -> Any:
        return pa.memory_map(str(source)) if isinstance(source, Path) else pa.BufferReader(source)

    with opened() as probe:
        is_file = probe.read(6) == b"ARROW1"
    with opened() as data:
        reader = pa.ipc.open_file(data) if is_file else pa.ipc.open_stream(data)
        _refuse_twins(reader.schema.names, f"{path}")
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else iter(reader)
        for batch in batches:
            slim = _slim(batch)
            for first in range(0, slim.num_rows, PARQUET_BATCH):
                yield slim.slice(first, PARQUET_BATCH)


def _slim(batch: Any) -> Any:
    """A table or batch without its columns of bytes, marks in their place."""
    heavy = _heavy(batch.schema)
    return _with_marks(batch.select([name for name in batch.schema.names if name not in heavy]), heavy)


def _with_marks(batch: Any, heavy: set[str]) -> Any:
    """The batch, with a column `Bytes` stands for in place of each that was not read."""
    import pyarrow as pa

    for name in sorted(heavy):
        batch = batch.append_column(name, pa.array([b""] * batch.num_rows, pa.binary()))
    return batch


def _heavy(schema: Any) -> set[str]:
    return {field.name for field in schema if _holds_bytes(field.type) and field.name not in OUR_COLUMNS}


def _holds_bytes(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        return True
    if isinstance(kind, pa.BaseExtensionType):
        return True
    return any(_holds_bytes(kind.field(number).type) for number in range(kind.num_fields))


def _rows_of_batch(batch: Any, place: str, before: int) -> Iterator[Row]:
    """A value that Python cannot hold (text that is not UTF-8, a date beyond the year 9999) costs its row alone."""
    try:
        rows = batch.to_pylist()
    except UNHOLDABLE:
        rows = None
    for number in range(batch.num_rows):
        here = f"{place}row {before + number + 1}"
        if rows is not None:
            yield _row(here, rows[number])
            continue
        try:
            values = batch.slice(number, 1).to_pylist()[0]
        except UNHOLDABLE as e:
            yield Row(here, problem=f"a value cannot be read ({_first_line(e)}); fix it or leave its column out")
            continue
        yield _row(here, values)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _refuse_twins(names: Sequence[str], place: str) -> None:
    """Raises: InputError for two columns of one name, of which a row could hold only one."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"{place}: the column {twice[0]!r} stands twice in the header; rename one")
