"""The generation pass on real Ray Data, scripted engine: same rows for any layout, whatever dies and resumes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spa_ray.config.models import Config
from spa_ray.data.episodes import EpisodeFolder, part_folder
from spa_ray.data.schemas import EPISODES, PROMPTS, canonical, objectives_of, ranges_of
from spa_ray.errors import InputError, RunError
from spa_ray.generation.ledger import SUSPECT_TRIES
from spa_ray.generation.setup import Task
from spa_ray.generation.stage import PassCounts, count_rows, generate
from spa_ray.generation.usage import Spent
from spa_ray.storage.files import parquet_dataset
from tests.scripted import WEIGHTS, scripted_config, scripted_episodes

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("ray_session")]

PROMPT_COUNT = 30

POISON = "question 17?"  # the text of one prompt


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stage") / "prompts.parquet"
    rows = [
        {"prompt_id": f"p{k:02d}", "messages": [{"role": "user", "content": f"question {k}?"}], "meta": "{}"}
        for k in range(PROMPT_COUNT)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=PROMPTS), path)
    return path


def config(
    script: Mapping[str, Any] | None = None, *, rows: int = 4, engines: int = 1, concurrency: int = 8, **generation: Any
) -> Config:
    return scripted_config(
        {"jitter": 0.02, **(script or {})},
        generation={"rows_per_block": rows, **generation},
        resources={"engines": {"min": engines, "max": engines}, "concurrency": concurrency},
    )


def play(config: Config, prompts: Path, folder: Path, **changes: Any) -> PassCounts:
    options: dict[str, Any] = {
        "prompts": prompts,
        "out": folder / "episodes",
        "checkpoint": folder / "checkpoint",
        "model": WEIGHTS,
        "config_hash": "h",
    }
    return generate(config, changes.pop("task", Task()), **{**options, **changes})


def episodes(folder: Path, name: str = "episodes") -> pa.Table:
    return EpisodeFolder(folder / name).table()


def bytes_of(folder: Path) -> bytes:
    """The pass's canonical bytes, as Arrow IPC."""
    table = canonical(episodes(folder).replace_schema_metadata(None))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def log_of(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


@dataclass(frozen=True)
class Whole:
    """One engine, all prompts in one block, nothing goes wrong."""

    folder: Path
    counts: PassCounts
    told: list[Mapping[str, Any]]

    @property
    def asked(self) -> list[str]:
        return log_of(self.folder / "log")


@pytest.fixture(scope="module")
def whole(prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    told: list[Mapping[str, Any]] = []
    counts = play(config({"log": str(folder / "log")}, rows=64), prompts, folder, on_progress=told.append)
    return Whole(folder, counts, told)


def test_a_pass_writes_one_row_a_prompt_with_the_runs_facts_in_its_metadata(whole: Whole) -> None:
    assert (whole.counts.rows, whole.counts.errors, whole.counts.first_error) == (PROMPT_COUNT, 0, None)
    table = episodes(whole.folder)
    assert table.schema.equals(EPISODES, check_metadata=False)
    assert sorted(table["prompt_id"].to_pylist()) == [f"p{k:02d}" for k in range(PROMPT_COUNT)]
    assert objectives_of(table.schema) == ["harmless", "helpful"]
    assert ranges_of(table.schema) == [(1, 10)] * 2
    assert table.schema.metadata[b"config_hash"] == b"h"
    assert table["error"].null_count == PROMPT_COUNT


def test_every_request_is_asked_once(whole: Whole) -> None:
    assert len(whole.asked) == len(set(whole.asked)) >= PROMPT_COUNT * (5 + 10 + 1 + 2)


def test_progress_never_goes_back_and_ends_at_the_total(whole: Whole) -> None:
    assert {update["total"] for update in whole.told} == {PROMPT_COUNT}
    done = [update["done"] for update in whole.told]
    assert done == sorted(done)
    assert done[-1] == PROMPT_COUNT


def test_the_pools_and_the_blocks_sizes_change_no_byte(whole: Whole, prompts: Path, tmp_path: Path) -> None:
    play(config(rows=3, engines=2, concurrency=2), prompts, tmp_path)
    assert bytes_of(tmp_path) == bytes_of(whole.folder)


def test_an_engine_that_dies_once_is_replaced_within_the_pass(whole: Whole, prompts: Path, tmp_path: Path) -> None:
    script = {"die": POISON, "die_once": str(tmp_path / "died")}
    assert play(config(script), prompts, tmp_path).errors == 0
    assert (tmp_path / "died").exists()
    assert bytes_of(tmp_path) == bytes_of(whole.folder)


def test_a_prompt_that_no_engine_survives_is_recorded_and_every_other_row_is_as_if_it_had_not_been_there(
    whole: Whole, prompts: Path, tmp_path: Path
) -> None:
    counts = play(config({"die": POISON}, rows=8, concurrency=16, max_attempts=1), prompts, tmp_path)
    assert (counts.errors, counts.engine_deaths) == (1, SUSPECT_TRIES)
    assert counts.first_error == f"engine_died: {SUSPECT_TRIES} engines died with this prompt in them"
    poisoned = {row["prompt_id"]: row for row in episodes(tmp_path).to_pylist()}
    fine = {row["prompt_id"]: row for row in episodes(whole.folder).to_pylist()}
    assert {key for key in fine if poisoned[key] != fine[key]} == {"p17"}


@pytest.mark.long
def test_an_engine_that_never_answers_ends_the_pass_and_the_next_one_goes_on(
    whole: Whole, prompts: Path, tmp_path: Path
) -> None:
    gone = tmp_path / "gone"
    gone.touch()
    with pytest.raises(
        RunError, match=r"an engine started \d+ times without answering one prompt.*dead on arrival.*log /"
    ):
        play(config({"dead_on_arrival": str(gone)}), prompts, tmp_path)
    gone.unlink()
    log = tmp_path / "log"
    assert play(config({"log": str(log)}), prompts, tmp_path).rows == PROMPT_COUNT
    assert bytes_of(tmp_path) == bytes_of(whole.folder)
    asked = len(log_of(log))
    assert play(config({"log": str(log)}), prompts, tmp_path).rows == PROMPT_COUNT  # everything is there already
    assert len(log_of(log)) == asked


def test_a_stalled_engine_is_replaced_within_its_deadline(whole: Whole, prompts: Path, tmp_path: Path) -> None:
    script = {"hang": POISON, "hang_once": str(tmp_path / "hung")}
    counts = play(config(script, stall_timeout_s=2), prompts, tmp_path)
    assert (counts.errors, counts.engine_deaths) == (0, 1)
    assert bytes_of(tmp_path) == bytes_of(whole.folder)


@pytest.mark.long
@pytest.mark.parametrize("shard_rows", [PROMPT_COUNT, 18])  # the second puts the two failures into different shards
def test_failures_that_may_pass_are_asked_again_in_parts_and_readers_take_the_last(
    prompts: Path, tmp_path: Path, shard_rows: int
) -> None:
    table, told = pq.read_table(prompts), [{} for _ in range(PROMPT_COUNT)]
    told[17], told[18] = {"never": True}, {"once": str(tmp_path / "failed")}
    meta = pa.array([json.dumps(one) for one in told])
    pq.write_table(table.set_column(2, "meta", meta), tmp_path / "prompts.parquet")
    task = Task(kind="answer")
    failing = config(max_attempts=2)
    scoring = failing.scoring.model_copy(update={"judge": "tests.scripted:flaky_judge"})
    failing = failing.model_copy(update={"scoring": scoring})
    counts = play(failing, tmp_path / "prompts.parquet", tmp_path, task=task, shard_rows=shard_rows)
    assert (counts.rows, counts.retried, counts.errors) == (PROMPT_COUNT, 2, 1)
    parts = {part: parquet_dataset(part_folder(tmp_path / "episodes", part)).to_table() for part in (0, 1)}
    assert sorted(parts[1]["prompt_id"].to_pylist()) == ["p17", "p18"]
    assert set(parts[1]["attempt"].to_pylist()) == {1}
    current = {row["prompt_id"]: row for row in EpisodeFolder(tmp_path / "episodes").table().to_pylist()}
    assert len(current) == PROMPT_COUNT
    assert current["p18"]["error"] is None
    assert current["p17"]["error"].startswith("internal: RuntimeError")
    assert not part_folder(tmp_path / "episodes", 2).exists()


@pytest.mark.long
def test_prompts_too_many_for_one_pass_run_in_shards_and_those_that_are_done_are_not_asked_again(
    whole: Whole, prompts: Path, tmp_path: Path
) -> None:
    gone, log = tmp_path / "gone", tmp_path / "log"
    fatal = {"die": POISON, "die_once": str(gone), "dead_on_arrival": str(gone)}
    with pytest.raises(RunError, match="dead on arrival"):  # question 17 is in the second of three shards
        play(config(fatal), prompts, tmp_path, shard_rows=12)
    shards = [tmp_path / "checkpoint" / "part=0" / f"shard={k}" for k in range(3)]
    assert set(parquet_dataset(shards[0]).to_table()["prompt_id"].to_pylist()) == {f"p{k:02d}" for k in range(12)}
    assert not shards[2].exists()
    gone.unlink()
    assert play(config({"log": str(log)}), prompts, tmp_path, shard_rows=12).rows == PROMPT_COUNT
    assert bytes_of(tmp_path) == bytes_of(whole.folder)
    assert [parquet_dataset(shard).count_rows() for shard in shards] == [12, 12, 6]
    assert len(log_of(log)) <= 18 * (18 + 5)  # of 18 prompts; a repeated candidate is drawn once more


def test_rows_that_fail_are_recorded_and_counted_and_too_many_of_them_end_the_run(
    whole: Whole, prompts: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with pytest.raises(RunError, match=r"1 of 30 prompts failed.*max_error_fraction 0\.01.*scripted refusal"):
        play(config({"refuse": POISON, "log": str(log)}, max_error_fraction=0.01), prompts, tmp_path)
    counts = count_rows(tmp_path / "episodes", Spent())
    assert (counts.rows, counts.errors) == (PROMPT_COUNT, 1)
    again = play(config({"refuse": POISON}, max_error_fraction=0.1), prompts, tmp_path)  # asks nothing any more
    assert again.requests == len(log_of(log)), "the call that ended with an error counts"
    failed = {row["prompt_id"]: row for row in episodes(tmp_path).to_pylist()}
    fine = {row["prompt_id"]: row for row in episodes(whole.folder).to_pylist()}
    assert {key for key, row in failed.items() if row["error"]} == {"p17"}
    assert failed["p17"]["responses"] == []
    assert all(failed[key] == fine[key] for key in fine if key != "p17")


def test_a_users_mistake_that_only_the_actor_can_see_reaches_the_driver_as_one(prompts: Path, tmp_path: Path) -> None:
    base = config()
    wrong = base.model_copy(update={"scoring": base.scoring.model_copy(update={"mode": "expected"})})
    with pytest.raises(InputError, match="one-token labels") as caught:
        play(wrong, prompts, tmp_path)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "episodes").rglob("*.parquet"))


@pytest.mark.long
def test_rows_may_name_their_model_and_a_second_pass_labels_given_answers(prompts: Path, tmp_path: Path) -> None:
    table, models = pq.read_table(prompts), ("first", "second")
    for model in models:
        (tmp_path / model).mkdir()
    parts = []
    for model in models:
        ids = pa.array([f"{model}-{name}" for name in table["prompt_id"].to_pylist()])
        part = table.set_column(0, "prompt_id", ids)
        parts.append(part.append_column("model", pa.array([str(tmp_path / model)] * len(part))))
    pq.write_table(pa.concat_tables(parts), tmp_path / "rows.parquet")
    task = Task(kind="answer", scored=False)
    play(config(), tmp_path / "rows.parquet", tmp_path / "answers", task=task)
    play(config(), part_folder(tmp_path / "answers" / "episodes", 0), tmp_path / "scored", task=Task(kind="score"))

    answers = {row["prompt_id"]: row for row in episodes(tmp_path / "answers").to_pylist()}
    assert len(answers) == len(models) * PROMPT_COUNT
    for model, part in zip(models, parts, strict=True):
        alone, engine = scripted_episodes(config(), task)
        asyncio.run(engine.load_weights(Path(model)))
        for row in part.drop_columns(["model"]).to_pylist():
            assert answers[row["prompt_id"]] == asyncio.run(alone.run(row))
    for row in episodes(tmp_path / "scored").to_pylist():
        (response,), (answer,) = row["responses"], answers[row["prompt_id"]]["responses"]
        assert response["text"] == answer["text"]
        assert all(1 <= score <= 10 for score in response["scores"])
        assert row["scores"] == [response["scores"]]


def test_the_last_iterations_refined_answers_join_the_candidates(whole: Whole, prompts: Path, tmp_path: Path) -> None:
    play(config(), prompts, tmp_path, task=Task(iteration=2), earlier=whole.folder / "episodes")
    refined = {row["prompt_id"]: row["responses"][5] for row in episodes(whole.folder).to_pylist()}
    for row in episodes(tmp_path).to_pylist():
        assert [r["kind"] for r in row["responses"]] == [*["candidate"] * 6, "refined"]
        for key in ("text", "token_ids", "finish_reason"):
            assert row["responses"][5][key] == refined[row["prompt_id"]][key]


def test_the_drivers_own_checkpoint_setting_is_left_as_it_was(whole: Whole) -> None:
    from ray.data import DataContext

    assert DataContext.get_current().checkpoint_config is None
