"""A pass with conditioned models on real Ray Data: sensed in front of the engines, asked for, and rendered; judges see
the prompts as they were. The sensing is real (transformers, a random head), the engine is scripted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spa_ray.config.models import Config
from spa_ray.config.steer import Steer
from spa_ray.data.episodes import EpisodeFolder
from spa_ray.data.schemas import EPISODES, PROMPTS, STEERED, attributes_of, canonical
from spa_ray.errors import InputError, RunError
from spa_ray.generation.setup import Task
from spa_ray.generation.stage import PassCounts, generate
from spa_ray.steering.actor import STEER, as_json, upstream_of
from spa_ray.steering.asking import conditioning
from spa_ray.steering.sensor import Sensor
from tests.scripted import scripted_config
from tests.steering_support import NAMES, cpo_folder, sga_folder

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("ray_session")]

PROMPT_COUNT = 12
LONG = 3  # the prompt that is longer than the context
POISON = "question 7?"


@pytest.fixture(scope="module")
def folders(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    home = tmp_path_factory.mktemp("steered")
    made = {"sga": sga_folder(tiny_model, home / "sga"), "cpo": cpo_folder(tiny_model, home / "cpo")}
    return {**made, "plain": tiny_model}


def asked(k: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"question {k}? " + ("so " * 600 if k == LONG else "so " * k)}]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("steered") / "prompts.parquet"
    meta = json.dumps({"wish": {"helpful": 0.25}})
    rows = [{"prompt_id": f"p{k:02d}", "messages": asked(k), "meta": meta} for k in range(PROMPT_COUNT)]
    pq.write_table(pa.Table.from_pylist(rows, schema=PROMPTS), path)
    return path


def blind(messages: Any, meta: str, answer: str, objective: str) -> float:
    """A judge that sees no scores in what it reads."""
    seen = json.dumps([messages, meta])
    return 1.0 if "_score:" in seen or "< helpful:" in seen or "asked" in seen else 10.0


def config(script: Mapping[str, Any] | None = None, **generation: Any) -> Config:
    return scripted_config(
        {"jitter": 0.02, **(script or {})},
        model={"dtype": "float32", "max_model_len": 1024},
        scoring={"judge": f"{__name__}:blind"},
        generation={"rows_per_block": 3, "max_attempts": 1, "max_error_fraction": 1.0, **generation},
        resources={"concurrency": 8},
        evaluation={"sampling": {"max_tokens": 60}},
    )


def play(
    config: Config,
    prompts: Path,
    folder: Path,
    model: Path,
    steer: str = "sense",
    uses: Any = None,
    kind: Any = "answer",
) -> PassCounts:
    uses = uses or [(model, Steer.model_validate(json.loads(steer) if steer.startswith("{") else steer))]
    upstream = upstream_of(config, uses, prompts=prompts, day=None)
    where: dict[str, Any] = {"out": folder / "episodes", "checkpoint": folder / "checkpoint", "config_hash": "h"}
    return generate(config, Task(kind=kind), prompts=prompts, model=model, upstream=upstream, **where)


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["prompt_id"]: row for row in EpisodeFolder(folder / "episodes").table().to_pylist()}


@pytest.fixture(scope="module")
def alone(folders: Mapping[str, Path]) -> dict[str, list[float]]:
    """What each prompt senses by itself, of those that fit the context."""
    method = conditioning(folders["sga"])
    assert method is not None
    sensor = Sensor(config().model, folders["sga"], method)
    found = {f"p{k:02d}": sensor.sense([asked(k)])[0] for k in range(PROMPT_COUNT) if k != LONG}
    return {name: scores for name, scores in found.items() if not isinstance(scores, str)}


@pytest.fixture(scope="module")
def floor(alone: Mapping[str, list[float]]) -> float:
    """One that raises some prompts' scores."""
    return round(median(scores[0] for scores in alone.values()), 3)


