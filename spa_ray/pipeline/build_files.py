"""What one task of the build stage does: pieces of episode files in, one file of pairs out, in bounded memory.

Comes in: names and sizes of Parquet files. Goes out: a plan of tasks; of each, its pairs and their funnel. Only the
columns that denoising and pairs need are read. Never: Ray.
"""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.dataset as pds
import pyarrow.parquet as pq
from pyarrow.fs import FileSystem, LocalFileSystem

from spa_ray.config.models import Config
from spa_ray.data.episodes import PART, PARTITIONING, READ_OPTIONS, Retried, unreadable
from spa_ray.data.schemas import EPISODES, RESPONSE, pairs_schema
from spa_ray.preferences import Funnel, build_pairs, denoise, ranged

RESPONSE_FIELDS = ("index", "kind", "text", "token_ids", "system", "finish_reason", "score_draws")
_RESPONSES = pa.list_(pa.struct([RESPONSE.field(name) for name in RESPONSE_FIELDS]))
NARROW = pa.schema(
    [
        field.with_type(_RESPONSES) if field.name == "responses" else field
        for field in EPISODES
        if field.name in ("prompt_id", "messages", "responses", "scores", "error", "attempt")
    ]
)
TASK_BYTES = 2**25  # of Parquet that one task reads: a few seconds of work
TABLE_BYTES = 2**27  # in memory, that are denoised and paired at once


@dataclass(frozen=True)
class Piece:
    """A file, or some of its row groups, and the part (the try) that its rows belong to."""

    file: str
    part: int = 0
    groups: tuple[int, ...] | None = None


def plan_tasks(sizes: Mapping[str, int], root: str, filesystem: FileSystem) -> list[list[Piece]]:
    """Every file in one task, tasks of about TASK_BYTES; a larger file is cut at its row groups.

    `sizes`: bytes by path; `root`: the folder that `part=K` stands below.
    """
    tasks: list[list[Piece]] = []
    room = 0
    for file, size in sizes.items():
        for piece, bytes_ in _pieces(file, size, root, filesystem):
            if bytes_ > room or not tasks:
                tasks.append([])
                room = TASK_BYTES
            tasks[-1].append(piece)
            room -= bytes_
    return tasks


def to_text(task: Sequence[Piece]) -> str:
    """As Ray carries it; `from_text` gives it back."""
    return json.dumps([[piece.file, piece.part, piece.groups] for piece in task])


def from_text(text: str) -> list[Piece]:
    return [Piece(file, part, None if groups is None else tuple(groups)) for file, part, groups in json.loads(text)]


def _pieces(file: str, size: int, root: str, filesystem: FileSystem) -> Iterator[tuple[Piece, int]]:
    below = file.removeprefix(root).rpartition("/")[0]
    part = pds.get_partition_keys(PARTITIONING.parse(below)).get(PART) or 0
    if size <= TASK_BYTES:
        yield Piece(file, part), size
        return
    about = pq.read_metadata(file, filesystem=filesystem)
    rows = max(1, about.num_rows)
    groups: list[int] = []
    held = 0.0
    for group in range(about.num_row_groups):
        bytes_ = size * about.row_group(group).num_rows / rows
        if groups and held + bytes_ > TASK_BYTES:
            yield Piece(file, part, tuple(groups)), round(held)
            groups, held = [], 0.0
        groups.append(group)
        held += bytes_
    if groups:
        yield Piece(file, part, tuple(groups)), round(held)


def pair_task(
    pieces: Sequence[Piece],
    out: str,
    config: Config,
    *,
    tau: float | None,
    delta: float,
    filesystem: FileSystem,
    target: FileSystem,
    metadata: Mapping[bytes, bytes] | None,
    retried: Retried | None,
) -> Funnel:
    """Write one task's pairs to the file `out` on `target`; `filesystem` is the episodes'."""
    schema = ranged(pairs_schema(reliability=config.scoring.repeated).with_metadata(metadata), config)
    funnels = []
    with pq.ParquetWriter(out, schema, filesystem=target) as writer:
        for table in _joined(_read(pieces, filesystem, retried)):
            denoised = denoise(table.replace_schema_metadata(metadata), config, tau=tau)
            pairs = build_pairs(denoised, config, delta=delta).cast(schema)
            writer.write_table(pairs)
            funnels.append(Funnel.of(denoised, pairs, config, tau=tau, delta=delta))
    return functools.reduce(operator.add, funnels)


def _read(pieces: Iterable[Piece], filesystem: FileSystem, retried: Retried | None) -> Iterator[pa.Table]:
    """The current rows, a file or one of its row groups at a time."""
    for piece in pieces:
        for table in _tables(piece, filesystem):
            if retried is not None:
                parts = pa.repeat(pa.scalar(piece.part, pa.int32()), table.num_rows)
                table = table.filter(retried.current(table["prompt_id"], parts))
            table = table.select(NARROW.names).replace_schema_metadata(None)
            yield table if table.schema == NARROW else table.cast(NARROW)


def _tables(piece: Piece, filesystem: FileSystem) -> Iterator[pa.Table]:
    far = not isinstance(filesystem, LocalFileSystem)  # then few large requests, at the price of more work
    try:
        with pq.ParquetFile(piece.file, filesystem=filesystem, pre_buffer=far, **READ_OPTIONS) as file:
            columns = needed_columns(file.schema)
            if piece.groups is None:
                yield file.read(columns=columns)
            for group in piece.groups or ():
                yield file.read_row_group(group, columns=columns)
    except (pa.ArrowInvalid, OSError) as e:
        raise unreadable(piece.file) from e


def needed_columns(schema: pq.ParquetSchema) -> list[str]:
    """The leaf columns of a file of episodes that NARROW is made of, as Parquet names them."""
    paths = [schema.column(leaf).path for leaf in range(len(schema.names))]
    parts = [path.split(".") for path in paths]  # responses.list.element.text
    return [
        path
        for path, (top, *below) in zip(paths, parts, strict=True)
        if (below[2:3] and below[2] in RESPONSE_FIELDS if top == "responses" else top in NARROW.names)
    ]


def _joined(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Small tables together, up to TABLE_BYTES; at least one, be it empty."""
    held: list[pa.Table] = []
    bytes_ = 0
    for table in tables:
        if held and bytes_ + table.nbytes > TABLE_BYTES:
            yield pa.concat_tables(held)
            held, bytes_ = [], 0
        held.append(table)
        bytes_ += table.nbytes
    yield pa.concat_tables(held) if held else NARROW.empty_table()
