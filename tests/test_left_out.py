"""Commands say how many prompts they leave out, why, and where the rows are listed: one line for each reason."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml

from spa_ray.data.left_out import LISTED, LeftOut, lines
from spa_ray.data.prompts import PromptCounts, read_prompts
from spa_ray.errors import RunError
from spa_ray.generation.stage import count_rows
from spa_ray.generation.usage import Spent
from spa_ray.pipeline import commands
from spa_ray.pipeline.progress import Progress
from tests.scripted import prompt

ROWS = [{"prompt": "a"}, {"prompt": "a"}, {"prompt": " "}, {"prompt": "b"}, {"prompt": None}, {"prompt": 7}, {"q": "c"}]
REASONS = {"duplicate": 1, "empty": 2, "malformed": 1, "no prompt": 1}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + "{oops\n", encoding="utf-8")
    return path


@pytest.fixture
def config(tmp_path: Path, source: Path, tiny_model: Path) -> Path:
    prompts = {"source": str(source), "on_bad_row": "skip"}
    raw = {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(tiny_model), "engine": "spa_ray.engine.scripted:ScriptedEngine", "max_model_len": 4096},
        "prompts": prompts,
        "evaluation": {"prompts": prompts, "judge": "self"},
    }
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands end where they would connect."""

    @contextmanager
    def refuse(**_: Any) -> Iterator[None]:
        raise RunError("no Ray in this test")
        yield

    monkeypatch.setattr(commands, "connected", refuse)


def check_said(err: str, where: str, listed: Path | None) -> None:
    said = [line for line in err.splitlines() if "left out" in line]
    for reason, count in {**REASONS, "unreadable": 1}.items():
        (line,) = [line for line in said if f"{count} rows left out: {reason} (" in line]
        assert where in line
        assert "p.jsonl:" in line
        assert listed is None or line.endswith(f"; listed in {listed}")
    assert len(said) == len(REASONS) + 1
    if listed is not None:
        rows = [json.loads(line) for line in listed.read_text(encoding="utf-8").splitlines()]
        assert [row["reason"] for row in rows] == [
            "duplicate", "empty", "empty", "malformed", "no prompt", "unreadable",
        ]  # fmt: skip
        assert rows[1]["row"].endswith("p.jsonl:3")
        assert "`prompt` is empty" in rows[1]["why"]


def test_generate_and_eval_say_it_and_list_the_rows(
    spa: Any, config: Path, source: Path, tmp_path: Path, tiny_model: Path, no_ray: None
) -> None:
    status, _, err = spa("generate", config, "--prompts", source, "--out", tmp_path / "g")
    assert status == 1
    check_said(err, "prompts: ", tmp_path / "g" / "left_out.jsonl")
    status, _, err = spa("eval", tiny_model, "--config", config, "--out", tmp_path / "e")
    assert status == 1
    check_said(err, "evaluation.prompts: ", tmp_path / "e" / "left_out.jsonl")


def test_a_run_says_it_before_it_begins(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from spa_ray.config import load_config
    from spa_ray.pipeline.run import Pipeline

    pipeline = Pipeline(load_config(config, ["evaluation.prompts=null"]), progress=Progress())
    pipeline.check()
    pipeline.begin()
    check_said(capsys.readouterr().err, "prompts (", tmp_path / "run" / "left_out.jsonl")


def test_preview_says_it_with_and_without_a_folder(spa: Any, config: Path, tmp_path: Path) -> None:
    status, _, err = spa("preview", config, "--prompts", 2, "--out", tmp_path / "p", "scoring.mode=regex")
    assert status == 0, err
    check_said(err, "prompts: ", tmp_path / "p" / "left_out.jsonl")
    status, _, err = spa("preview", config, "--prompts", 1, "scoring.mode=regex", "model.max_model_len=40")
    assert (status, "preview: 1 of 1 prompts left out: prompt_too_long (the first: " in err) == (0, True), err
    check_said("\n".join(line for line in err.splitlines() if "preview:" not in line), "prompts: ", None)


def test_a_plan_notes_it(spa: Any, config: Path) -> None:
    status, out, err = spa("plan", config)
    assert status == 0, err
    notes = "\n".join(line for line in out.splitlines() if line.startswith("note: prompts: "))
    check_said(notes, "prompts: ", None)


def test_nothing_is_said_where_nothing_is_left_out(spa: Any, config: Path, tmp_path: Path, no_ray: None) -> None:
    (tmp_path / "p.txt").write_text("a\nb\n", encoding="utf-8")
    _, _, err = spa("generate", config, "--prompts", tmp_path / "p.txt", "--out", tmp_path / "g")
    assert "left out" not in err
    assert not (tmp_path / "g" / "left_out.jsonl").exists()


def test_errors_of_a_stage_are_counted_by_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from spa_ray.data.schemas import EPISODES
    from spa_ray.generation.episode import error_row
    from spa_ray.pipeline.evaluate import write_table

    errors = [None, "prompt_too_long: 9 tokens", "timeout: none", "prompt_too_long: 8 tokens"]
    rows = [error_row(prompt(f"p{at}"), error, 0) for at, error in enumerate(errors)]
    write_table(pa.Table.from_pylist(rows, EPISODES), tmp_path / "episodes" / "part=0" / "a.parquet")
    counts = count_rows(tmp_path / "episodes", Spent())
    assert (counts.errors, counts.first_error) == (3, "prompt_too_long: 9 tokens")
    Progress().say_errors("generate", counts.to_dict(), tmp_path / "episodes")
    said = capsys.readouterr().err.splitlines()
    listed = f"; listed in {tmp_path / 'episodes'} by their error"
    assert said == [
        f"warning: generate: 2 of 4 prompts left out: prompt_too_long (the first: prompt_too_long: 9 tokens){listed}",
        f"warning: generate: 1 of 4 prompts left out: timeout (the first: timeout: none){listed}",
    ]


def test_all_are_counted_and_a_bounded_number_is_kept() -> None:
    left = LeftOut()
    for number in range(LISTED + 5):
        left.add("duplicate", f"row {number}", "why")
    assert len(left.rows) == LISTED
    assert lines({"prompts": left}) == ["prompts: 10,005 rows left out: duplicate (the first: row 0: why)"]


def test_what_is_skipped_for_an_earlier_iteration_is_not_counted_again(source: Path) -> None:
    from spa_ray.config.prompts import Prompts

    counts = PromptCounts()
    list(read_prompts(Prompts(source=str(source), on_bad_row="skip"), skip=2, counts=counts))
    assert counts.dropped.counts == {"empty": 1, "malformed": 1, "no prompt": 1, "unreadable": 1}
