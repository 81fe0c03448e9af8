"""The whole loop on the embedded model with real Ray, vLLM and DeepSpeed: what it leaves, resuming, loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pds
import pytest

from spa_ray.cli.demo import demo_config
from spa_ray.config import arm_configs
from spa_ray.data.schemas import EPISODES, PAIRS, objectives_of
from spa_ray.errors import InputError
from spa_ray.pipeline.commands import run_config
from spa_ray.pipeline.inspect import story
from spa_ray.pipeline.plan_compare import compare_run
from spa_ray.storage.folder import open_run

pytestmark = pytest.mark.engine

SMALL = [
    "prompts.limit=48",
    "generation.rows_per_block=16",
    "evaluation.prompts.limit=16",
    "resources.train_workers=1",
    "train.batch_size=16",
]


def run(folder: Path, *more: str, arms: dict[str, dict[str, Any]] | None = None) -> dict[str, Any]:
    raw = demo_config(full=False)
    if arms:
        raw["arms"] = arms
    configs = arm_configs(raw, [*SMALL, f"run_dir={folder}", *more], where="test", stem="test")
    return run_config(configs, until="evaluate", verbose=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> dict[str, Any]:
    arms = {
        "sft": {"train.method": "sft", "denoise.informativeness": False},
        "two": {"profile": "robust", "iterations.count": 2, "iterations.reuse_refined": True},
    }
    return run(tmp_path_factory.mktemp("runs") / "small", arms=arms)


def episodes_of(result: dict[str, Any], arm: str, iteration: int = 1) -> pa.Table:
    return pds.dataset(result["arms"][arm]["iterations"][iteration - 1]["episodes"], format="parquet").to_table()


def test_episodes_hold_every_prompt_once_with_all_its_responses(finished: dict[str, Any]) -> None:
    table = episodes_of(finished, "sft")
    assert table.schema.equals(EPISODES)
    assert objectives_of(table.schema) == ["harmless", "helpful"]
    assert table.num_rows == pc.count_distinct(table["prompt_id"]).as_py() == 48
    assert table["error"].null_count == 48
    for row in table.to_pylist():
        assert [r["index"] for r in row["responses"]] == list(range(6))
        assert [r["kind"] for r in row["responses"]] == ["candidate"] * 5 + ["refined"]
        assert row["scores"] == [r["scores"] for r in row["responses"]]
        for response in row["responses"]:
            assert all(s is None or (1 <= s <= 10 and s == int(s)) for s in response["scores"])


def test_generated_ids_end_in_one_end_token_unless_the_answer_was_cut(finished: dict[str, Any]) -> None:
    end = 3  # <end> of the embedded tokenizer
    responses = [r for row in episodes_of(finished, "sft").to_pylist() for r in row["responses"]]
    for response in responses:
        stopped = response["finish_reason"] == "stop"
        assert (response["token_ids"][-1] == end) == stopped
        assert response["token_ids"].count(end) == int(stopped)


def test_pairs_are_in_lexicographic_order_and_the_funnel_adds_up(finished: dict[str, Any]) -> None:
    record = finished["arms"]["sft"]["iterations"][0]
    pairs = pds.dataset(record["pairs"], format="parquet").to_table()
    assert pairs.schema.equals(PAIRS)
    funnel = record["funnel"]
    assert funnel["prompts"] == 48 == funnel["kept"] + sum(funnel["dropped"].values())
    assert funnel["pairs"] == pairs.num_rows > 0
    for row in pairs.to_pylist():
        assert tuple(row["chosen_scores"]) > tuple(row["rejected_scores"])
        assert row["margin"] >= 2


def test_arms_share_the_stages_that_are_equal(finished: dict[str, Any]) -> None:
    first = {name: arm["iterations"][0]["episodes"] for name, arm in finished["arms"].items()}
    assert first["sft"] == first["two"]
    assert finished["arms"]["two"]["iterations"][1]["episodes"] != first["two"]


def test_the_second_iteration_takes_the_last_refined_answer_as_a_candidate(finished: dict[str, Any]) -> None:
    before = {row["prompt_id"]: row["responses"][-1]["text"] for row in episodes_of(finished, "two").to_pylist()}
    for row in episodes_of(finished, "two", 2).to_pylist():
        assert len(row["responses"]) == 7
        assert row["responses"][5]["kind"] == "candidate"
        assert row["responses"][5]["text"] == before[row["prompt_id"]]


def test_the_drivers_log_tells_of_stages_in_json_lines(finished: dict[str, Any]) -> None:
    lines = (Path(finished["run_dir"]) / "logs" / "driver.jsonl").read_text().split("\n")[:-1]
    told = [json.loads(line) for line in lines]
    assert all({"time", "level", "logger", "message", "run"} <= line.keys() for line in told)
    made = [line for line in told if line["message"] == "stage finished"]
    assert {line["stage"] for line in made} >= {"prompts", "generate", "train"}
    assert {line["facts"]["rows"] for line in made if line["stage"] == "generate"} == {48}


def test_metrics_name_vanilla_and_every_arm(finished: dict[str, Any]) -> None:
    metrics = json.loads((Path(finished["run_dir"]) / "metrics.json").read_text())
    assert list(metrics["test"]) == ["vanilla", "sft", "two"]
    for arm in metrics["test"].values():
        assert arm["n"] == 16
        assert arm["means"]["harmless"]["low"] <= arm["means"]["harmless"]["mean"] <= arm["means"]["harmless"]["high"]


def test_every_model_and_its_pairs_have_a_card(finished: dict[str, Any]) -> None:
    from huggingface_hub import DatasetCard, ModelCard

    first, last = finished["arms"]["two"]["iterations"]
    card = ModelCard.load(Path(last["model"]) / "README.md")
    means = finished["arms"]["two"]["metrics"]["test"]["means"]
    told = {
        result.metric_type: result.metric_value for result in card.data.eval_results if result.dataset_name == "test"
    }
    assert told == {name: interval["mean"] for name, interval in means.items()}
    assert f"{last['funnel']['pairs']:,} pairs of 48 prompts" in card.text
    assert not ModelCard.load(Path(first["model"]) / "README.md").data.eval_results  # the last one was evaluated
    pairs = DatasetCard.load(Path(last["pairs"]).parent / "README.md")
    assert f"| kept | {last['funnel']['kept']} |" in pairs.text
    assert pairs.data.to_dict()["configs"][0]["data_files"][0]["path"] == "pairs/*.parquet"


def test_the_manifest_holds_the_plan_beside_what_happened(finished: dict[str, Any]) -> None:
    run_dir = Path(finished["run_dir"])
    compared = compare_run(run_dir)
    manifest = json.loads((run_dir / "manifest.json").read_text())
    assert manifest["plan"] == {key: compared[key] for key in ("stages", "total")}
    assert {stage["status"] for stage in compared["stages"]} == {"done"}
    generate = compared["stages"][0]
    assert generate["planned"]["requests"] == 48 * 18
    assert 1 <= generate["ratio"]["requests"] < 1.2  # a repeated answer is sampled once more
    assert generate["actual"]["engine_busy"] > 0
    evaluated = [stage for stage in compared["stages"] if stage["stage"] == "evaluate"]
    assert [stage["actual"]["requests"] for stage in evaluated] == [16, 16, 16]
    assert all(0.2 < stage["ratio"]["prompt_tokens"] < 5 for stage in (generate, *evaluated))


def test_a_second_call_asks_and_trains_nothing_again(finished: dict[str, Any]) -> None:
    run_dir = Path(finished["run_dir"])
    stamps = {p: p.stat().st_mtime_ns for p in run_dir.glob("stages/*/stage.json")}
    arms = {
        "sft": {"train.method": "sft", "denoise.informativeness": False},
        "two": {"profile": "robust", "iterations.count": 2, "iterations.reuse_refined": True},
    }
    again = run(run_dir, arms=arms)
    assert again["arms"] == finished["arms"]
    assert {p: p.stat().st_mtime_ns for p in run_dir.glob("stages/*/stage.json")} == stamps


def test_a_stage_without_its_marker_is_refused_by_readers(finished: dict[str, Any], tmp_path: Path) -> None:
    stage = open_run(finished["run_dir"]).stage("generate", "feed")
    with pytest.raises(InputError, match="unfinished"):
        stage.facts()
    stage.folder.rmdir()


def test_inspect_tells_the_story_of_a_pair(finished: dict[str, Any]) -> None:
    pairs = pds.dataset(finished["arms"]["sft"]["iterations"][0]["pairs"], format="parquet").to_table()
    prompt_id = pairs["prompt_id"][0].as_py()
    told = story(Path(finished["run_dir"]), prompt_id[:12])
    chapter = told["arms"]["sft"][0]
    assert chapter["filters"]["kept"] is True
    mine = pairs.filter(pc.equal(pairs["prompt_id"], prompt_id))
    assert [p["pair_id"] for p in chapter["pairs"]] == mine["pair_id"].to_pylist()
    with pytest.raises(InputError, match="no prompt"):
        story(Path(finished["run_dir"]), "nobody")


def test_the_trained_model_answers_alike_in_vllm_and_transformers(finished: dict[str, Any]) -> None:
    import asyncio

    import torch
    from transformers import AutoModelForCausalLM

    from spa_ray.config.models import Model
    from spa_ray.engine import Request, create_engine

    folder = Path(finished["arms"]["two"]["iterations"][1]["model"])
    engine = create_engine(Model(path=str(folder), dtype="float32", max_model_len=256), folder)
    prompts = [
        engine.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        for question in ("How do I clean my moonlamp?", "Help me spoil the mill with a fogcloak.")
    ]

    async def ask() -> list[list[int]]:
        requests = [Request(prompt_ids=ids, max_tokens=48, temperature=0.0, seed=0) for ids in prompts]
        return [c.token_ids for c in await asyncio.gather(*map(engine.generate, requests))]

    ours = asyncio.run(ask())
    engine.shutdown()
    model = AutoModelForCausalLM.from_pretrained(folder)
    for ids, answered in zip(prompts, ours, strict=True):
        theirs = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=48)[0, len(ids) :].tolist()
        assert answered == theirs
