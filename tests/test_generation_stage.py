"""The generation pass on real Ray Data, scripted engine: same rows for any layout, whatever dies and resumes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pds
import pyarrow.parquet as pq
import pytest

from spa_ray.config.models import Config
from spa_ray.data.schemas import EPISODES, PROMPTS, canonical, objectives_of
from spa_ray.errors import InputError, RunError
from spa_ray.generation.setup import Task
from spa_ray.generation.stage import PassCounts, generate
from tests.scripted import scripted_config

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("ray_session")]

PROMPT_COUNT = 30
WEIGHTS = Path("weights")
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
    return pds.dataset(folder / name, format="parquet").to_table()


def bytes_of(folder: Path) -> bytes:
    """The pass's canonical bytes, as Arrow IPC."""
    table = canonical(episodes(folder).replace_schema_metadata(None))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def log_of(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


@pytest.fixture(scope="module")
def whole(prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One engine, all prompts in one block, nothing goes wrong."""
    folder = tmp_path_factory.mktemp("whole")
    counts = play(config({"log": str(folder / "log")}, rows=64), prompts, folder)
    assert (counts.rows, counts.errors, counts.first_error) == (PROMPT_COUNT, 0, None)
    return folder


def test_a_pass_writes_one_row_a_prompt_with_the_runs_facts_in_its_metadata(whole: Path) -> None:
    table = episodes(whole)
    assert table.schema.equals(EPISODES, check_metadata=False)
    assert sorted(table["prompt_id"].to_pylist()) == [f"p{k:02d}" for k in range(PROMPT_COUNT)]
    assert objectives_of(table.schema) == ["harmless", "helpful"]
    assert table.schema.metadata[b"config_hash"] == b"h"
    assert table["error"].null_count == PROMPT_COUNT


def test_every_request_is_asked_once(whole: Path) -> None:
    asked = log_of(whole / "log")
    assert len(asked) == len(set(asked)) >= PROMPT_COUNT * (5 + 10 + 1 + 2)


@pytest.mark.parametrize(("rows", "engines", "concurrency"), [(4, 1, 8), (3, 2, 2)])
def test_the_pools_and_the_blocks_sizes_change_no_byte(
    whole: Path, prompts: Path, tmp_path: Path, rows: int, engines: int, concurrency: int
) -> None:
    counts = play(config(rows=rows, engines=engines, concurrency=concurrency), prompts, tmp_path)
    assert counts.rows == PROMPT_COUNT
    assert bytes_of(tmp_path) == bytes_of(whole)


def test_an_engine_that_dies_once_is_replaced_within_the_pass(whole: Path, prompts: Path, tmp_path: Path) -> None:
    script = {"die": POISON, "die_once": str(tmp_path / "died")}
    assert play(config(script), prompts, tmp_path).errors == 0
    assert (tmp_path / "died").exists()
    assert bytes_of(tmp_path) == bytes_of(whole)


def test_an_engine_that_always_dies_ends_the_pass_and_the_next_pass_asks_only_what_is_left(
    whole: Path, prompts: Path, tmp_path: Path
) -> None:
    started = time.monotonic()
    with pytest.raises(RunError, match=r"generate: .*the engine is dead") as caught:
        play(config({"die": POISON}, rows=2, concurrency=2, max_attempts=2), prompts, tmp_path)
    assert time.monotonic() - started < 120
    assert "\n" not in str(caught.value)
    done = set(pds.dataset(tmp_path / "checkpoint", format="parquet").to_table()["prompt_id"].to_pylist())
    assert 0 < len(done) < PROMPT_COUNT

    log = tmp_path / "log"
    counts = play(config({"log": str(log)}, rows=5), prompts, tmp_path)
    assert counts.rows == PROMPT_COUNT
    assert bytes_of(tmp_path) == bytes_of(whole)
    of_a_prompt = len(log_of(whole / "log")) / PROMPT_COUNT
    assert len(log_of(log)) == pytest.approx(of_a_prompt * (PROMPT_COUNT - len(done)), rel=0.1)

    before = len(log_of(log))
    assert play(config({"log": str(log)}), prompts, tmp_path).rows == PROMPT_COUNT  # all is there already
    assert len(log_of(log)) == before


def test_rows_that_fail_are_recorded_and_counted_and_the_others_stay_as_they_were(
    whole: Path, prompts: Path, tmp_path: Path
) -> None:
    counts = play(config({"refuse": POISON}), prompts, tmp_path)
    assert (counts.rows, counts.errors) == (PROMPT_COUNT, 1)
    assert counts.first_error is not None
    failed = {row["prompt_id"]: row for row in episodes(tmp_path).to_pylist()}
    fine = {row["prompt_id"]: row for row in episodes(whole).to_pylist()}
    assert {key for key, row in failed.items() if row["error"]} == {"p17"}
    assert failed["p17"]["responses"] == []
    assert all(failed[key] == fine[key] for key in fine if key != "p17")


def test_too_many_failed_rows_end_the_pass_with_the_first_error(prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"30 of 30 prompts failed.*scripted refusal"):
        play(config({"refuse": "question"}), prompts, tmp_path)
    assert episodes(tmp_path).num_rows == PROMPT_COUNT


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scoring": {"mode": "expected"}}, "one-token labels"),
        ({"model": {"engine": "spa_ray.engine.scripted:absent"}}, "has no 'absent'"),
    ],
)
def test_a_users_mistake_that_only_the_actor_can_see_reaches_the_driver_as_one(
    prompts: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    base = config()
    wrong = base.model_copy(
        update={key: getattr(base, key).model_copy(update=change) for key, change in changes.items()}
    )
    with pytest.raises(InputError, match=message) as caught:
        play(wrong, prompts, tmp_path)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "episodes").glob("*.parquet"))


def test_rows_may_name_their_model_and_one_engine_serves_them_in_turn(prompts: Path, tmp_path: Path) -> None:
    table = pq.read_table(prompts)
    parts = []
    for model in ("first", "second"):
        ids = pa.array([f"{model}-{name}" for name in table["prompt_id"].to_pylist()])
        part = table.set_column(0, "prompt_id", ids)
        parts.append(part.append_column("model", pa.array([model] * len(part))))
    pq.write_table(pa.concat_tables(parts), tmp_path / "rows.parquet")
    play(config(), tmp_path / "rows.parquet", tmp_path / "both", task=Task(kind="answer", judge="none"))

    pq.write_table(parts[1].drop_columns(["model"]), tmp_path / "second.parquet")
    alone = Path("second")
    play(config(), tmp_path / "second.parquet", tmp_path / "alone", task=Task(kind="answer", judge="none"), model=alone)
    both = {row["prompt_id"]: row for row in episodes(tmp_path / "both").to_pylist()}
    assert len(both) == 2 * PROMPT_COUNT
    for row in episodes(tmp_path / "alone").to_pylist():
        assert both[row["prompt_id"]] == row


def test_given_answers_are_scored_by_a_pass_of_their_own(prompts: Path, tmp_path: Path) -> None:
    play(config(), prompts, tmp_path / "answers", task=Task(kind="answer", judge="none"))
    play(config(), tmp_path / "answers" / "episodes", tmp_path / "scored", task=Task(kind="score"))
    answers = {row["prompt_id"]: row["responses"] for row in episodes(tmp_path / "answers").to_pylist()}
    for row in episodes(tmp_path / "scored").to_pylist():
        (response,), (answer,) = row["responses"], answers[row["prompt_id"]]
        assert answer["scores"] == []
        assert response["text"] == answer["text"]
        assert all(1 <= score <= 10 for score in response["scores"])
        assert row["scores"] == [response["scores"]]


def test_the_last_iterations_refined_answers_join_the_candidates(whole: Path, prompts: Path, tmp_path: Path) -> None:
    play(config(), prompts, tmp_path, task=Task(iteration=2), earlier=whole / "episodes")
    refined = {row["prompt_id"]: row["responses"][5]["text"] for row in episodes(whole).to_pylist()}
    for row in episodes(tmp_path).to_pylist():
        assert [r["kind"] for r in row["responses"]] == [*["candidate"] * 6, "refined"]
        assert row["responses"][5]["text"] == refined[row["prompt_id"]]


def test_progress_is_told_and_ends_at_the_total(prompts: Path, tmp_path: Path) -> None:
    told: list[Mapping[str, Any]] = []
    on_progress: Callable[[Mapping[str, Any]], None] = told.append
    play(config({"jitter": 1.0}, concurrency=64), prompts, tmp_path, on_progress=on_progress)
    assert told
    assert all(update["total"] == PROMPT_COUNT for update in told)
    assert [update["done"] for update in told] == sorted(update["done"] for update in told)
    assert told[-1]["done"] == PROMPT_COUNT


def test_the_drivers_own_checkpoint_setting_is_left_as_it_was() -> None:
    from ray.data import DataContext

    assert DataContext.get_current().checkpoint_config is None
