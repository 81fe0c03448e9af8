"""Prompts in shards: a pass's row checkpoint loads the ids of its prompts, so a pass holds at most a million.

Comes in: a file or folder of prompts. Goes out: files of consecutive prompts, every prompt in one of them. Never: more
of a file in memory than a few row groups.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as pds
import pyarrow.parquet as pq

from spa_ray.storage.files import AnyPath, copy_file, kind, parquet_dataset

SHARD_ROWS = 1_000_000
GROUP_ROWS = 16_384  # rows of a row group; a reader of prompts holds a few of them


def shards(prompts: AnyPath, copies: AnyPath, rows: int = SHARD_ROWS) -> list[AnyPath]:
    """The prompts as they lie where they are at most `rows`; else files of so many, copied to the folder `copies`.

    The files are written once, each whole or not at all, and found again by a resumed run.
    """
    data = parquet_dataset(prompts)
    total = data.count_rows()
    if total <= rows:
        return [prompts]
    files = [copies / f"{shard:05d}.parquet" for shard in range(-(-total // rows))]
    if not all(kind(file) is not None for file in files):
        _split(data, files, rows)
    return files


def _split(data: pds.Dataset, files: Sequence[AnyPath], rows: int) -> None:
    pieces = _groups(data, rows)
    for file in files:
        with tempfile.TemporaryDirectory() as scratch:
            fresh = Path(scratch) / file.name
            with pq.ParquetWriter(fresh, data.schema) as writer:
                left = rows
                while left and (piece := next(pieces, None)) is not None:
                    writer.write_batch(piece)
                    left -= piece.num_rows
            if kind(file) is None:
                copy_file(fresh, file)


def _groups(data: pds.Dataset, rows: int) -> Iterator[pa.RecordBatch]:
    """The rows in order, in batches of at most GROUP_ROWS that never cross a multiple of `rows`."""
    at = 0
    for batch in data.to_batches(batch_size=GROUP_ROWS, batch_readahead=2, fragment_readahead=1):
        start = 0
        while start < batch.num_rows:
            size = min(batch.num_rows - start, rows - at % rows)
            yield batch.slice(start, size)
            start, at = start + size, at + size
