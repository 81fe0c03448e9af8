"""A pass whose driver is killed: the next one keeps every committed row, asks none of them again, and ends the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as pds
import pyarrow.parquet as pq
import pytest

from spa_ray.config.models import Config
from spa_ray.data.schemas import EPISODES, PROMPTS, canonical
from spa_ray.generation.setup import Task
from spa_ray.generation.stage import generate
from tests.scripted import WEIGHTS, prompt, scripted_config

pytestmark = [pytest.mark.engine, pytest.mark.long, pytest.mark.timeout(300)]

ROWS = 24
REQUESTS = 5 + 10 + 1 + 2  # samples, their scores, the refinement and its scores
DRIVER = """
import sys
from pathlib import Path
from spa_ray.pipeline.cluster import connected
from tests.test_generation_resume import run, slow
folder = Path(sys.argv[1])
with connected(verbose=False):
    run(slow(), folder / "prompts.parquet", folder)
"""


def slow() -> Config:
    return scripted_config(
        {"jitter": 0.25},
        generation={"rows_per_block": 2},
        resources={"concurrency": 2, "engines": {"min": 1, "max": 1}},
    )


def run(config: Config, prompts: Path, folder: Path) -> pa.Table:
    """A pass into `folder`; its episodes, sorted."""
    out = folder / "episodes"
    where = {"out": out, "checkpoint": folder / "checkpoint", "model": WEIGHTS, "config_hash": "hash"}
    generate(config, Task(), prompts=prompts, **where)
    return canonical(pds.dataset(out, format="parquet", schema=EPISODES).to_table())


def committed(folder: Path) -> set[str]:
    files = [f for f in (folder / "checkpoint" / "part=0").glob("*.parquet") if ".pending" not in f.name]
    return {row for f in files for row in pq.read_table(f)["prompt_id"].to_pylist()}


def kill_after(rows: int, folder: Path) -> None:
    """Start the pass in a process group of its own and kill the whole group once so many rows are committed."""
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(folder)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        start_new_session=True,
    )
    deadline = time.monotonic() + 150
    try:
        while len(committed(folder)) < rows:
            assert process.poll() is None, "the pass ended before it could be killed"
            assert time.monotonic() < deadline, "the pass committed nothing"
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.usefixtures("ray_session")
def test_a_killed_pass_goes_on_where_it_stopped(tmp_path: Path):
    prompts = tmp_path / "prompts.parquet"
    rows = [prompt(f"Question {i}?", f"p{i:03}") for i in range(ROWS)]
    pq.write_table(pa.Table.from_pylist(rows, schema=PROMPTS), prompts)
    kill_after(6, tmp_path)
    kept = committed(tmp_path)
    assert 6 <= len(kept) < ROWS

    log = tmp_path / "asked"
    resumed = run(scripted_config({"log": str(log)}, generation={"rows_per_block": 5}), prompts, tmp_path)
    assert resumed["prompt_id"].to_pylist() == [f"p{i:03}" for i in range(ROWS)]
    asked = Counter(log.read_text().splitlines())
    missing = ROWS - len(kept)
    assert max(asked.values()) == 1
    assert missing * REQUESTS <= len(asked) <= missing * (REQUESTS + 5)  # a repeated candidate is drawn once more

    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    assert resumed.equals(run(scripted_config(), prompts, undisturbed))
    assert run(scripted_config({"log": str(tmp_path / "third")}), prompts, tmp_path).equals(resumed)
    assert not (tmp_path / "third").exists()  # a finished pass asks nothing
