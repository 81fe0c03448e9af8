"""Files of prompts as bytes: compression undone, the kind of content found by its first bytes, the encoding of text.

`open_data` gives a stream of the decompressed bytes; `kind_of` names the reader's kind, or why there is none.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from spa_ray.errors import InputError

HEAD = 4096
COMPRESSED = (".gz", ".gzip", ".zst", ".zstd", ".xz", ".lzma", ".bz2", ".lz4")
KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
    ".txt": "text",
}
# What people give as prompts and no reader takes: the form, and what to do.
OTHER = {
    ".md": ("a text document", "give its prompts as JSONL"),
    ".xlsx": ("a spreadsheet", "save it as CSV (UTF-8)"),
    ".xls": ("a spreadsheet", "save it as CSV (UTF-8)"),
    ".ods": ("a spreadsheet", "save it as CSV (UTF-8)"),
    ".pkl": ("a pickle, which can run code", "write it as Parquet (DataFrame.to_parquet)"),
    ".pickle": ("a pickle, which can run code", "write it as Parquet (DataFrame.to_parquet)"),
    ".yaml": ("YAML", "write it as JSONL"),
    ".yml": ("YAML", "write it as JSONL"),
    ".py": ("a Python file", "name a function in it, module:function"),
    ".zip": ("a zip archive", "unpack it and give the folder"),
    ".tar": ("a tar archive", "unpack it and give the folder"),
    ".tgz": ("a tar archive", "unpack it and give the folder"),
    ".7z": ("an archive", "unpack it and give the folder"),
    ".npy": ("NumPy arrays", "write them as Parquet"),
    ".npz": ("NumPy arrays", "write them as Parquet"),
    ".orc": ("ORC", "write it as Parquet"),
    ".avro": ("Avro", "write it as Parquet"),
    ".xml": ("XML", "write it as JSONL"),
    ".db": ("a database", "export its table as CSV or Parquet"),
    ".sqlite": ("a database", "export its table as CSV or Parquet"),
}
_MAGIC = (
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"BZh", "bz2"),
    (b"\x04\x22\x4d\x18", "lz4"),
)
_CONTENT = (
    (b"PAR1", "parquet"),
    (b"ARROW1", "arrow"),
    (b"\xff\xff\xff\xff", "arrow"),
    (b"PK\x03\x04", ".zip"),
    (b"SQLite format 3\x00", ".db"),
    (b"Obj\x01", ".avro"),
    (b"\x93NUMPY", ".npy"),
    (b"\x80\x04\x95", ".pkl"),
    (b"\x80\x05\x95", ".pkl"),
)
_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@dataclass(frozen=True)
class Unreadable:
    """Why a file has no reader: what it is, and what to do."""

    form: str
    fix: str


def suffix_of(path: Path) -> str:
    """The suffix that names the content, in lower case: `.jsonl` of `a.jsonl.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def looks_like_file(text: str) -> bool:
    """Whether a name ends as a file of prompts does."""
    path = Path(text)
    return suffix_of(path) in {*KINDS, *OTHER} or path.suffix.lower() in COMPRESSED


def kind_of(path: Path) -> str | Unreadable:
    """The reader's kind, by the first bytes, then by the name. Raises: InputError for a file that cannot be read."""
    with open_data(path) as file:
        head = file.read(HEAD)
    found = next((kind for magic, kind in _CONTENT if head.startswith(magic)), None)
    if head.startswith(b"version https://git-lfs"):
        return Unreadable("a Git LFS pointer and not the file itself", "fetch the file: git lfs pull")
    if head[257:262] == b"ustar":
        found = ".tar"
    suffix = suffix_of(path)
    if found == ".zip" and suffix in OTHER:
        found = suffix
    if found is not None:
        return Unreadable(*OTHER[found]) if found in OTHER else found
    if suffix in KINDS:
        start = head.lstrip().lower()
        if start.startswith((b"<!doctype html", b"<html")):
            return Unreadable("a web page and not the file itself", "download the file again")
        if KINDS[suffix] in {"parquet", "arrow"} and head.lstrip()[:1] in {b"{", b"["}:
            return "json"
        return _kind_of_text(head) if KINDS[suffix] == "text" else KINDS[suffix]
    if suffix in OTHER:
        return Unreadable(*OTHER[suffix])
    if head.removeprefix(codecs.BOM_UTF8).lstrip()[:1] in {b"{", b"["}:
        return "json"
    return Unreadable("unknown kind of file", f"the suffix may be {', '.join(KINDS)}, each also compressed")


def _kind_of_text(head: bytes) -> str | Unreadable:
    """Lines of text, unless the file holds JSON rows or no text at all."""
    encoding = encoding_of(head)
    if encoding == "utf-8" and b"\0" in head:
        return Unreadable("binary data under the name of a text file", "give a text file, one prompt per line")
    start = head.decode(encoding, errors="ignore").lstrip("\ufeff").lstrip()
    if start[:1] == "[" and start[1:].lstrip()[:1] == "{":
        return "json"
    try:
        return "jsonl" if isinstance(json.loads(start.partition("\n")[0]), dict) else "text"
    except (ValueError, RecursionError):
        return "text"


@contextmanager
def open_data(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed by what its first bytes say, whatever its name says."""
    try:
        file = path.open("rb")
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: cannot be read ({getattr(e, 'strerror', None) or e})") from e
    with file, guarded(path):
        yield _decompressed(file, 2)


def is_compressed(path: Path) -> bool:
    with path.open("rb") as file:
        return _codec(file.read(8)) is not None


def _codec(head: bytes) -> str | None:
    return next((name for magic, name in _MAGIC if head.startswith(magic)), None)


def _decompressed(file: BinaryIO, layers: int) -> BinaryIO:
    codec = _codec(file.peek(8)[:8]) if isinstance(file, io.BufferedReader) else None
    if codec is None or layers == 0:
        return file
    opened: Any
    if codec == "gzip":
        opened = gzip.GzipFile(fileobj=file)
    elif codec == "xz":
        opened = lzma.LZMAFile(file)  # noqa: SIM115 (closed with the file below it)
    elif codec == "bz2":
        opened = bz2.BZ2File(file)
    else:
        import pyarrow as pa

        opened = _Raw(pa.CompressedInputStream(pa.PythonFile(file, mode="r"), codec))
    return _decompressed(cast("BinaryIO", io.BufferedReader(opened, 1 << 16)), layers - 1)


class _Raw(io.RawIOBase):
    """An Arrow stream behind Python's interface."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


@contextmanager
def guarded(path: Path) -> Iterator[None]:
    """Raises: InputError for damaged compressed data and for what the disk refuses."""
    import pyarrow as pa

    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, OSError, pa.ArrowException) as e:
        reason = next(iter(str(e).splitlines()), type(e).__name__)
        raise InputError(f"{path}: cannot be read to its end ({reason}); fetch or write the file again") from e


def encoding_of(head: bytes) -> str:
    """The encoding that the first bytes show: a byte-order mark, or UTF-16's zeros; else UTF-8."""
    for mark, name in _BOMS:
        if head.startswith(mark):
            return name
    if len(head) >= 4 and head[0] and not head[1] and head[2] and not head[3]:
        return "utf-16-le"
    if len(head) >= 4 and not head[0] and head[1] and not head[2] and head[3]:
        return "utf-16-be"
    return "utf-8"


def not_utf8(data: bytes, error: UnicodeDecodeError, of: str = "of the line") -> str:
    """What to say of bytes that are no UTF-8."""
    byte = data[error.start]
    meant = bytes([byte]).decode("cp1252", errors="replace")
    return (
        f"not UTF-8 (byte {error.start + 1} {of} is 0x{byte:02x}, {meant!r} in Windows-1252); save the file as UTF-8, "
        "for example with iconv"
    )
