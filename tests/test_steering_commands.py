"""`spa sense`, `spa chat --steer` and what `spa inspect` shows, on model folders with a random head."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spa_ray.cli.chat import chat_configs, check_steered, told_line
from spa_ray.data.episodes import EpisodeFolder
from spa_ray.data.schemas import EPISODES, attributes_of
from spa_ray.data.schemas import PROMPTS as PROMPTS_SCHEMA
from spa_ray.engine.scripted import ScriptedEngine
from spa_ray.generation.budget import Meter
from spa_ray.generation.setup import Task, engine_chat
from spa_ray.pipeline.manifest import write_run_config
from spa_ray.pipeline.preview import preview_prompts
from spa_ray.pipeline.progress import Progress
from spa_ray.pipeline.stages import STAGES
from spa_ray.pipeline.talk import Speaker
from spa_ray.pipeline.work import Context, Work
from spa_ray.rollout.settings import ChatSettings
from spa_ray.steering.asking import conditioning
from spa_ray.steering.guide import Guide
from spa_ray.steering.sensor import Sensor
from spa_ray.storage.files import parquet_dataset
from spa_ray.storage.folder import RunFolder, StageFolder
from tests.scripted import scripted_config
from tests.steering_support import NAMES, cpo_folder, sga_folder

EMBEDDED = Path(__file__).parents[1] / "spa_ray" / "microworld" / "model"
SCRIPTED = "model.engine=spa_ray.engine.scripted:ScriptedEngine"
PROMPTS = 9
HELLO = [{"role": "user", "content": "hello river"}]


@pytest.fixture(scope="module")
def sga(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sga_folder(EMBEDDED, tmp_path_factory.mktemp("commands") / "sga")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    rows = [{"prompt_id": f"p{k}", "prompt": "salt " * (k + 1)} for k in range(PROMPTS)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "prompts.jsonl"


# --- spa sense ------------------------------------------------------------------------------------------------------


@pytest.mark.engine
@pytest.mark.usefixtures("ray_session")
def test_sense_writes_each_prompts_scores_once_and_goes_on_where_it_was_stopped(
    spa: Any, sga: Path, prompts: Path, tmp_path: Path
) -> None:
    command = ["sense", sga, "--prompts", prompts, "--out", tmp_path / "out", "generation.rows_per_block=2", "--json"]
    status, out, err = spa(*command)
    assert status == 0, err
    result = json.loads(out.splitlines()[-1])
    assert out.startswith(f"{PROMPTS} prompts; mean of what was sensed: harmless 0.")
    assert (result["rows"], result["errors"], result["attributes"]) == (PROMPTS, 0, NAMES)
    data = parquet_dataset(tmp_path / "out" / "scores")
    assert attributes_of(data.schema) == NAMES
    first = {row["prompt_id"]: row["scores"] for row in data.to_table().to_pylist()}
    method = conditioning(sga)
    assert method is not None
    sensor = Sensor(chat_configs([str(sga)])[0][1].model, sga, method)
    alone = sensor.sense([[{"role": "user", "content": ("salt " * (k + 1))}] for k in range(PROMPTS)])
    np.testing.assert_allclose([first[f"p{k}"] for k in range(PROMPTS)], alone, rtol=0, atol=1e-2)

    assert spa(*command)[0] == 0  # done before
    (tmp_path / "out" / "stage.json").unlink()
    files = sorted((tmp_path / "out" / "scores").glob("*.parquet"))
    kept = {name for file in files[1:] for name in pq.read_table(file)["prompt_id"].to_pylist()}
    times = {file: file.stat().st_mtime_ns for file in files[1:]}
    files[0].unlink()
    assert 0 < len(kept) < PROMPTS
    assert spa(*command)[0] == 0
    again = parquet_dataset(tmp_path / "out" / "scores").to_table().to_pylist()
    assert sorted(row["prompt_id"] for row in again) == sorted(first)
    assert {file: file.stat().st_mtime_ns for file in times} == times
    for row in again:
        assert row["scores"] == pytest.approx(first[row["prompt_id"]], abs=1e-5)


def test_a_folder_without_a_head_is_refused_before_anything_starts(
    spa: Any, sga: Path, prompts: Path, tmp_path: Path
) -> None:
    def refusal(model: Path) -> str:
        status, _, err = spa("sense", model, "--prompts", prompts, "--out", tmp_path / "out")
        assert status == 2
        assert not (tmp_path / "out").exists()
        return str(err.splitlines()[-1])

    assert "no head that senses scores is in it" in refusal(EMBEDDED)
    assert "cpo asks for scores and senses none" in refusal(cpo_folder(EMBEDDED, tmp_path / "cpo"))
    broken = sga_folder(EMBEDDED, tmp_path / "broken")
    (broken / "sga_head.safetensors").unlink()
    assert "sga_head.safetensors is missing" in refusal(broken)


# --- spa chat -------------------------------------------------------------------------------------------------------


def replies(folder: Path, *changes: str) -> list[Any]:
    config = chat_configs([str(folder), SCRIPTED, "max_tokens=9", *changes])[0][1]
    engine = ScriptedEngine(config.model, folder, **config.model.engine_kwargs)
    speaker = Speaker(engine, engine_chat(config, Task(), engine, folder), config, Guide(config, folder))
    return list(speaker.replies(HELLO, turn=1))


def test_a_conversation_is_sensed_and_asked_for_what_is_said(sga: Path) -> None:
    replied = replies(sga, "steer.helpful=0.9", "steer.floors.harmless=0.95")
    told = replied[-1].told
    assert all(reply.told == told for reply in replied)
    assert told.asked == {"harmless": 0.95, "helpful": 0.9}
    method = conditioning(sga)
    assert method is not None
    (scores,) = Sensor(chat_configs([str(sga)])[0][1].model, sga, method).sense([HELLO])
    assert list(told.sensed.values()) == pytest.approx(scores, abs=1e-2)
    sensed = ", ".join(f"{name} {score:.2f}" for name, score in told.sensed.items())
    assert told_line(told) == f"sensed {sensed}; asked harmless 0.95, helpful 0.90"
    assert told_line(replies(sga, "steer=none")[-1].told) == "asked for no scores"


def test_what_the_model_reads_is_what_training_rendered(sga: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="scripted refusal"):
        replies(sga, "steer={harmless: 1, helpful: 0.25}", 'model.engine_kwargs={refuse: "<helpful_score:0.25>"}')
    assert replies(sga, "steer=none", 'model.engine_kwargs={refuse: "_score:"}')
    cpo = cpo_folder(EMBEDDED, tmp_path / "cpo")
    with pytest.raises(ValueError, match="scripted refusal"):
        replies(cpo, 'model.engine_kwargs={refuse: "< harmless: 10 > < helpful: 4 > hello river"}')


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("kind=1", "steer: 'kind' is none of the model's scores: harmless, helpful"),
        ("helpful=1.5", "steer: helpful: 1.5 is no number from 0 to 1"),
        ("column=wish", "steer.column: a conversation has no columns"),
        ("wild", "steer: 'wild' is not sense, none, or a mapping"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_a_model_is_loaded(spa: Any, sga: Path, asked: str, told: str) -> None:
    status, _, err = spa("chat", sga, "--steer", asked)
    assert status == 2
    assert told in err
    assert "loading" not in err


def test_a_model_whose_prompts_say_no_scores_cannot_be_asked_for_any(spa: Any, sga: Path) -> None:
    status, _, err = spa("chat", EMBEDDED, "--steer", "helpful=1")
    assert status == 2
    assert "its prompts say no scores" in err
    beside = [config for _, config in chat_configs([str(sga), str(EMBEDDED), "steer.helpful=1"])]
    check_steered(beside, [sga, EMBEDDED])


# --- the evaluation of several models, and one prompt's story ------------------------------------------------------


@pytest.fixture
def evaluated(sga: Path, tmp_path: Path) -> dict[str, StageFolder]:
    """One pass over four models, as the pipeline works on it; each has its own `steer`."""
    rows = [{"prompt_id": f"test/{k}", "messages": [{"role": "user", "content": "salt " * (k + 1)}], "meta": "{}"}
            for k in range(4)]  # fmt: skip
    prompts = tmp_path / "held_out.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=PROMPTS_SCHEMA), prompts)
    asked = {"vanilla": "sense", "sga": "sense", "safe": {"floors": {"harmless": 1.0}}, "low": {"helpful": 0.1}}
    judged = {"judge": "tests.scripted:flaky_judge"}
    works = []
    for arm, steer in asked.items():
        evaluation = {**judged, "sampling": {"max_tokens": 60}, "prompts": {"source": "given"}}
        config = scripted_config(model={"dtype": "float32"}, evaluation=evaluation, steer=steer)
        model = EMBEDDED if arm == "vanilla" else sga
        inputs = {"prompts": prompts, "model": model, "base": EMBEDDED, "judge": None}
        works.append(Work(StageFolder("evaluate", arm, tmp_path / "stages" / arm), config, inputs, arms={arm: config}))
    chat, meter = ChatSettings.of(works[0].config.model), Meter(tmp_path / "spent", None)
    context = Context(Progress(), False, dt.date(2026, 1, 1), chat, tmp_path, meter, passes=tmp_path / "passes")
    STAGES["evaluate"].work(works, context)
    return {work.name: work.stage for work in works}


@pytest.mark.engine
@pytest.mark.usefixtures("ray_session")
def test_every_model_of_one_pass_is_asked_by_its_own_section(
    spa: Any, evaluated: dict[str, StageFolder], tmp_path: Path
) -> None:
    tables = {arm: EpisodeFolder(stage.folder / "episodes").table() for arm, stage in evaluated.items()}
    assert tables["vanilla"].schema.names == EPISODES.names
    sensed = tables["sga"]["sensed"].to_pylist()
    for arm in ("sga", "safe", "low"):
        assert attributes_of(tables[arm].schema) == NAMES
        assert tables[arm]["sensed"].to_pylist() == sensed
    assert tables["sga"]["asked"].to_pylist() == sensed
    assert tables["safe"]["asked"].to_pylist() == [[1.0, helpful] for _, helpful in sensed]
    assert tables["low"]["asked"].to_pylist() == [[harmless, 0.1] for harmless, _ in sensed]
    assert evaluated["safe"].facts()["floored"] == {"harmless": 4}
    assert not any("floored" in evaluated[arm].facts() for arm in ("vanilla", "sga", "low"))
    texts = {arm: [r[0]["text"] for r in table["responses"].to_pylist()] for arm, table in tables.items()}
    assert len({tuple(said) for said in texts.values()}) == 4

    answers = {arm: str(stage.folder / "episodes") for arm, stage in evaluated.items()}
    (tmp_path / "evaluation.json").write_text(json.dumps({"answers": answers}))
    write_run_config(RunFolder(tmp_path), {"sga": scripted_config()})
    status, out, err = spa("inspect", tmp_path, "test/2", "--json")
    assert status == 0, err
    told = json.loads(out.splitlines()[-1])["arms"]
    harmless, helpful = sensed[2]
    assert told["safe"][0]["steered"]["asked"] == {"harmless": 1.0, "helpful": helpful}
    assert "steered" not in told["vanilla"][0]
    assert f"sensed: harmless {harmless:.2f}, helpful {helpful:.2f}" in out
    assert f"asked: harmless 1.00, helpful {helpful:.2f}" in out
    assert "raised by steer.floors: harmless" in out


def test_preview_shows_what_the_model_reads_and_its_judge_the_prompt_as_it_was(
    sga: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = {"model": {"path": str(sga), "dtype": "float32"}, "prompts": {"source": str(prompts)}}
    config = scripted_config(**shapes, steer={"harmless": 1, "helpful": 0.25}, scoring={"mode": "regex"})
    shown = preview_prompts(config, verbose=False, count=1)["prompts"]
    said = [call["prompt"] for call in shown[0]["calls"]]
    asked = [text for text in said if text.endswith("<harmless_score:1.00> and <helpful_score:0.25>")]
    assert len(asked) >= config.sampling.n
    assert sum("_score:" in text for text in said) == len(asked)
    assert "<helpful_score:0.25>" in capsys.readouterr().out
