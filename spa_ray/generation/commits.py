"""Which rows of a part count: its files of rows and Ray Data's checkpoint of them are made to agree before a pass.

Comes in: the two folders, while nobody writes to them. Goes out: the same, with one checkpoint for each file of rows
and no prompt twice. Ray commits a file by renaming its checkpoint, so a crash can leave either without the other. The
rows are the truth: whole ones are kept, half-written ones deleted, and the checkpoint says what is left. Never: a
committed file of rows that cannot be read is passed over, or deleted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pds
import pyarrow.parquet as pq
from pyarrow.fs import FileSystem

from spa_ray.data.episodes import FORMAT, READ_OPTIONS, UNSOUND, damaged, unreadable
from spa_ray.storage.files import AnyPath, arrow_filesystem, parquet_files, write_bytes

ID = "prompt_id"
PENDING = ".pending"


def settle(rows: AnyPath, checkpoint: AnyPath) -> None:
    """Raises: InputError naming a committed file of rows that cannot be read."""
    found, notes = _Files.of(rows), _Files.of(checkpoint)
    if found.agree(notes):
        return
    kept: set[str] = set()
    seen: set[str] = set()
    for name in sorted(found.names, key=lambda name: (name not in notes.names, name)):  # committed ones first
        ids = found.ids(name)
        if ids is None and name in notes.names:
            raise unreadable(found.names[name])
        if ids is None or not seen.isdisjoint(ids):  # half-written; or late, by engines of a driver that was killed
            found.delete(name)
            continue
        kept.add(name)
        seen.update(ids)
        if notes.ids(name) != ids:
            table = pa.BufferOutputStream()
            pq.write_table(pa.table({ID: pa.array(ids, pa.string())}), table)
            write_bytes(checkpoint / f"{name}.parquet", table.getvalue().to_pybytes())
    for name in notes.names.keys() - kept:
        notes.delete(name)
    for name in notes.pending:
        notes.delete(name)


@dataclass(frozen=True)
class _Files:
    """A folder's files by the name that Ray gave the task that wrote them: `NAME-0.parquet` rows, `NAME.parquet`
    their checkpoint, `NAME.pending.parquet` one that is not committed."""

    filesystem: FileSystem
    names: Mapping[str, str]
    pending: Mapping[str, str]

    @classmethod
    def of(cls, folder: AnyPath) -> _Files:
        names, pending = {}, {}
        for path in parquet_files(folder):
            stem = path.rpartition("/")[2].removesuffix(".parquet")
            if stem.endswith(PENDING):
                pending[stem] = path
            else:
                names[stem.rpartition("-")[0] or stem] = path
        return cls(arrow_filesystem(folder)[0], names, pending)

    def agree(self, notes: _Files) -> bool:
        """Whether nothing needs to be done: found in one scan of each folder, as Arrow columns."""
        if self.names.keys() != notes.names.keys() or notes.pending:
            return False
        if not self.names:
            return True
        try:
            ids, noted = (
                pds.dataset(list(f.names.values()), format=FORMAT, filesystem=f.filesystem).to_table(columns=[ID])
                for f in (self, notes)
            )
        except UNSOUND:
            return False
        return len(ids) == len(noted) == pc.count_distinct(ids[ID]).as_py()

    def ids(self, name: str) -> list[str] | None:
        """The prompts of a file; None where there is none or it is damaged. Raises: OSError when it is out of reach."""
        if name not in self.names:
            return None
        try:
            table = pq.read_table(
                self.names[name], columns=[ID], filesystem=self.filesystem, partitioning=None, **READ_OPTIONS
            )
            return table[ID].to_pylist()
        except UNSOUND:
            if damaged(self.names[name], self.filesystem):
                return None
            raise

    def delete(self, name: str) -> None:
        self.filesystem.delete_file({**self.names, **self.pending}[name])
