"""Paths on a disk, in memory and behind a real S3 protocol behave alike: no other room knows more of filesystems."""

from __future__ import annotations

import pickle
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spa_ray.errors import InputError
from spa_ray.storage import files
from spa_ray.storage.files import AnyPath, arrow_filesystem, as_path, children, create_text, delete_tree, files_under
from spa_ray.storage.folder import EVALUATION, RunFolder, StageFolder, check_claim, claim
from spa_ray.storage.hashing import folder_hash, parquet_hash
from spa_ray.storage.node_cache import CACHE, local_folder
from spa_ray.storage.token import Token
from tests.s3_server import BUCKET, s3_server


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    with s3_server() as environment:
        yield environment


@pytest.fixture(params=["local", "memory", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AnyPath:
    """A folder that is not there yet."""
    if request.param == "local":
        return tmp_path / "run"
    if request.param == "memory":
        return as_path(f"memory://{uuid.uuid4().hex}/run")
    for key, value in request.getfixturevalue("s3").items():
        monkeypatch.setenv(key, value)
    return as_path(f"s3://{BUCKET}/{uuid.uuid4().hex}/run")


def put_rows(folder: AnyPath, name: str, *values: int) -> None:
    filesystem, root = arrow_filesystem(folder)
    filesystem.create_dir(root)  # on S3 this leaves a marker object, which nobody may take for a file
    pq.write_table(pa.table({"k": values}), f"{root}/{name}", filesystem=filesystem)


def test_text_of_a_path_gives_the_path_again(folder: AnyPath) -> None:
    assert as_path(str(folder / "a" / "b")) == folder / "a" / "b"
    assert pickle.loads(pickle.dumps(folder)) == folder


def test_a_small_file_is_written_read_replaced_and_deleted(folder: AnyPath) -> None:
    file = folder / "deep" / "facts.json"
    files.write_json(file, {"λ": 1})
    files.write_json(file, {"λ": 2})
    assert files.read_json(file) == {"λ": 2}
    assert files_under(folder) == ["deep/facts.json"]
    files.delete_file(file)
    files.delete_file(file)
    assert not file.exists()
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(file, float("nan"))
    assert not file.exists()


def test_of_many_who_create_a_file_one_gets_through(folder: AnyPath) -> None:
    start, won = threading.Barrier(6), []

    def attempt(name: str) -> None:
        start.wait()
        try:
            create_text(folder / "lock" / "1", name, settle=0.3)
            won.append(name)
        except FileExistsError:
            pass

    threads = [threading.Thread(target=attempt, args=(str(i),)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [(folder / "lock" / "1").read_text()] == won
    with pytest.raises(FileExistsError):
        create_text(folder / "lock" / "1", "late", settle=0)
    assert (folder / "lock" / "1").read_text() == won[0]


def test_children_are_what_lies_in_a_folder_and_no_markers(folder: AnyPath) -> None:
    assert children(folder) == []
    put_rows(folder / "part=0", "a.parquet", 1)
    put_rows(folder, "b.parquet", 2)
    assert [child.name for child in children(folder)] == ["b.parquet", "part=0"]
    assert children(folder / "b.parquet" / "nothing") == []
    assert files_under(folder) == ["b.parquet", "part=0/a.parquet"]
    delete_tree(folder)
    delete_tree(folder)
    assert children(folder) == []
    assert not folder.exists()


def test_a_parquet_data_set_is_read_with_its_subfolders_and_without_hidden_files(folder: AnyPath) -> None:
    schema = pa.schema({"k": pa.int64()})
    assert files.parquet_dataset(folder, schema).count_rows() == 0
    with pytest.raises(FileNotFoundError, match=r"no \*\.parquet"):
        files.parquet_dataset(folder)
    put_rows(folder, "b.parquet", 1, 2)
    put_rows(folder / "part=1", "a.parquet", 3)
    put_rows(folder, ".half.parquet", 4)
    put_rows(folder / "_tmp", "c.parquet", 5)
    assert sorted(files.parquet_dataset(folder).to_table()["k"].to_pylist()) == [1, 2, 3]
    assert files.parquet_dataset(folder / "b.parquet").count_rows() == 2


def test_hashes_of_rows_are_the_same_wherever_they_lie(folder: AnyPath, tmp_path: Path) -> None:
    for place in (folder, tmp_path / "other"):
        put_rows(place, "b.parquet", 1, 2)
        put_rows(place / "part=1", "a.parquet", 3)
    assert parquet_hash(folder) == parquet_hash(tmp_path / "other")
    assert folder_hash(folder) == folder_hash(tmp_path / "other")
    put_rows(folder / "part=1", "a.parquet", 4)
    assert parquet_hash(folder) != parquet_hash(tmp_path / "other")


def test_files_are_copied_between_any_two_places(folder: AnyPath, tmp_path: Path) -> None:
    here = tmp_path / "here"
    (here / "sub").mkdir(parents=True)
    (here / "sub" / "x.bin").write_bytes(bytes(range(256)) * 100)
    files.copy_files(here, folder, ["sub/x.bin"])
    files.copy_files(folder, folder.with_name("second"), ["sub/x.bin"])
    files.copy_files(folder.with_name("second"), tmp_path / "back", ["sub/x.bin"])
    assert (tmp_path / "back" / "sub" / "x.bin").read_bytes() == (here / "sub" / "x.bin").read_bytes()
    assert files_under(tmp_path / "back") == ["sub/x.bin"]


def test_a_stage_counts_once_its_marker_stands(folder: AnyPath) -> None:
    run = RunFolder(folder)
    stage = run.stage("build", "abc")
    assert not stage.done
    with pytest.raises(InputError, match="unfinished"):
        stage.facts()
    stage.finish(0.0, rows=3)
    assert StageFolder("build", "abc", stage.folder).facts()["rows"] == 3


def test_clean_deletes_the_stages_that_no_arm_names(folder: AnyPath) -> None:
    run = RunFolder(folder)
    for name in ("build-1", "build-2", "evaluate-3"):
        files.write_text(folder / "stages" / name / "rows", "x")
    files.write_json(run.arm_file("main", 1), {"stages": {"build": "build-1"}})
    assert [path.name for path in run.clean()] == ["build-2", "evaluate-3"]
    assert [path.name for path in run.stages()] == ["build-1"]
    assert run.arm_files() == [run.arm_file("main", 1)]


def test_clean_spares_what_a_call_that_did_not_end_had_not_come_to(folder: AnyPath) -> None:
    run = RunFolder(folder)
    for name in ("build-1", "train-2", "evaluate-3", "pass-4"):
        files.write_text(folder / "stages" / name / "rows", "x")
    run.stage("build", "1").finish(0.0)
    run.stage("train", "2").finish(0.0)
    files.write_json(run.arm_file("main", 1), {"stages": {"build": "build-1", "train": "train-2"}})
    files.write_json(folder / EVALUATION, {"stages": {"evalprompts": "evalprompts-0", "main": "evaluate-3"}})
    run.keep_used()
    files.write_json(run.arm_file("main", 1), {"stages": {"build": "build-1"}})
    assert run.clean() == []  # the evaluation is unfinished, so its rows are spared too
    run.stage("evaluate", "3").finish(0.0)
    assert [path.name for path in run.clean()] == ["pass-4"]
    run.release()
    run.release()
    assert [path.name for path in run.clean()] == ["train-2"]


def test_a_folder_is_claimed_for_one_stage(folder: AnyPath) -> None:
    assert check_claim(folder, "build", "abc")[1]
    assert children(folder) == []
    assert not claim(folder, "build", "abc").done
    claim(folder, "build", "abc")
    with pytest.raises(InputError, match="other settings"):
        claim(folder, "build", "def")
    files.write_text(folder.with_name("mine") / "thesis.txt", "x")
    with pytest.raises(InputError, match="stands already"):
        claim(folder.with_name("mine"), "build", "abc")


def test_a_token_says_who_sees_a_folder(folder: AnyPath) -> None:
    token = Token.leave(folder)
    pickle.loads(pickle.dumps(token)).check()
    token.remove()
    with pytest.raises(InputError, match="does not see this folder"):
        token.check()
    assert children(folder) == []


def test_a_stored_model_is_fetched_once_a_node_and_anew_when_it_changed(
    folder: AnyPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    model = folder / "model"
    files.write_text(model / "config.json", "{}")
    files.write_text(model / "adapter" / "weights", "1")
    first = local_folder(model)
    assert first.name == "model"
    assert files_under(first) == ["adapter/weights", "config.json"]
    stamp = first.stat().st_mtime_ns
    assert local_folder(model) == first
    assert first.stat().st_mtime_ns == stamp
    files.write_text(model / "adapter" / "weights", "22")
    assert (local_folder(model) / "adapter" / "weights").read_text() == "22"


def test_a_model_that_this_node_does_not_see_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder on node"):
        local_folder(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("s3://key:secret@bucket/run", "do not belong in a path"),
        ("s3://bucket/run?endpoint_override=x", "do not belong in a path"),
        ("nosuch://bucket/run", "no filesystem is known"),
    ],
)
def test_a_uri_that_cannot_be_used_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as e:
        as_path(text)
    assert "secret" not in str(e.value)


def test_local_text_and_file_uris_are_absolute_local_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert as_path("runs/x") == tmp_path / "runs" / "x"
    assert as_path("file:///a/b") == Path("/a/b")
    assert files.is_local(as_path("runs/x"))


def test_a_store_that_is_away_is_an_error_and_never_an_empty_folder(
    s3: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in {**s3, "AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}.items():
        monkeypatch.setenv(key, value)
    run = as_path(f"s3://{BUCKET}/run")
    for look in (files.is_file, files.kind, children, files_under):
        with pytest.raises(Exception, match="Could not connect") as e:
            look(run)
        assert files.client_error(e.value) == f"EndpointConnectionError: {e.value}"
    with pytest.raises(InputError, match="cannot be written"):
        files.check_writable(run)


def test_keys_never_travel_with_a_path(s3: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {**s3, "AWS_SECRET_ACCESS_KEY": "hunter2"}.items():
        monkeypatch.setenv(key, value)
    path = as_path(f"s3://{BUCKET}/secret-run")
    assert b"hunter2" not in pickle.dumps([path, arrow_filesystem(path)])
    assert s3["AWS_ENDPOINT_URL"].encode() in pickle.dumps(path)


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    files.write_bytes(tmp_path / "a", b"before")
    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="No space"):
        files.write_bytes(tmp_path / "a", b"after")
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"before"
