"""After any crash the files of rows and their checkpoint agree again: whole rows kept, halves gone, nothing twice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_ray.data.episodes import EpisodeFolder
from spa_ray.data.schemas import WRITE_OPTIONS
from spa_ray.errors import InputError
from spa_ray.generation.commits import settle
from tests.preferences_tables import make_config, make_episodes, make_row


def write(file: Path, ids: Sequence[str]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"prompt_id": pa.array(ids, pa.string())}), file)
    return file


def cut(file: Path) -> Path:
    file.write_bytes(file.read_bytes()[:-9])
    return file


class Part:
    """A part's two folders, with files as Ray names them."""

    def __init__(self, folder: Path) -> None:
        self.rows, self.checkpoint = folder / "rows", folder / "checkpoint"
        self.rows.mkdir(parents=True)
        self.checkpoint.mkdir()

    def write_rows(self, name: str, *ids: str) -> Path:
        return write(self.rows / f"{name}-0.parquet", ids)

    def write_note(self, name: str, *ids: str) -> Path:
        return write(self.checkpoint / f"{name}.parquet", ids)

    def write_pending(self, name: str, *ids: str) -> Path:
        return write(self.checkpoint / f"{name}.pending.parquet", ids)

    def commit(self, name: str, *ids: str) -> None:
        self.write_rows(name, *ids)
        self.write_note(name, *ids)

    def settle(self) -> dict[str, list[str]]:
        settle(self.rows, self.checkpoint)
        rows = {f.stem.removesuffix("-0"): pq.read_table(f)["prompt_id"].to_pylist() for f in self.rows.iterdir()}
        notes = {f.stem: pq.read_table(f)["prompt_id"].to_pylist() for f in self.checkpoint.iterdir()}
        assert rows == notes
        return rows


@pytest.fixture
def part(tmp_path: Path) -> Part:
    return Part(tmp_path)


def test_what_agrees_is_left_alone(part: Part) -> None:
    assert part.settle() == {}
    part.commit("a", "p1", "p2")
    before = {f: f.stat().st_mtime_ns for f in part.checkpoint.iterdir()}
    assert part.settle() == {"a": ["p1", "p2"]}
    assert {f: f.stat().st_mtime_ns for f in part.checkpoint.iterdir()} == before


def test_half_written_rows_are_asked_again_and_whole_ones_are_kept_though_not_committed(part: Part) -> None:
    cut(part.write_rows("half", "p1"))
    part.write_pending("half", "p1")
    part.write_rows("whole", "p2")
    part.write_pending("whole", "p2")
    cut(part.write_pending("nothing", "p3"))
    assert part.settle() == {"whole": ["p2"]}


def test_a_checkpoint_without_its_rows_does_not_hide_prompts_that_were_never_answered(part: Part) -> None:
    part.write_note("gone", "p1")
    part.commit("a", "p2")
    assert part.settle() == {"a": ["p2"]}


def test_a_checkpoint_that_cannot_be_read_is_written_anew(part: Part) -> None:
    part.write_rows("a", "p1")
    cut(part.write_note("a", "p1"))
    assert part.settle() == {"a": ["p1"]}


def test_a_task_that_died_after_its_commit_and_was_begun_again_loses_nothing(part: Part) -> None:
    part.commit("a", "p1")
    part.write_pending("a", "p1")  # with it, Ray would delete the rows and keep the checkpoint
    assert part.settle() == {"a": ["p1"]}


def test_rows_that_a_killed_drivers_engines_write_late_do_not_count_twice(part: Part) -> None:
    part.commit("old", "p1", "p2")
    part.write_rows("anew", "p2", "p3")
    assert part.settle() == {"old": ["p1", "p2"]}


def test_committed_rows_that_cannot_be_read_are_named_and_not_touched(part: Part) -> None:
    part.commit("a", "p1")
    bad = part.write_rows("b", "p2")
    part.write_note("b", "p2")
    cut(bad)
    with pytest.raises(InputError, match=f"{bad}: cannot be read.*delete it.*asked anew") as caught:
        settle(part.rows, part.checkpoint)
    assert "\n" not in str(caught.value)
    assert bad.exists()
    bad.unlink()
    assert part.settle() == {"a": ["p1"]}


def test_rows_that_are_out_of_reach_are_not_taken_for_damaged_ones(part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    late = part.write_rows("late", "p1")
    part.write_pending("late", "p1")

    def away(*_: object, **__: object) -> None:
        raise OSError("AWS Error NETWORK_CONNECTION")

    monkeypatch.setattr("spa_ray.generation.commits.pq.read_table", away)
    with pytest.raises(OSError, match="NETWORK"):
        settle(part.rows, part.checkpoint)
    assert late.exists()


def test_a_reader_names_the_damaged_file(part: Part) -> None:
    part.commit("a", "p1")
    bad = cut(part.write_rows("b", "p2"))
    with pytest.raises(InputError, match=str(bad)):
        EpisodeFolder(part.rows).count()
    bad.write_bytes(b"PAR1" + b"\0" * 100 + b"PAR1")
    with pytest.raises(InputError, match=str(bad)):
        EpisodeFolder(part.rows).count()


def test_a_bit_that_changed_among_the_rows_is_noticed_or_changes_nothing(tmp_path: Path) -> None:
    rows = [make_row([(k % 7, 2.5), (k % 5, 4.0)], (9.0, k / 8), prompt_id=f"p{k}") for k in range(40)]
    file = tmp_path / "a-0.parquet"
    pq.write_table(make_episodes(rows, make_config()), file, **WRITE_OPTIONS)
    whole, table = file.read_bytes(), EpisodeFolder(tmp_path).table()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")  # it has no checksum
    noticed = 0
    for at in np.random.default_rng(1).integers(0, footer, size=300):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        try:
            found = EpisodeFolder(tmp_path).table()
        except InputError:
            noticed += 1
        else:
            assert found.equals(table), f"byte {at} of {footer}"
    assert noticed > 150


STATES = ("committed", "rows", "half rows", "note", "cut note", "pending")


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.sets(st.sampled_from("abcdefgh"), min_size=1), st.sets(st.sampled_from(STATES))), max_size=5)
)
def test_whatever_is_found_no_prompt_is_twice_and_what_was_committed_alone_stays(
    tmp_path_factory: pytest.TempPathFactory, files: list[tuple[set[str], set[str]]]
) -> None:
    part = Part(tmp_path_factory.mktemp("settle"))
    safe: list[set[str]] = []
    for number, (ids, states) in enumerate(files):
        name = f"t{number:03d}"
        if "committed" in states:
            part.commit(name, *sorted(ids))
            safe.append(ids)
        elif "half rows" in states:
            cut(part.write_rows(name, *sorted(ids)))
        elif "rows" in states:
            part.write_rows(name, *sorted(ids))
        elif "note" in states:
            part.write_note(name, *sorted(ids))
        if "cut note" in states and "committed" in states:
            cut(part.write_note(name, *sorted(ids)))
        if "pending" in states:
            part.write_pending(name, *sorted(ids))
    kept = [name for ids in part.settle().values() for name in ids]
    assert len(kept) == len(set(kept))
    apart = [ids for k, ids in enumerate(safe) if all(ids.isdisjoint(o) for j, o in enumerate(safe) if j != k)]
    assert {name for ids in apart for name in ids} <= set(kept)
