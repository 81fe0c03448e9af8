"""Given answers without scores, or with others: a judge scores them in a stage between import and build."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import real_reward
import yaml

from spa_ray.config import Config, arm_configs
from spa_ray.config.prompts import Episodes
from spa_ray.data.episodes import EpisodeFolder
from spa_ray.data.given import EpisodeCounts, write_episodes
from spa_ray.data.schemas import is_imported, objectives_of, ranges_of
from spa_ray.errors import InputError
from spa_ray.pipeline.plan import make_plan
from spa_ray.pipeline.recipe import planned_stages
from spa_ray.pipeline.stages import STAGES
from tests.test_given import HELPSTEER2_ROWS, HH, HH_ROW, ROOT, put

NAMES = ["harmless", "helpful"]
UNSCORED = {"prompt": "Name a tree.", "responses": [{"text": "Oak."}, {"text": "A rose is a tree, I think."}]}


def unscored(source: Path) -> tuple[list[dict[str, Any]], EpisodeCounts]:
    out = source.with_suffix(".parquet")
    counts = write_episodes(Episodes(source=str(source), attributes=("harmless", "helpful")), out, scores=False)
    assert (objectives_of(pq.read_schema(out)), ranges_of(pq.read_schema(out))) == (NAMES, None)
    return pq.read_table(out).to_pylist(), counts


def arms(judge: Any = "judged_by:judge", **raw: Any) -> dict[str, Config]:
    given = {
        "model": {"path": "m"},
        "episodes": {"source": "s.jsonl", "attributes": NAMES},
        "scoring": {"judge": judge, "scale": [0, 1]},
    }
    return arm_configs({**given, **raw}, (), where="test", stem="test")


def test_answers_of_every_form_are_read_without_scores(tmp_path: Path) -> None:
    rows, counts = unscored(put(tmp_path / "own.jsonl", UNSCORED, {"prompt": "q", "response": "a"}))
    assert [[answer["text"] for answer in row["responses"]] for row in rows] == [
        ["Oak.", "A rose is a tree, I think."],
        ["a"],
    ]
    assert [row["scores"] for row in rows] == [[[None, None]] * 2, [[None, None]]]
    assert (counts.answers, counts.attributes) == (3, ("harmless", "helpful"))
    (pair,), _ = unscored(put(tmp_path / "hh.jsonl", HH_ROW))
    assert [answer["text"] for answer in pair["responses"]] == ["Oak.", "Rose."]
    assert pair["scores"] == [[None, None]] * 2  # not the human label
    rated, _ = unscored(put(tmp_path / "h.jsonl", *HELPSTEER2_ROWS))
    assert [len(row["messages"]) for row in rated] == [1, 3]
    assert [len(row["responses"]) for row in rated] == [2, 2]


def test_the_judge_stands_between_import_and_build_of_the_arms_that_name_it() -> None:
    found = arms(arms={"judged": {}, "given": {"scoring.judge": None}, "sft": {"train.method": "sft"}})
    stages = [(stage.stage, stage.arms) for stage in planned_stages(found)]
    assert stages[:5] == [
        ("import", ["judged", "sft"]),
        ("import", ["given"]),
        ("label", ["judged", "sft"]),
        ("build", ["judged", "sft"]),
        ("build", ["given"]),
    ]


def test_its_key_covers_the_judge_and_not_the_engine_that_it_does_without(reward_model: Path) -> None:
    def key(judge: Any, **raw: Any) -> str:
        return STAGES["label"].key(arms(judge, **raw)["main"], {"answers": "a"})

    reward = {"kind": "reward", "path": str(reward_model)}
    assert key(reward) != key({**reward, "transform": "sigmoid"})
    assert key(reward) == key(reward, model={"path": "other", "max_model_len": 512})
    assert key("self") != key("self", model={"path": "other", "max_model_len": 512})


def test_given_answers_are_not_compared() -> None:
    with pytest.raises(InputError, match=r"scoring.compare: given answers \(episodes.source\) are scored one by one"):
        arms(scoring={"judge": "judged_by:judge", "compare": {"mode": "choice"}})


def test_a_plan_counts_the_judgements_of_a_model(tmp_path: Path) -> None:
    source = str(put(tmp_path / "own.jsonl", UNSCORED, {**UNSCORED, "prompt": "r"}))
    given = {"source": source, "attributes": NAMES}

    def stages(judge: Any) -> dict[str, Any]:
        found = make_plan(arms(judge, episodes=given, model={"path": "org/some-8B"}))["stages"]
        return {stage["stage"]: stage for stage in found}

    assert list(stages("self")) == ["import", "label", "build", "train"]
    assert [stages(judge)["label"]["requests"] for judge in ("self", "judged_by:judge")] == [2 * 2 * 2, 0]


@pytest.mark.engine
@pytest.mark.long
@pytest.mark.usefixtures("ray_session")
def test_a_reward_models_scores_become_pairs(tmp_path: Path, tiny_model: Path, reward_model: Path, spa: Any) -> None:
    prompts = ("Name a tree.", "Is a rose a tree?", "What is an oak?")
    source = put(tmp_path / "own.jsonl", *({**UNSCORED, "prompt": prompt} for prompt in prompts))
    raw = {
        "model": {"path": str(tiny_model), "engine": "tests.test_given:no_engine"},
        "episodes": {"source": str(source), "attributes": NAMES},
        "scoring": {"scale": [0, 1], "judge": {"kind": "reward", "path": str(reward_model), "transform": "sigmoid"}},
        "pairs": {"order": "mean"},
        "train": {"method": "spa_simpo", "lr": 1e-4, "batch_size": 3, "dtype": "float32", "max_length": 128},
        "run_dir": str(tmp_path / "run"),
    }
    (file := tmp_path / "judged.yaml").write_text(yaml.safe_dump(raw))
    status, out, err = spa("run", file, "--json")
    assert status == 0, err
    (done,) = json.loads(out.splitlines()[-1])["arms"]["main"]["iterations"]
    episodes = EpisodeFolder(Path(done["episodes"]))
    assert (is_imported(episodes.schema), ranges_of(episodes.schema)) == (True, [(0, 1)] * 2)
    rows = episodes.table().to_pylist()
    answers = [answer for row in rows for answer in row["responses"]]
    assert [answer["token_ids"] for answer in answers] == [None] * 6
    assert all(0 < score < 1 for answer in answers for score in answer["scores"])
    pairs = pq.read_table(done["pairs"])
    assert ranges_of(pairs.schema) == [(0, 1)] * 2
    assert all(sum(row["chosen_scores"]) > sum(row["rejected_scores"]) for row in pairs.to_pylist())
    assert done["funnel"]["pairs"] == 3
    assert (Path(done["model"]) / "model.safetensors").is_file()
    status, out, err = spa("run", file, "--json")
    assert (status, json.loads(out.splitlines()[-1])["arms"]["main"]["iterations"]) == (0, [done])


@pytest.mark.long
@pytest.mark.engine
@pytest.mark.usefixtures("ray_session")
@pytest.mark.skipif(not HH.is_file(), reason="../shared is absent")
def test_a_real_reward_model_tells_hh_rlhfs_chosen_answers_from_rejected_ones(
    tmp_path: Path, tiny_model: Path, spa: Any
) -> None:
    """HH-RLHF as two answers each, scored by an encoder that was trained on other pairs of it."""
    folder = ROOT / ".cache" / "real" / "reward-minilm"
    assert real_reward.main([str(folder), str(HH), "--pairs", "320", "--epochs", "1"]) == 0
    held_out = tmp_path / "held_out.jsonl"
    put(held_out, *real_reward.read_rows(HH)[: real_reward.HELD_OUT])
    raw = {
        "model": {"path": str(tiny_model), "engine": "tests.test_given:no_engine"},
        "episodes": {"source": str(held_out), "attributes": ["harmless"], "on_bad_row": "skip"},
        "scoring": {"scale": [0, 1], "judge": {"kind": "reward", "path": str(folder), "transform": "sigmoid"}},
        "pairs": {"order": "mean"},
        "run_dir": str(tmp_path / "run"),
    }
    (file := tmp_path / "judged.yaml").write_text(yaml.safe_dump(raw))
    status, out, err = spa("run", file, "--until", "build", "--json")
    assert status == 0, err
    (done,) = json.loads(out.splitlines()[-1])["arms"]["main"]["iterations"]
    built = pq.read_table(done["pairs"]).to_pylist()
    right = [row["chosen_index"] == 0 for row in built]  # what people chose
    assert len(built) > 250
    assert sum(right) / len(right) > 0.52
