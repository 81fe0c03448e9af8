"""Training for a run on an object store: what the mirror keeps there is enough to go on from on another node."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spa_ray.config.training import method_class, train_section
from spa_ray.storage.files import AnyPath, as_path, children, copy_files, files_under, read_json, write_text
from spa_ray.storage.node_cache import CACHE
from spa_ray.training.hashes import hash_files, record_of, write_record
from spa_ray.training.job import TrainJob, TrainResult, write_job
from spa_ray.training.stored import LOG, Mirror, StoredJob, newest, pull, push, train_job
from tests.s3_server import BUCKET, s3_server
from tests.training_support import make_job, pair_rows, write_pairs

STEPS = 40
PATIENCE = 300.0  # seconds for one command


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    with s3_server() as environment:
        yield environment


@pytest.fixture
def store(s3: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AnyPath:
    for key, value in {**s3, CACHE: str(tmp_path / "node-a")}.items():
        monkeypatch.setenv(key, value)
    return as_path(f"s3://{BUCKET}/{tmp_path.name}")


@pytest.fixture
def stored(store: AnyPath) -> StoredJob:
    write_text(store / "pairs" / "0.parquet", "pairs")
    write_text(store / "base" / "config.json", "{}")
    places: dict[str, Any] = {"pairs": "pairs", "model": "base", "out": "model", "work": "work", "cache": "cache"}
    paths = {name: store / place for name, place in places.items()}
    return StoredJob(name="job", train=train_section({"keep_checkpoints": 2}), seed=0, **paths)


def save(job: TrainJob, step: int, *, complete: bool = True) -> None:
    """What the step loop leaves after a checkpoint."""
    folder = job.work / "checkpoints" / f"step_{step:08d}"
    write_text(folder / "state" / "shard0.pt", f"weights {step}")
    if complete:
        write_record(folder, hash_files(folder))
        write_text(folder / "meta.json", "{}")
    write_text(job.work / LOG, "row\n" * step)


def other_node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path / "node-b"))


def test_a_job_travels_as_text_and_is_placed_on_a_node(stored: StoredJob) -> None:
    assert StoredJob.from_dict(stored.to_dict()) == stored
    assert type(StoredJob.from_dict(stored.to_dict()).train) is method_class("spa").Config
    job = stored.placed()
    assert (job.model / "config.json").is_file()
    assert job.out.name == "model"
    assert stored.placed() == job


def test_only_a_job_with_a_path_on_a_store_is_mirrored(stored: StoredJob, tmp_path: Path) -> None:
    local = make_job(tmp_path, tmp_path, tmp_path)
    fields = {name: getattr(local, name) for name in ("name", "pairs", "model", "out", "work", "train", "seed")}
    assert train_job(**fields) == local
    assert isinstance(train_job(**{**fields, "out": stored.out}), StoredJob)


def test_another_node_goes_on_from_the_newest_complete_checkpoint(
    stored: StoredJob, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job = stored.placed()
    pull(stored, job)
    assert files_under(job.pairs) == ["0.parquet"]
    mirror = Mirror(stored, job, every=0.05)
    write_text(job.shared / "reference_1.npz", "reference")
    for step in (5, 10, 15):
        save(job, step)
        time.sleep(0.5)
    save(job, 20, complete=False)
    mirror.close()
    assert mirror.failure is None
    assert [path.name for path in children(stored.work / "checkpoints")] == ["step_00000010", "step_00000015"]

    other_node(monkeypatch, tmp_path)
    there = stored.placed()
    assert there.work != job.work
    pull(stored, there)
    found = newest(there.work / "checkpoints")
    assert found is not None
    assert found.name == "step_00000015"
    assert (found / "state" / "shard0.pt").read_text() == "weights 15"
    assert record_of(found).is_file()
    assert len((there.work / LOG).read_text().splitlines()) >= 15
    assert (there.shared / "reference_1.npz").read_text() == "reference"


def test_a_checkpoint_that_was_cut_off_on_its_way_is_not_taken(
    stored: StoredJob, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job = stored.placed()
    save(job, 5)
    Mirror(stored, job, every=60).close()
    checkpoints = stored.work / "checkpoints"
    copy_files(checkpoints / "step_00000005", checkpoints / "step_00000009", ["state/shard0.pt"])
    other_node(monkeypatch, tmp_path)
    pull(stored, stored.placed())
    assert [p.name for p in children(stored.placed().work / "checkpoints")] == ["step_00000005"]


def test_a_node_that_is_further_than_the_store_keeps_its_own(stored: StoredJob) -> None:
    job = stored.placed()
    save(job, 5)
    Mirror(stored, job, every=60).close()
    save(job, 10)
    pull(stored, job)
    assert [p.name for p in children(job.work / "checkpoints")] == ["step_00000005", "step_00000010"]
    assert (job.work / LOG).read_text() == "row\n" * 10


def test_the_model_and_the_job_s_files_are_put_where_they_belong_and_nothing_stays_here(stored: StoredJob) -> None:
    job = stored.placed()
    pull(stored, job)
    save(job, 5)
    for name in ("model.safetensors", "adapter/adapter.safetensors"):
        write_text(job.out / name, name)
    write_text(job.work / "train_result.json", "{}")
    write_text(job.work / "tokens_1.arrow", "many")
    result = TrainResult("job", stored.out, 5, 1, {}, {}, 1.0)
    push(stored, job, result)
    assert files_under(stored.out) == ["adapter/adapter.safetensors", "model.safetensors"]
    assert files_under(stored.work) == ["stored.json", "train_log.jsonl", "train_result.json"]
    assert TrainResult.from_dict(read_json(stored.work / "stored.json")) == result
    assert not stored.scratch.exists()


def test_a_store_that_is_away_does_not_stop_the_job_and_is_told(stored: StoredJob, tmp_path: Path) -> None:
    job = stored.placed()
    away = replace(stored, work=as_path("s3://no-such-bucket/work"))
    mirror = Mirror(away, job, every=0.05)
    save(job, 5)
    mirror.close()
    assert mirror.failure is not None
    assert "not everything was mirrored to s3://no-such-bucket/work" in mirror.failure


DRIVER = """
import json, os, signal, sys, time
import ray
from spa_ray.config.models import Resources
from spa_ray.training.launch import train_jobs
from spa_ray.training.stored import Mirror, StoredJob, newest

