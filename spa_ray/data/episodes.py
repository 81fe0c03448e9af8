"""Reading a folder of episodes: its parts, and of every prompt the row of its highest part.

Comes in: the folder that a generation stage wrote (`part=K/*.parquet`, K counting the tries, with `shard=S/` in between
where the prompts were too many for one pass), or any folder of files with the schema EPISODES. Goes out: Arrow batches,
each prompt once. Never: the whole table, unless it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pds
import pyarrow.parquet as pq
from pyarrow.fs import FileSystem

from spa_ray.errors import InputError
from spa_ray.storage.files import AnyPath, arrow_filesystem, parquet_sizes

PART = "part"
PARTITIONING = pds.partitioning(pa.schema([(PART, pa.int32())]), flavor="hive")
# Files are read with a look at the checksum of every page that `WRITE_OPTIONS` asks for.
READ_OPTIONS = {"page_checksum_verification": True}
FORMAT = pds.ParquetFileFormat(default_fragment_scan_options=pds.ParquetFragmentScanOptions(**READ_OPTIONS))


def part_folder(episodes: AnyPath, part: int) -> AnyPath:
    """Where the rows of try number `part` (0 the first) lie."""
    return episodes / f"{PART}={part}"


def shard_folder(part: AnyPath, shard: int, of: int) -> AnyPath:
    """Where the rows of a part's shard lie, one of `of`; a single one has no folder of its own."""
    return part if of == 1 else part / f"shard={shard}"


UNSOUND = (OSError, ValueError, pa.ArrowException)  # what Arrow raises at bytes that are no sound Parquet, among others


def damaged(file: str, filesystem: FileSystem) -> bool:
    """Whether the file's bytes can be had and are no sound Parquet. Raises: OSError when they cannot be had."""
    with filesystem.open_input_file(file) as source:
        whole = source.read_buffer()
    try:
        pq.ParquetFile(pa.BufferReader(whole), **READ_OPTIONS).read()
    except UNSOUND:
        return True
    return False


def unreadable(file: str) -> InputError:
    """What to say of a file of episodes that is damaged."""
    return InputError(
        f"{file}: cannot be read as Parquet; restore it, or delete it and the stage.json of its stage (if there is "
        "one) and run the same command again: its prompts are asked anew, the others are not"
    )


@dataclass(frozen=True)
class Retried:
    """The prompts that were asked again (`ids`, each once) and the highest part that answers each."""

    ids: pa.Array
    parts: pa.Array

    def current(self, ids: pa.ChunkedArray | pa.Array, parts: pa.ChunkedArray | pa.Array | None) -> pa.Array:
        """(rows,) bool: whether no later part answers that row's prompt. `parts` None or null is part 0."""
        last = pc.fill_null(self.parts.take(pc.index_in(ids, value_set=self.ids)), 0)
        here = pa.scalar(0, pa.int32()) if parts is None else pc.fill_null(pc.cast(parts, pa.int32()), 0)
        return pc.equal(last, here)


class EpisodeFolder:
    """The episodes of a folder (or of one file).

    Raises: FileNotFoundError when there are none; InputError, here and in every method, naming a file that is damaged.
    """

    def __init__(self, episodes: AnyPath) -> None:
        self.sizes = parquet_sizes(episodes)  # bytes of each file
        self.files = list(self.sizes)
        if not self.files:
            raise FileNotFoundError(f"{episodes}: no *.parquet in it")
        self.filesystem, root = arrow_filesystem(episodes)
        base = root.rpartition("/")[0] if self.files == [root] else root  # `key=value` above it is no column
        with self._named():
            self.data: pds.Dataset = pds.dataset(
                self.files,
                format=FORMAT,
                filesystem=self.filesystem,
                partitioning=PARTITIONING,
                partition_base_dir=base,
            )
        self._retried: Retried | None = None

    @property
    def schema(self) -> pa.Schema:
        """Of the rows, metadata included, without the part."""
        names = [name for name in self.data.schema.names if name != PART]
        fields = [self.data.schema.field(name) for name in names]
        return pa.schema(fields, metadata=self.data.schema.metadata)

    @property
    def retried(self) -> Retried:
        """Read once; holds the ids of later parts alone."""
        if self._retried is None:
            self._retried = self._find_retried()
        return self._retried

    def batches(self, columns: Sequence[str], where: pds.Expression | None = None) -> Iterator[pa.RecordBatch]:
        """The columns of every prompt's current row, in no particular order."""
        hidden = [name for name in ("prompt_id", PART) if name not in columns]
        with self._named():
            for batch in self.data.to_batches(columns=[*columns, *hidden], filter=where):
                if len(self.retried.ids):
                    batch = batch.filter(self.retried.current(batch["prompt_id"], batch[PART]))
                yield batch.select(list(columns))

    def table(self, columns: Sequence[str] | None = None, where: pds.Expression | None = None) -> pa.Table:
        """All of it at once: for small ones, and for narrow columns."""
        columns = list(columns or self.schema.names)
        fields = [self.schema.field(name) for name in columns]
        return pa.Table.from_batches(self.batches(columns, where), pa.schema(fields, self.schema.metadata))

    def count(self) -> int:
        """Prompts."""
        if not len(self.retried.ids):
            with self._named():
                return self.data.count_rows()
        return sum(batch.num_rows for batch in self.batches(["prompt_id"]))

    def _find_retried(self) -> Retried:
        with self._named():
            later = self.data.to_table(columns=["prompt_id", PART], filter=pds.field(PART) > 0)
        last = later.group_by("prompt_id").aggregate([(PART, "max")])
        return Retried(last["prompt_id"].combine_chunks(), last[f"{PART}_max"].combine_chunks())

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Arrow says what it cannot read, not always where: look for the file."""
        try:
            yield
        except UNSOUND as e:
            for file in self.files:
                if damaged(file, self.filesystem):
                    raise unreadable(file) from e
            raise
