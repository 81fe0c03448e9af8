"""The SGA paper's cells: three data sets, a config each, and six models, a key each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spa_ray.config import load_config
from spa_ray.objectives import load_objectives
from tests.test_given import HELPSTEER2_ROWS, HH_ROW, ULTRAFEEDBACK_ROW, put

ROOT = Path(__file__).parents[1]
MODELS = (
    "meta-llama/Llama-3.2-1B-Instruct",
    "meta-llama/Llama-3.2-3B-Instruct",
    "meta-llama/Llama-3.1-8B-Instruct",
    "Qwen/Qwen2.5-7B-Instruct",
    "Qwen/Qwen3-4B",
    "Qwen/Qwen3-8B",
)
ROWS: dict[str, list[dict[str, Any]]] = {
    "sga-helpsteer2": HELPSTEER2_ROWS,
    "sga-ultrafeedback": [ULTRAFEEDBACK_ROW, {**ULTRAFEEDBACK_ROW, "instruction": "Name a flower."}],
    "sga-hh-rlhf": [HH_ROW],
}
OBJECTIVES = {"sga-helpsteer2": 5, "sga-ultrafeedback": 4, "sga-hh-rlhf": 2}
ARMS = ["sft", "ric", "cpo", "modpo", "sga_sft", "sga_dpo"]


def config(stem: str) -> Path:
    return ROOT / "configs" / "paper" / f"{stem}.yaml"


@pytest.mark.parametrize("stem", ROWS)
@pytest.mark.parametrize("model", MODELS)
def test_each_cell_is_planned_on_local_files_of_the_true_schema(
    stem: str, model: str, tmp_path: Path, spa: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    rows = put(tmp_path / "rows.jsonl", *ROWS[stem])
    given = [f"episodes.source={rows}", "episodes.split=null", f"evaluation.prompts.path={rows}"]
    halves = ["evaluation.prompts.split=null"] if stem == "sga-ultrafeedback" else []
    status, out, err = spa("plan", config(stem), f"model.path={model}", *given, *halves, "--json")
    assert status == 0, err
    plan = json.loads(out.strip().splitlines()[-1])
    assert list(plan["arms"]) == ARMS
    assert plan["model"]["path"] == model
    assert plan["gpus"] == {"engines": 4, "train": 4}
    stages = [stage["stage"] for stage in plan["stages"]]
    assert ("label" in stages) == (stem == "sga-hh-rlhf")
    margins = [stage for stage in stages if stage.startswith("train:margin_")]
    assert len(margins) == OBJECTIVES[stem] - 1  # MODPO's, of all attributes but the first


@pytest.mark.parametrize("stem", ROWS)
def test_settings_are_the_papers(stem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """ALGORITHMS 3, and at inference what its evaluation asks for."""
    monkeypatch.chdir(ROOT)
    arms = load_config(config(stem))
    for name in ("sft", "sga_sft", "sga_dpo"):
        train = arms[name].train
        assert train.lora is not None
        assert (train.lora.r, train.lora.alpha, train.lora.dropout) == (32, 64, 0.05)
        assert (train.lr, train.scheduler, train.warmup, train.epochs, train.batch_size) == (1e-5, "cosine", 0, 2, 64)
        assert (train.grad_clip, train.max_length, train.dtype, train.adam_betas) == (5, 1024, "bfloat16", (0.95, 0.95))
        assert (arms[name].pairs.order, arms[name].pairs.delta) == ("mean", 1e-6)
    assert arms["ric"].train.lr == 1.414e-4
    assert arms["cpo"].train.lora is None
    assert arms["modpo"].train.max_length == 512
    first = arms["sft"]
    sampling = first.evaluation.sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (0.6, 0.9, 1024)
    assert len(load_objectives(first)) == OBJECTIVES[stem]
