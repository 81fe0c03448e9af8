"""A method, a judge, a source, an engine and a benchmark, each in one file outside the package: a whole run of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.dataset as pds
import pytest

from tests.plug_files import EXAMPLES, plug_config


@pytest.mark.parametrize(
    ("name", "page"),
    [
        ("questions", "PROMPTS"),
        ("plain_words", "JUDGES"),
        ("on_topic", "BENCHMARKS"),
        ("slic", "METHODS"),
        ("dual_head", "METHODS"),
        ("transformers_engine", "ENGINES"),
    ],
)
def test_a_plugs_page_shows_its_file(name: str, page: str) -> None:
    code = (EXAMPLES / f"{name}.py").read_text().split('"""\n', 1)[1].strip()
    assert code in (EXAMPLES.parent / f"{page}.md").read_text()


def spa_run(home: Path, *more: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "spa_ray.cli.main", "run", "c.yaml", "--json", *more]
    return subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, timeout=500, check=False)


def check_run(home: Path, done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """What a finished run of all plugs must hold. Returns: its result."""
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    arm = result["arms"]["main"]
    (iteration,) = arm["iterations"]
    episodes = pds.dataset(iteration["episodes"], format="parquet").to_table().to_pylist()
    assert [row["error"] for row in episodes] == [None] * 4  # by the engine, on the source's questions
    assert {json.loads(row["meta"])["thing"] for row in episodes} == {"lantern", "kettle", "bell", "loom"}
    log = [json.loads(line) for line in next(Path(iteration["model"]).parent.rglob("train_log.jsonl")).open()]
    assert "hinge/active" in log[-1]  # the method's own statistic
    helpful = arm["metrics"]["test"]["means"]["helpful"]["mean"]
    assert helpful == pytest.approx(
        round(helpful * 9) / 9, abs=1e-6
    )  # thirds over three prompts: the judge's own scale
    for name, model in (("vanilla", result["vanilla"]), ("main", arm)):
        assert model["benchmarks"]["topic"]["n"] == 3, name
    written = json.loads((home / "run" / "benchmarks" / "topic.json").read_text())
    assert set(written["arms"]) == {"vanilla", "main"}
    assert set(written["arms"]["main"]["measures"]) == {"on_topic", "length"}
    return result


@pytest.mark.engine
def test_a_run_of_five_plugs_resumes_and_an_edit_starts_again_only_what_reads_it(
    tmp_path: Path, ray_session: None
) -> None:
    plug_config(tmp_path, cpus_per_engine=1)
    first = check_run(tmp_path, spa_run(tmp_path))

    stages = {path.name for path in (tmp_path / "run" / "stages").iterdir()}
    benchmark = tmp_path / "on_topic.py"
    benchmark.write_text(benchmark.read_text().replace("version = 1", "version = 2"))
    again = check_run(tmp_path, spa_run(tmp_path))
    new = {path.name for path in (tmp_path / "run" / "stages").iterdir()} - stages
    assert sorted(name.partition("-")[0] for name in new) == ["benchmark", "benchmark"]  # vanilla's and the arm's
    assert first["arms"]["main"]["iterations"] == again["arms"]["main"]["iterations"]
