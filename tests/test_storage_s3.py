"""A run on `s3://`, over a real S3 protocol: the bytes of a local run, resumed after a SIGKILL, nothing left here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml

from spa_ray.data.episodes import EpisodeFolder
from spa_ray.data.schemas import canonical
from spa_ray.storage.files import AnyPath, as_path, children, files_under, parquet_dataset, read_json
from spa_ray.storage.folder import open_run
from spa_ray.storage.node_cache import CACHE
from tests.fake_endpoint import FakeEndpoint, running
from tests.s3_server import BUCKET, s3_server

pytestmark = pytest.mark.engine

PROMPTS = 24
PATIENCE = 300.0  # seconds for one command
REQUESTS = 18  # of one prompt: 5 answers, 10 scores, 1 refinement, 2 scores


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    with s3_server() as environment:
        yield environment


@pytest.fixture(autouse=True)
def here(s3: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in s3.items():
        monkeypatch.setenv(key, value)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("home")
    rows = [{"prompt_id": f"p{k:02d}", "prompt": f"question {k}?"} for k in range(PROMPTS)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = {
        "model": {"path": str(tiny_model), "engine": "spa_ray.engine.scripted:ScriptedEngine"},
        "prompts": {"source": str(folder / "prompts.jsonl")},
        "sampling": {"max_tokens": 60},
        "refine": {"max_tokens": 100},
        "denoise": {"consistency": "off", "informativeness": False},
        "generation": {"rows_per_block": 2},
        "resources": {"concurrency": 4},
    }
    (folder / "scripted.yaml").write_text(yaml.safe_dump(raw))
    return folder


def log_of(home: Path, run_dir: str) -> Path:
    """What the engine of that run was asked, a line a request."""
    return home / f"{run_dir.rpartition('/')[2]}.log"


def start(home: Path, s3: dict[str, str], run_dir: str, *more: str, jitter: float) -> subprocess.Popen[str]:
    """`spa run` in a process of its own, in an empty folder, with a node's cache of its own."""
    (home / "cwd").mkdir(exist_ok=True)
    script = json.dumps({"jitter": jitter, "log": str(log_of(home, run_dir))})
    overrides = [f"run_dir={run_dir}", f"model.engine_kwargs={script}", *more]
    command = [sys.executable, "-m", "spa_ray.cli.main", "run", str(home / "scripted.yaml"), *overrides]
    environment = {
        **os.environ,
        **s3,
        CACHE: str(home / "cache"),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    return subprocess.Popen(
        [*command, "--until", "build", "--json"],
        cwd=home / "cwd",
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(driver: subprocess.Popen[str]) -> tuple[dict[str, Any], str]:
    out, err = driver.communicate(timeout=PATIENCE)
    assert driver.returncode == 0, err[-3000:]
    return json.loads(out.splitlines()[-1]), err


def committed(run: AnyPath) -> int:
    """Rows that a killed pass need not ask again."""
    rows = 0
    for checkpoint in run.glob("stages/generate-*/checkpoint"):
        names = [n for n in files_under(checkpoint) if n.startswith("part=0/") and ".pending" not in n]
        rows += sum(parquet_dataset(checkpoint / name).count_rows() for name in names if name.endswith(".parquet"))
    return rows


def bytes_of(result: dict[str, Any], what: str) -> bytes:
    folder = as_path(result["arms"]["main"]["iterations"][0][what])
    table = EpisodeFolder(folder).table() if what == "episodes" else parquet_dataset(folder).to_table()
    sink = pa.BufferOutputStream()
    ordered = canonical(table.replace_schema_metadata(None)).combine_chunks()
    with pa.ipc.new_stream(sink, ordered.schema) as writer:
        writer.write_table(ordered)
    return sink.getvalue().to_pybytes()


@pytest.mark.long
def test_a_killed_run_on_s3_goes_on_and_ends_with_the_bytes_of_a_local_one(home: Path, s3: dict[str, str]) -> None:
    calm, _ = finish(start(home, s3, str(home / "local"), jitter=0.0))

    run = as_path(f"s3://{BUCKET}/killed")
    driver, log = start(home, s3, str(run), jitter=0.4), log_of(home, str(run))
    deadline = time.monotonic() + PATIENCE
    while committed(run) < PROMPTS / 4 and driver.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    assert driver.returncode == -signal.SIGKILL
    time.sleep(2)  # its engines end with it
    kept, asked = committed(run), log.read_text().count("\n")
    assert 0 < kept < PROMPTS
    assert not list(run.glob("stages/generate-*/stage.json"))

    result, err = finish(start(home, s3, str(run), jitter=0.4))
    assert "whose process is gone" in err  # the dead driver's claim was taken over
    assert log.read_text().count("\n") - asked == REQUESTS * (PROMPTS - kept)
    assert result["run_dir"] == str(run)
    for what in ("episodes", "pairs"):
        assert bytes_of(result, what) == bytes_of(calm, what)
    assert result["arms"]["main"]["iterations"][0]["funnel"] == calm["arms"]["main"]["iterations"][0]["funnel"]

    asked = log.read_text().count("\n")
    again, _ = finish(start(home, s3, str(run), jitter=0.4))
    assert again == result
    assert log.read_text().count("\n") == asked
    assert {p.name for p in children(run)} == {p.name for p in children(home / "local")} - {"logs"}
    assert [read_json(path)["released"] for path in children(run / "lock")] == [True]
    assert len(list(open_run(run).stages())) == 3
    assert files_under(home / "cwd") == []
    assert files_under(home / "cache") == []


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.long
def test_an_endpoints_answers_are_kept_on_the_store_and_nothing_that_it_answered_is_asked_again(
    home: Path, s3: dict[str, str], kept: bool
) -> None:
    run = as_path(f"s3://{BUCKET}/judged-{kept}")

    def dies(number: int, body: dict[str, Any]) -> Any:
        return "[[7]]" if number < 50 else (500, {}, "{}")

    with running(FakeEndpoint(dies)) as fake:
        judge = {
            "kind": "endpoint",
            "base_url": fake.url,
            "model": "judge",
            "retries": 0,
            "cache": kept,
            "max_concurrency": 4,
        }
        scoring = f"scoring={json.dumps({'mode': 'regex', 'judge': judge})}"
        driver = start(home, s3, str(run), scoring, jitter=0.0)
        _, err = driver.communicate(timeout=PATIENCE)
        assert driver.returncode == 1, err[-3000:]
        answered, before = [json.dumps(body["messages"]) for body in fake.bodies[:50]], len(fake.bodies)
        fake.act = lambda number, body: "[[7]]"
        result, _ = finish(start(home, s3, str(run), scoring, jitter=0.0))
        again = {json.dumps(body["messages"]) for body in fake.bodies[before:]}
        twice = len(again & set(answered))
        assert twice <= 4 if kept else twice > 4  # those on their way to the store when the stage ended
        assert len(list(run.glob("judge_answers/*/*.json"))) == kept * (50 + len(fake.bodies) - before - twice)
    (stage,) = run.glob("stages/generate-*")
    sent = read_json(stage / "stage.json")["judge"]["requests"]
    assert 0 <= sent - len(fake.bodies) <= 4  # the server may not have read what was on its way when the stage ended
    spent = [read_json(file) for file in children(run / "spent")]
    assert len(spent) == 2
    assert all(call["tokens"] > 0 and call["hours"] > 0 for call in spent)
    assert result["run_dir"] == str(run)


def test_a_bucket_that_is_not_there_is_refused_in_one_line(home: Path, s3: dict[str, str]) -> None:
    driver = start(home, s3, "s3://no-such-bucket/run", jitter=0.0)
    _, err = driver.communicate(timeout=PATIENCE)
    assert driver.returncode == 2
    assert err.splitlines()[-1].startswith("spa: s3://no-such-bucket/run: cannot be written")
