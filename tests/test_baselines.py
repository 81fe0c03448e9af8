"""The SPA paper's baselines on the embedded model: models of one objective, their soups by weights and by adapters, and
Self-Criticism."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.dataset as pds
import pytest

from spa_ray.cli.demo import demo_config
from spa_ray.config import arm_configs
from spa_ray.pipeline.commands import clean_run, run_config
from spa_ray.pipeline.inspect import story
from spa_ray.pipeline.plan_compare import compare_run
from tests.test_merge import TWO, soup, tensors_of

pytestmark = [pytest.mark.engine, pytest.mark.long]

SMALL = [
    "prompts.limit=48",
    "generation.rows_per_block=16",
    "evaluation.prompts.limit=16",
    "train.batch_size=16",
    "train.method=spa_dpo",
    "train.lora={r: 4}",
    "denoise={consistency: off, informativeness: false}",
    "pairs.include=candidates_only",
    "pairs.delta=1",
]
# The embedded model reads its own two templates alone.
CRITIC = {
    "train.method": "self_criticism",
    "scoring.compare": None,
    "refine.prompt": "{% set ranked = candidates | sort(attribute='total', reverse=true) %}"
    "Improve. Question: {{ question }}"
    " Candidate: {{ ranked[0].text }} Candidate: {{ ranked[-1].text }}",
}
ARMS = {
    **TWO,
    "critic": CRITIC,
    "soup": soup(harm=9, help=1),
    "factors": soup("adapters", harm=9, help=1),
}


def run(folder: Path) -> dict[str, Any]:
    raw = {**demo_config(full=False), "arms": ARMS}
    configs = arm_configs(raw, [*SMALL, f"run_dir={folder}"], where="test", stem="test")
    return run_config(configs, until="evaluate", verbose=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("runs") / "baselines")


def model(result: dict[str, Any], arm: str) -> Path:
    (iteration,) = result["arms"][arm]["iterations"]
    return Path(iteration["model"])


def test_a_soup_is_the_mean_of_two_models_of_one_objective(finished: dict[str, Any]) -> None:
    import torch

    harm, other, soups, factors = (tensors_of(model(finished, arm)) for arm in ("harm", "help", "soup", "factors"))
    assert any(not torch.equal(harm[name], other[name]) for name in harm)
    for name, tensor in soups.items():
        wanted = 0.9 * harm[name].double() + 0.1 * other[name].double()
        assert torch.allclose(tensor.double(), wanted, rtol=0, atol=1e-6)
        assert torch.allclose(factors[name].double(), wanted, rtol=0, atol=1e-5)  # one base, plain LoRA, float32
    assert (model(finished, "factors") / "adapter" / "adapter_model.safetensors").is_file()


def test_soups_are_evaluated_as_any_other_arm(finished: dict[str, Any]) -> None:
    rows = {arm: found["metrics"]["test"]["n"] for arm, found in finished["arms"].items()}
    assert rows == dict.fromkeys(ARMS, 16)
    assert finished["arms"]["soup"]["iterations"] == [{"model": str(model(finished, "soup"))}]


def test_self_criticism_learns_refined_answers_above_every_candidate(finished: dict[str, Any]) -> None:
    (iteration,) = finished["arms"]["critic"]["iterations"]
    pairs = pds.dataset(iteration["pairs"], format="parquet").to_table().to_pylist()
    episodes = pds.dataset(iteration["episodes"], format="parquet").to_table().to_pylist()
    totals = {row["prompt_id"]: [sum(scores) for scores in row["scores"] if None not in scores] for row in episodes}
    assert all(len(row["responses"]) == 5 for row in episodes)  # four candidates
    better = {prompt_id for prompt_id, sums in totals.items() if sums[-1] > max(sums[:-1])}
    assert {pair["prompt_id"] for pair in pairs} == better
    assert {pair["kind"] for pair in pairs} == {"refined"}
    log = next(Path(iteration["model"]).parent.rglob("train_log.jsonl")).read_text().splitlines()
    assert "logps/chosen" in json.loads(log[-1])
    result = json.loads(next(Path(iteration["model"]).parent.rglob("train_result.json")).read_text())
    assert result["dropped"]["duplicate"] == len(pairs) - len(better)  # each prompt's answer once


def test_a_finished_run_is_resumed_cleaned_compared_and_told(finished: dict[str, Any]) -> None:
    folder = Path(finished["run_dir"])
    merges = [file for name in ("stage.json", "model/*.safetensors") for file in folder.glob(f"stages/merge-*/{name}")]
    stamps = {file: file.stat().st_mtime_ns for file in merges}
    assert len(stamps) == 4
    assert run(folder)["arms"] == finished["arms"]
    assert clean_run(folder) == {"deleted": []}
    assert stamps == {file: file.stat().st_mtime_ns for file in stamps}
    assert [s["status"] for s in compare_run(folder)["stages"] if s["stage"] == "merge"] == ["done", "done"]
    episodes = pds.dataset(finished["arms"]["harm"]["iterations"][0]["episodes"], format="parquet").to_table()
    told = story(folder, episodes["prompt_id"][0].as_py())
    assert list(told["arms"]) == ["critic", "harm", "help"]
