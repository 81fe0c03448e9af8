"""Prompts in shards: every prompt in one of them, in order, none larger than asked; written once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_ray.data.schemas import PROMPTS
from spa_ray.generation import shards as module
from spa_ray.generation.shards import shards


def write(path: Path, names: Sequence[str]) -> None:
    rows = [{"prompt_id": n, "messages": [{"role": "user", "content": f"{n}?"}], "meta": "{}"} for n in names]
    pq.write_table(pa.Table.from_pylist(rows, schema=PROMPTS), path, row_group_size=3)


def ids(files: Sequence[Path]) -> list[list[str]]:
    return [pq.read_table(file)["prompt_id"].to_pylist() for file in files]


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any),
    rows=st.integers(1, 12),
    group=st.integers(1, 5),
)
def test_every_prompt_is_in_one_shard_in_its_order_and_no_shard_is_too_large(
    sizes: list[int], rows: int, group: int
) -> None:
    with TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "GROUP_ROWS", group)
        folder = Path(name)
        (folder / "prompts").mkdir()
        names = [f"p{k:02d}" for k in range(sum(sizes))]
        left = iter(names)
        for number, size in enumerate(sizes):
            write(folder / "prompts" / f"{number}.parquet", [next(left) for _ in range(size)])
        found = shards(folder / "prompts", folder / "copies", rows)
        if len(names) <= rows:
            assert found == [folder / "prompts"]
            assert not (folder / "copies").exists()
            return
        assert [name for shard in ids(found) for name in shard] == names
        assert {len(shard) for shard in ids(found)[:-1]} == {rows}
        assert 0 < len(ids(found)[-1]) <= rows
        assert pq.read_schema(found[0]).equals(PROMPTS)


def test_what_a_stopped_run_had_written_stays_and_the_rest_is_written_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "prompts.parquet", [f"p{k}" for k in range(10)])
    first = shards(tmp_path / "prompts.parquet", tmp_path / "copies", 4)
    whole, times = ids(first), [file.stat().st_mtime_ns for file in first]
    first[1].unlink()
    again = shards(tmp_path / "prompts.parquet", tmp_path / "copies", 4)
    assert ids(again) == whole
    assert [file.stat().st_mtime_ns for file in again][::2] == times[::2]