def look_often():  # an idle machine is through with all steps before the second look otherwise
    from spa_ray.training.step import StepLoop
    step = StepLoop.train_step

    def slow(self, number):
        time.sleep(0.2)
        return step(self, number)

    StepLoop.train_step, Mirror.__init__.__kwdefaults__["every"] = slow, 0.2

job = StoredJob.from_dict(json.loads(sys.argv[1]))
hook = {"worker_process_setup_hook": look_often}
ray.init(num_cpus=4, include_dashboard=False, address="local", logging_level="ERROR", runtime_env=hook)

def see(row):
    if sys.argv[2] == "die" and newest(job.work / "checkpoints") is not None:
        os.kill(os.getpid(), signal.SIGKILL)

(result,) = train_jobs([job], Resources(train_workers=2), storage=job.work / "ray", name="s", on_progress=see)
print(json.dumps(result.to_dict()))
"""


def drive(stored: StoredJob, s3: dict[str, str], node: Path, then: str) -> subprocess.CompletedProcess[str]:
    """Train as a driver of its own, on a node whose disk is `node`."""
    path = os.pathsep.join(p for p in sys.path if p)
    environment = {**os.environ, **s3, CACHE: str(node), "PYTHONPATH": path}
    command = [sys.executable, "-c", DRIVER, json.dumps(stored.to_dict()), then]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)


@pytest.mark.engine
@pytest.mark.long
def test_a_run_whose_machine_is_lost_goes_on_from_the_store_and_ends_with_the_same_weights(
    s3: dict[str, str], store: AnyPath, tiny_model: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    pairs = write_pairs(tmp_path / "pairs" / "pairs.parquet", pair_rows(160)).parent
    settings: dict[str, Any] = {"batch_size": 24, "max_steps": STEPS, "save_every_steps": 4}
    calm = make_job(tmp_path, tiny_model, pairs, **settings)
    calm.work.mkdir(parents=True)
    write_job(calm)
    alone = [sys.executable, "-m", "spa_ray.training.loop", "--job", str(calm.work / "job.json")]
    subprocess.run(alone, capture_output=True, timeout=PATIENCE, check=True)

    copy_files(pairs, store / "pairs", files_under(pairs))
    paths = {name: store / name for name in ("pairs", "out", "work", "cache")}
    stored = StoredJob(name="job", model=tiny_model, train=calm.train, seed=calm.seed, **paths)
    died = drive(stored, s3, tmp_path / "node-a", "die")
    assert died.returncode == -signal.SIGKILL, died.stderr[-2000:]
    assert newest(stored.work / "checkpoints") is not None
    assert not stored.out.exists()
    shutil.rmtree(tmp_path / "node-a")

    done = drive(stored, s3, tmp_path / "node-b", "live")
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert 0 < result["resumed_at"] < STEPS
    assert result["model"] == str(stored.out)
    assert result["warnings"] == []
    assert not result["skipped"]
    assert files_under(tmp_path / "node-b") == []
    copy_files(stored.out, tmp_path / "fetched", files_under(stored.out))
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "fetched", calm.out))
    assert ours.keys() == theirs.keys()
    assert max(float((ours[key] - theirs[key]).abs().max()) for key in ours) <= 1e-5
