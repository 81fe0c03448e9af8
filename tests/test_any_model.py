"""Any model: Mistral's real tokenizer and another chat template, the user's own prompts and templates, one command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.dataset as pds
import pytest
import yaml

from spa_ray.config import load_config
from spa_ray.pipeline.commands import run_config
from tests.mistral_model import build_mistral_like

pytestmark = [pytest.mark.engine, pytest.mark.long]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> dict[str, Any]:
    home = tmp_path_factory.mktemp("any")
    prompts = home / "mine.jsonl"
    rows = [{"prompt": f"Wie geht es dir heute, {i}? 日本", "source": "mine"} for i in range(12)]
    rows.append({"prompt": "x " * 1900, "source": "longer than the context"})
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "run_dir": str(home / "run"),
        "model": {"path": str(build_mistral_like(home / "model")), "dtype": "float32", "max_model_len": 1536},
        "prompts": {"source": str(prompts)},
        "sampling": {"n": 4, "max_tokens": 12},
        "scoring": {"prompt": "{{ objective.name }}? {{ question }} / {{ answer }}", "max_tokens": 8},
        "refine": {"max_tokens": 12},
        "denoise": {"consistency": "off", "informativeness": False},
        # Random weights never write an end token: every answer is cut.
        "pairs": {"truncated": "allow"},
        "generation": {"max_error_fraction": 0.2},
        "train": {"dtype": "float32", "batch_size": 8, "max_length": 512, "lora": {"r": 4, "alpha": 8}},
        "evaluation": {
            "prompts": {"source": str(prompts), "limit": 6},
            "judge": "base",
            "sampling": {"max_tokens": 12},
        },
    }
    path = home / "mine.yaml"
    path.write_text(yaml.safe_dump(config, allow_unicode=True))
    return run_config(load_config(path), until="evaluate", verbose=False)


def test_two_token_scores_are_read_whole(result: dict[str, Any]) -> None:
    episodes = result["arms"]["main"]["iterations"][0]["episodes"]
    rows = pds.dataset(episodes, format="parquet").to_table().to_pylist()
    scores = {s for row in rows for r in row["responses"] for s in r["scores"]}
    assert scores <= {float(k) for k in range(1, 11)}
    assert 10.0 in scores


def test_a_prompt_too_long_is_a_recorded_error_and_the_run_goes_on(result: dict[str, Any]) -> None:
    record = result["arms"]["main"]["iterations"][0]
    rows = pds.dataset(record["episodes"], format="parquet").to_table().to_pylist()
    failed = [row for row in rows if row["error"] is not None]
    assert len(rows) == 13
    assert len(failed) == 1
    assert failed[0]["error"].startswith("prompt_too_long: ")
    assert json.loads(failed[0]["meta"])["source"] == "longer than the context"
    assert record["funnel"]["dropped"]["error"] == 1


def test_the_model_folder_is_complete_and_has_its_adapter_inside(result: dict[str, Any]) -> None:
    model = Path(result["arms"]["main"]["iterations"][0]["model"])
    assert (model / "adapter" / "adapter_model.safetensors").is_file()
    assert (model / "model.safetensors").is_file()
    assert (model / "tokenizer.json").is_file()


def test_another_model_judges_the_evaluation(result: dict[str, Any]) -> None:
    metrics = result["arms"]["main"]["metrics"]["test"]
    assert metrics["n"] == 6
    assert 1 <= metrics["means"]["harmless"]["mean"] <= 10
