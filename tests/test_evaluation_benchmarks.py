"""Benchmarks: their sections, what a play leaves in a row, measures, and what a plan says of them."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spa_ray.config import arm_configs
from spa_ray.config.models import Config
from spa_ray.data.schemas import EPISODES
from spa_ray.engine.scripted import ScriptedTokenizer
from spa_ray.errors import InputError
from spa_ray.evaluation.benchmarks import benchmark_measures
from spa_ray.generation.benchmark import Ask, Benchmark, Plays, benchmark_prompts
from spa_ray.pipeline.plan import make_plan
from spa_ray.pipeline.stage_keys import Known
from spa_ray.pipeline.stages import STAGES
from spa_ray.rollout.chat import Chat
from tests.scripted import scripted_config, scripted_episodes

UTILITY = "spa_ray.microworld.utility:Utility"
HERE = "tests.test_evaluation_benchmarks"


class TwoTurns(Benchmark):
    """Asks, then asks about the answer."""

    questions = 2

    def prompts(self) -> Iterator[Mapping[str, Any]]:
        yield from ({"prompt": f"question {k}?", "right": k} for k in range(3))

    async def play(self, row: Mapping[str, Any], ask: Ask) -> Mapping[str, Any]:
        if row["meta"]["right"] == 2:
            raise KeyError("no such thing")
        first = await ask(row["messages"], max_tokens=5)
        more = [*row["messages"], {"role": "assistant", "content": first.text}, {"role": "user", "content": "Sure?"}]
        second = await ask(more, max_tokens=6, temperature=0.5)
        return {"same": first.text == second.text, "right": row["meta"]["right"]}

    def metrics(self, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        return {"right": [row["result"]["right"] for row in rows]}


class Unwritable(TwoTurns):
    def metrics(self, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        return {"share": float("nan")}


class Empty(TwoTurns):
    def prompts(self) -> Iterator[Mapping[str, Any]]:
        yield from ()


class Bad(TwoTurns):
    def prompts(self) -> Iterator[Mapping[str, Any]]:
        yield {"prompt": "fine"}
        yield {"question": "no prompt"}


def config_with(**section: Any) -> Config:
    section = {"benchmark": f"{HERE}:TwoTurns", **section}
    return scripted_config({}, evaluation={"benchmarks": {"two": section}})


def played(config: Config) -> list[dict[str, Any]]:
    _, engine = scripted_episodes(config)
    section = config.evaluation.benchmarks["two"]
    plays = Plays(section, engine, Chat(ScriptedTokenizer(), model="m"), seed=0)

    async def all_rows() -> list[dict[str, Any]]:
        return [await plays.run(prompt) for prompt in benchmark_prompts(section, where="two")]

    return asyncio.run(all_rows())


def written(rows: list[dict[str, Any]], folder: Path) -> Path:
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows, EPISODES), folder / "part.parquet")
    return folder


def test_a_play_keeps_every_question_that_it_asked_and_its_result() -> None:
    first, second, failed = played(config_with())
    assert first["error"] is second["error"] is None
    assert [(turn["kind"], turn["index"], turn["temperature"]) for turn in first["responses"]] == [
        ("turn", 0, 0.0),
        ("turn", 1, 0.5),
    ]
    assert len(first["responses"][0]["token_ids"]) <= 5
    assert json.loads(second["meta"])["result"]["right"] == 1
    assert second["generated_tokens"] == sum(len(turn["token_ids"]) for turn in second["responses"])
    assert failed["error"] == "internal: KeyError: 'no such thing'"


def test_a_failed_prompt_is_counted_and_in_no_measure(tmp_path: Path) -> None:
    config = config_with()
    measured = benchmark_measures(
        config.evaluation.benchmarks["two"], written(played(config), tmp_path / "e"), where="two"
    )
    assert (measured["n"], measured["errors"], measured["measures"]) == (2, 1, {"right": [0, 1]})
    assert (measured["benchmark"], measured["version"]) == (f"{HERE}:TwoTurns", 1)


def test_a_measure_that_is_no_number_is_refused(tmp_path: Path) -> None:
    config = config_with(benchmark=f"{HERE}:Unwritable")
    with pytest.raises(InputError, match=r"two: the measures of .*:Unwritable are no plain JSON values"):
        benchmark_measures(config.evaluation.benchmarks["two"], written(played(config), tmp_path / "e"), where="two")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("Empty", r"^two: tests\.test_evaluation_benchmarks:Empty: no prompt in it$"),
        ("Bad", r"^two: prompt 2: .*prompt"),
    ],
)
def test_prompts_that_are_none_are_named(name: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        list(benchmark_prompts(config_with(benchmark=f"{HERE}:{name}").evaluation.benchmarks["two"], where="two"))


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({}, "evaluation.benchmarks.two.benchmark: missing; give it a value"),
        ({"benchmark": "json:dumps"}, "'json:dumps' is no benchmark; derive it from spa_ray.Benchmark"),
        ({"benchmark": "no_such_file:B"}, "'no_such_file:B': there is no module no_such_file"),
        ({"benchmark": UTILITY, "splt": "test"}, "evaluation.benchmarks.two.splt: unknown key"),
        ({"benchmark": UTILITY, "limit": 0}, "evaluation.benchmarks.two.limit: must be"),
    ],
)
def test_a_wrong_section_is_told_in_one_line(section: dict[str, Any], told: str) -> None:
    raw = {"model": {"path": "none"}, "evaluation": {"benchmarks": {"two": section}}}
    with pytest.raises(InputError) as error:
        arm_configs(raw, [], where="test", stem="test")
    assert told in str(error.value)


@pytest.mark.parametrize("name", ["a/b", "../up", "a b"])
def test_a_name_that_is_no_files_is_refused(name: str) -> None:
    raw = {"model": {"path": "none"}, "evaluation": {"benchmarks": {name: {"benchmark": UTILITY}}}}
    with pytest.raises(InputError, match="is no name of a benchmark: letters, digits, - and _"):
        arm_configs(raw, [], where="test", stem="test")


def test_limit_takes_the_first_prompts_and_changes_no_key() -> None:
    few, all_ = config_with(limit=1), config_with()
    assert len(list(benchmark_prompts(few.evaluation.benchmarks["two"], where="two"))) == 1
    keys = {STAGES["benchmark"].key(config, {}, Known(benchmark="two")) for config in (few, all_)}
    assert len(keys) == 1  # which prompts there are is an input


def test_the_source_and_the_keys_are_part_of_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "own_benchmark.py"
    file.write_text(f"from {HERE} import TwoTurns\n")

    def key(**section: Any) -> str:
        config = config_with(benchmark="own_benchmark:TwoTurns", **section)
        return STAGES["benchmark"].key(config, {}, Known(benchmark="two"))

    first = key()
    assert key(sampling={"temperature": 0.5}) != first
    file.write_text(f"from {HERE} import TwoTurns\nX = 1\n")
    assert key() != first
    sys.modules.pop("own_benchmark", None)


def test_a_plan_counts_its_questions_for_every_model() -> None:
    raw = {
        "model": {"path": "org/some-8B"},
        "prompts": {"source": "honeset", "limit": 10},
        "arms": {"spa": {}, "sft": {"train.method": "sft"}},
        "evaluation": {"benchmarks": {"two": {"benchmark": f"{HERE}:TwoTurns"}}},
    }
    plan = make_plan(arm_configs(raw, [], where="test", stem="test"))
    found = [stage for stage in plan["stages"] if stage["stage"] == "benchmark:two"]
    assert [stage["arms"] for stage in found] == [["vanilla"], ["spa"], ["sft"]]
    assert [(stage["rows"], stage["requests"]) for stage in found] == [(3, 6)] * 3


@pytest.mark.engine
@pytest.mark.parametrize("held_out", [True, False], ids=["with_prompts", "alone"])
def test_spa_eval_plays_them_too_and_a_second_call_plays_nothing(
    tmp_path: Path, tiny_model: Path, ray_session: None, held_out: bool
) -> None:
    from spa_ray import evaluate

    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    raw = {
        "model": {"path": str(tiny_model), "engine": "spa_ray.engine.scripted:ScriptedEngine"},
        "evaluation": {
            **({"prompts": {"source": str(tmp_path / "p.jsonl")}} if held_out else {}),
            "judge": "self",
            "benchmarks": {"two": {"benchmark": f"{HERE}:TwoTurns", "limit": 2}},
        },
    }
    out = tmp_path / "out"
    first = evaluate(tiny_model, config=raw, out=out)
    assert first["benchmarks"]["two"]["measures"] == {"right": [0, 1]}
    assert bool(first["metrics"]) == held_out
    stamp = (out / "benchmarks" / "two" / "stage.json").stat().st_mtime_ns
    assert json.loads((out / "benchmarks" / "two.json").read_text())["arms"]["model"]["n"] == 2
    assert evaluate(tiny_model, config=raw, out=out) == first
    assert (out / "benchmarks" / "two" / "stage.json").stat().st_mtime_ns == stamp
