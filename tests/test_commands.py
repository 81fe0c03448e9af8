"""One stage a command, real engines: each takes what the last one wrote, and a folder in use is never overwritten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from spa_ray.cli.demo import demo_config
from spa_ray.config import load_config
from spa_ray.errors import InputError
from spa_ray.pipeline.commands import build_stage, evaluate_stage, generate_stage, train_stage
from spa_ray.pipeline.preview import preview_prompts
from spa_ray.storage.files import read_json

pytestmark = pytest.mark.engine

SMALL = [
    "prompts.limit=16",
    "generation.rows_per_block=16",
    "denoise.consistency=off",
    "denoise.informativeness=false",
    "train.batch_size=32",
    "train.max_pairs=64",
    "train.epochs=1",
    "resources.train_workers=1",
    "evaluation.prompts.limit=8",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    raw = {**demo_config(full=False), "arms": {"main": {}}}
    (folder / "world.yaml").write_text(yaml.safe_dump(raw))
    return folder


def config(home: Path, *more: str) -> Any:
    return load_config(home / "world.yaml", [*SMALL, *more])["main"]


@pytest.fixture(scope="module")
def episodes(home: Path, ray_session: None) -> dict[str, Any]:
    return generate_stage(config(home), out=home / "generated", verbose=False)


@pytest.fixture(scope="module")
def pairs(home: Path, episodes: dict[str, Any]) -> dict[str, Any]:
    more = ["denoise.consistency=off", "denoise.informativeness=false"]
    return build_stage(home / "generated", home / "built", None, more, verbose=False)


@pytest.fixture(scope="module")
def model(home: Path, pairs: dict[str, Any]) -> dict[str, Any]:
    return train_stage(config(home), pairs=home / "built", out=home / "trained", verbose=False)


def test_generate_counts_its_rows(episodes: dict[str, Any]) -> None:
    assert (episodes["rows"], episodes["errors"]) == (16, 0)


def test_build_reads_the_objectives_off_the_episodes(pairs: dict[str, Any], home: Path) -> None:
    assert list(pairs["funnel"]["pairs_by_decided_by"]) == ["harmless", "helpful"]
    assert pairs["funnel"]["pairs"] > 64
    assert f"| pairs | {pairs['funnel']['pairs']} |" in (home / "built" / "README.md").read_text()


def test_train_leaves_a_model_folder(model: dict[str, Any], pairs: dict[str, Any], home: Path) -> None:
    assert model["pairs"] == 64
    assert (home / "trained" / "model.safetensors").is_file()
    card = (home / "trained" / "README.md").read_text()
    assert "library_name: transformers" in card
    assert f"{pairs['funnel']['pairs']:,} pairs of" in card


def test_evaluate_scores_every_held_out_prompt(model: dict[str, Any], home: Path) -> None:
    result = evaluate_stage(config(home), model=home / "trained", out=home / "evaluated", verbose=False)
    assert result["metrics"]["test"]["n"] == 8
    assert (home / "evaluated" / "metrics.json").is_file()


def test_a_finished_stage_is_not_made_again(pairs: dict[str, Any], home: Path) -> None:
    stamp = (home / "built" / "stage.json").stat().st_mtime_ns
    more = ["denoise.consistency=off", "denoise.informativeness=false"]
    assert build_stage(home / "generated", home / "built", None, more, verbose=False) == pairs
    assert (home / "built" / "stage.json").stat().st_mtime_ns == stamp


def test_other_settings_do_not_go_into_a_finished_folder(pairs: dict[str, Any], home: Path) -> None:
    with pytest.raises(InputError, match="other settings"):
        build_stage(home / "generated", home / "built", None, ["pairs.delta=3"], verbose=False)


def test_a_folder_of_something_else_is_left_alone(episodes: dict[str, Any], home: Path) -> None:
    (home / "precious").mkdir()
    (home / "precious" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not an output"):
        build_stage(home / "generated", home / "precious", None, [], verbose=False)
    assert [p.name for p in (home / "precious").iterdir()] == ["notes.txt"]


def test_preview_shows_every_rendered_prompt_and_judge_answer(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = preview_prompts(config(home), verbose=False, count=3, out=home / "preview")
    assert len(result["prompts"]) == result["signal"]["prompts"] == 3
    for shown in result["prompts"]:
        assert len(shown["calls"]) >= 5 + 6 * 2 + 1  # a repeated candidate is sampled once more
        assert all(call["prompt"] and call["text"] for call in shown["calls"])
    printed = capsys.readouterr().out
    assert "Judge harmless. Question" in printed
    assert printed.count("===") == 1  # the others are in the file
    assert "signal     to expect: pairs" in printed
    assert read_json(home / "preview" / "signal.json") == result["signal"]
    assert len((home / "preview" / "preview.jsonl").read_text(encoding="utf-8").splitlines()) == 3