@pytest.fixture(scope="module")
def whole(prompts: Path, folders: Mapping[str, Path], floor: float, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All prompts sensed and answered, nothing goes wrong."""
    folder = tmp_path_factory.mktemp("whole")
    play(config(), prompts, folder, folders["sga"], json.dumps({"floors": {"harmless": floor}}))
    return folder


def test_rows_keep_what_was_sensed_and_what_was_asked_and_judges_see_neither(
    whole: Path, alone: Mapping[str, list[float]], floor: float
) -> None:
    table = EpisodeFolder(whole / "episodes").table()
    assert table.schema.names == [*EPISODES.names, *STEERED.names]
    assert attributes_of(table.schema) == NAMES
    rows = rows_of(whole)
    assert len(rows) == PROMPT_COUNT
    too_long = rows.pop(f"p{LONG:02d}")
    assert too_long["error"].startswith("refused: 1")
    assert "exceed the context of 1024" in too_long["error"]
    assert rows.keys() == alone.keys()
    for name, row in rows.items():
        harmless, helpful = row["sensed"]
        assert row["sensed"] == pytest.approx(alone[name], abs=1e-5)
        assert row["asked"] == [max(harmless, floor), helpful]
        assert row["floored"] == (["harmless"] if harmless < floor else [])
        assert row["scores"] == [[10.0, 10.0]]
        assert row["messages"] == asked(int(name[1:]))
    assert {bool(row["floored"]) for row in rows.values()} == {True, False}


def test_the_engine_reads_the_sentence_of_its_own_model_and_nothing_in_the_plain_ones_prompt(
    prompts: Path, folders: Mapping[str, Path], tmp_path: Path
) -> None:
    """Three models and two sections in one pass; prompts with SGA's sentence are refused, so they are told apart."""
    uses = [(folders["sga"], Steer()), (folders["sga"], Steer(how="none")), (folders["cpo"], Steer()),
            (folders["plain"], Steer())]  # fmt: skip
    table = pq.read_table(prompts).slice(4, 2)
    parts = []
    for at, (model, steer) in enumerate(uses):
        ids = pa.array([f"{at}:{name}" for name in table["prompt_id"].to_pylist()])
        part = table.set_column(0, "prompt_id", ids)
        part = part.append_column("model", pa.array([str(model)] * 2))
        parts.append(part.append_column(STEER, pa.array([as_json(steer)] * 2)))
    pq.write_table(pa.concat_tables(parts), tmp_path / "rows.parquet")
    play(config({"refuse": "_score:0."}), tmp_path / "rows.parquet", tmp_path, folders["plain"], uses=uses)
    rows = rows_of(tmp_path)
    assert [rows[f"{at}:p04"]["error"] is None for at in range(4)] == [False, True, True, True]
    assert "scripted refusal" in rows["0:p04"]["error"]
    assert rows["1:p04"]["asked"] is rows["3:p04"]["asked"] is rows["2:p04"]["sensed"] is None
    assert rows["2:p04"]["asked"] == [1.0, 1.0]
    refused = config({"refuse": "< harmless: 10 > < helpful: 4 > question"})
    play(refused, tmp_path / "rows.parquet", tmp_path / "b", folders["plain"], uses=uses)
    assert [at for at in range(4) if rows_of(tmp_path / "b")[f"{at}:p04"]["error"] is not None] == [2]


@pytest.mark.long
def test_a_pass_that_dies_is_resumed_and_every_row_is_there_once_as_if_nothing_had_been(
    whole: Path, prompts: Path, folders: Mapping[str, Path], floor: float, tmp_path: Path
) -> None:
    gone, steer = tmp_path / "gone", json.dumps({"floors": {"harmless": floor}})
    fatal = {"die": POISON, "die_once": str(gone), "dead_on_arrival": str(gone)}
    with pytest.raises(RunError, match="dead on arrival"):
        play(config(fatal), prompts, tmp_path, folders["sga"], steer)
    done = set(rows_of(tmp_path)) if list((tmp_path / "episodes").glob("part=0/*.parquet")) else set()
    gone.unlink()
    log = tmp_path / "log"
    counts = play(config({"log": str(log)}), prompts, tmp_path, folders["sga"], steer)
    assert counts.rows == PROMPT_COUNT
    assert len(log.read_text().splitlines()) <= PROMPT_COUNT - 1 - len(done - {f"p{LONG:02d}"})
    tables = [canonical(EpisodeFolder(at / "episodes").table()) for at in (whole, tmp_path)]
    assert tables[0].drop_columns(STEERED.names).equals(tables[1].drop_columns(STEERED.names))
    for name in ("sensed", "asked"):
        for mine, other in zip(tables[0][name].to_pylist(), tables[1][name].to_pylist(), strict=True):
            assert mine == (None if other is None else pytest.approx(other, abs=1e-5))


@pytest.mark.long
def test_candidates_are_sampled_from_what_the_model_reads(
    prompts: Path, folders: Mapping[str, Path], tmp_path: Path
) -> None:
    script = {"refuse": "<harmless_score:0.80> and <helpful_score:0.25>"}
    given = json.dumps({"column": "wish", "floors": {"harmless": 0.8, "helpful": 0.1}})
    counts = play(config(script), prompts, tmp_path, folders["sga"], given, kind="episode")
    refused = {name for name, row in rows_of(tmp_path).items() if "scripted refusal" in (row["error"] or "")}
    floored = {name for name, row in rows_of(tmp_path).items() if row["floored"] == ["harmless"]}
    assert refused == floored
    assert 0 < len(refused) < counts.rows


def test_a_pass_whose_models_read_prompts_as_they_are_has_nothing_in_front(
    prompts: Path, folders: Mapping[str, Path]
) -> None:
    assert upstream_of(config(), [(folders["plain"], Steer())], prompts=prompts, day=None) is None


@pytest.mark.long
def test_a_head_that_is_not_the_models_ends_the_pass_with_one_line(
    prompts: Path, folders: Mapping[str, Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folders["sga"], broken)
    (broken / "sga_head.safetensors").write_bytes(b"no tensors")
    with pytest.raises(InputError, match=r"sga_head\.safetensors: not the head of sga\.json") as error:
        play(config(), prompts, tmp_path, broken)
    assert "\n" not in str(error.value)
    (broken / "sga_head.safetensors").unlink()
    with pytest.raises(InputError, match=r"sga_head\.safetensors is missing"):
        play(config(), prompts, tmp_path, broken)
