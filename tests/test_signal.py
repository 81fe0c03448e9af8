"""The health of the judge's signal: its numbers; each advice in a sample that calls for it and one that does not."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spa_ray.config import arm_configs
from spa_ray.config.models import Config
from spa_ray.config.training import Train
from spa_ray.engine.cpu_dtype import with_dtype
from spa_ray.errors import InputError
from spa_ray.evaluation.signal import Sample, judge_signal, optimizer_steps, wilson
from spa_ray.pipeline.preview import sharing
from spa_ray.pipeline.progress import Progress
from spa_ray.pipeline.recipe import levels
from spa_ray.pipeline.run import Pipeline
from spa_ray.pipeline.signal import SAMPLE, SignalWatch, read_sample, signal_lines
from spa_ray.storage.files import read_json
from spa_ray.training.batches import order_pairs
from tests.preferences_tables import Row, make_config, make_episodes, make_row
from tests.scripted import WEIGHTS, prompt, scripted_config

RUN = 400  # prompts of the run that a sample stands for
OPEN = {"denoise__consistency": "off", "denoise__informativeness": False}


def sound(number: int) -> Row:
    """A prompt whose answers differ on both objectives, and whose refined answer is best."""
    row = make_row([[3, 6], [5, 3], [6, 5], [4, 4], [2, 7]], [8, 9], prompt_id=f"p{number}")
    for response in row["responses"]:
        response["score_status"] = ["ok", "ok"]
        response["finish_reason"] = "stop"
    return row


def healthy() -> list[Row]:
    return [sound(number) for number in range(16)]


def advice(rows: list[Row], prompts: int = RUN, **overrides: Any) -> dict[str, dict[str, Any]]:
    config = make_config(**overrides)
    signal = judge_signal(make_episodes(rows, config), config, prompts=prompts)
    json.dumps(signal, allow_nan=False)
    return {found["code"]: found for found in signal["advice"]}


def changed(change: Callable[[Row, int], None]) -> list[Row]:
    """Healthy rows with every response, and its place, changed."""
    rows = healthy()
    for row in rows:
        for at, response in enumerate(row["responses"]):
            change(response, at)
        row["scores"] = [response["scores"] for response in row["responses"]]
    return rows


def scores(by_place: Callable[[int], list[float | None]]) -> list[Row]:
    return changed(lambda response, at: response.update(scores=by_place(at)))


def test_a_healthy_sample_calls_for_nothing() -> None:
    assert advice(healthy(), denoise__tau_quantile=None) == {}


def test_a_mean_of_parts_is_of_the_scales_parts_where_a_sample_says_no_ranges() -> None:
    config = make_config(**OPEN, pairs__order="mean")
    signal = judge_signal(make_episodes(healthy(), config), config, prompts=RUN)
    assert signal["pairs"] == [RUN, RUN, RUN]  # one per prompt
    unbounded = {"scoring__judge": {"kind": "reward", "path": "r"}}
    with pytest.raises(InputError, match="this judge's are not known"):
        make_config(**OPEN, **unbounded, pairs__order="mean")
    given = {"harmless": (1, 10), "helpful": (1, 10)}
    make_config(**OPEN, **unbounded, pairs__order="mean", episodes__ranges=given)


# --- advice ---------------------------------------------------------------------------------------------------------


def test_ratings_at_an_end_of_the_scale() -> None:
    top = scores(lambda at: [10 if at != 1 else 9, [3, 6, 5, 4, 7, 9][at]])
    found = advice(top)
    assert found["saturated_high"]["change"] == "scoring.mode=expected"
    assert "83% of the ratings are 10" in found["saturated_high"]["text"]
    assert "saturated_low" in advice(scores(lambda at: [1 if at != 1 else 9, [3, 6, 5, 4, 7, 9][at]]))


def test_a_judge_that_says_the_same_to_everything() -> None:
    found = advice(scores(lambda at: [7, 7]))
    assert {"constant", "all_tie", "few_pairs"} <= set(found)
    assert "saturated_high" not in found
    assert found["constant"]["change"] == "scoring.mode=expected"
    assert (
        advice(scores(lambda at: [7, 7]), scoring__mode="expected", scoring__scale=[1, 9])["constant"]["change"] is None
    )


@pytest.mark.parametrize(("spread", "noisy"), [(0.1, False), (3.0, True)])
def test_draws_that_scatter_more_than_the_answers(spread: float, noisy: bool) -> None:
    def draw(response: Row, at: int) -> None:
        middle = [3, 5, 6, 4, 2, 8][at]
        response["score_draws"] = [[middle - spread, middle + spread], [middle, middle]]

    rows = changed(draw)
    found = advice(rows, scoring__draws=2)
    assert ("noisy_judge" in found) == noisy
    if noisy:
        assert found["noisy_judge"]["change"] in ("scoring.mode=expected", "scoring.draws=16") or found["noisy_judge"][
            "change"
        ].startswith("scoring.draws=")
    assert "noisy_judge" not in advice(healthy())  # with one draw nothing is known


@pytest.mark.parametrize("judge", ["mine:judge", {"kind": "reward", "path": "r"}])
def test_no_change_of_prompts_is_advised_for_a_judge_that_reads_none(judge: Any) -> None:
    same = advice(scores(lambda at: [7, 7]), scoring__judge=judge)
    assert {"constant", "all_tie"} <= set(same)
    fails = changed(lambda response, at: response.update(scores=[None, 5], score_status=["parse_failure: x", "ok"]))
    found = advice(fails, scoring__judge=judge, scoring__mode="regex")
    assert [same["constant"]["change"], same["all_tie"]["change"], found["parse_failures"]["change"]] == [None] * 3


@pytest.mark.parametrize(("mass", "warned"), [(0.5, False), (0.51, True)])
def test_mass_off_the_scale(mass: float, warned: bool) -> None:
    rows = changed(lambda response, at: response.update(off_scale=[mass, 0.0]))
    found = advice(rows)
    assert ("off_scale" in found) == warned
    if warned:
        assert found["off_scale"]["text"].startswith("harmless: ")


def test_judgements_that_cannot_be_read() -> None:
    def fail(response: Row, at: int) -> None:
        if at == 0:
            response.update(scores=[None, 5], score_status=["parse_failure: x", "ok"])

    found = advice(changed(fail), scoring__mode="regex")
    assert found["parse_failures"]["change"] == "scoring.mode=choice"
    assert "parse_failures" not in advice(healthy(), scoring__mode="regex")


def test_a_consistency_rule_that_keeps_nothing_and_what_the_milder_one_gives() -> None:
    rows = scores(lambda at: [[8, 5, 6, 4, 2, 8][at], [6, 3, 5, 4, 7, 9][at]])
    found = advice(rows, denoise__informativeness=False)["inconsistent"]
    assert found["change"] == "denoise.consistency=primary_ge"
    milder = make_config(denoise__consistency="primary_ge", denoise__informativeness=False)
    pairs = judge_signal(make_episodes(rows, milder), milder, prompts=RUN)["pairs"][0]
    assert f"about {round(pairs)} pairs are to be expected, now 0" in found["text"]
    worse = scores(lambda at: [[8, 5, 6, 4, 2, 3][at], [6, 3, 5, 4, 7, 2][at]])
    assert advice(worse, denoise__informativeness=False)["inconsistent"]["change"] == "denoise.consistency=off"
    assert "inconsistent" not in advice(healthy())


def test_an_informativeness_filter_that_keeps_nothing() -> None:
    flat = scores(lambda at: [[5, 5, 5, 5, 5, 8][at], [6, 3, 5, 4, 7, 9][at]])
    assert advice(flat)["uninformative"]["change"] == "denoise.informativeness=false"
    assert "uninformative" not in advice(flat, denoise__informativeness=False)
    assert "uninformative" not in advice(healthy(), denoise__tau_quantile=None)


def test_a_delta_above_what_answers_differ_by() -> None:
    close = scores(lambda at: [5 + at / 10, 5 + at / 20])
    found = advice(close, **OPEN)
    assert found["delta"]["change"] == "pairs.delta=auto"
    auto = judge_signal(make_episodes(close, make_config()), make_config(pairs__delta="auto", **OPEN), prompts=RUN)
    assert auto["pairs"][0] > 0
    assert f"now {0}" in found["delta"]["text"]
    assert "delta" not in advice(close, pairs__delta="auto", **OPEN)
    assert "delta" not in advice(healthy(), **OPEN)


def test_too_few_pairs_and_steps() -> None:
    found = advice(healthy()[:4], prompts=4, denoise__tau_quantile=None)
    assert "64 need about" in found["few_pairs"]["text"]
    assert "few_steps" in found
    assert found["few_steps"]["change"].startswith("train.batch_size=")
    assert not {"few_pairs", "few_steps"} & set(advice(healthy(), denoise__tau_quantile=None))


def test_answers_that_were_cut() -> None:
    rows = changed(lambda response, at: response.update(finish_reason="length" if at < 2 else "stop"))
    found = advice(rows, denoise__tau_quantile=None, sampling__max_tokens=100)
    assert found["truncated"]["change"] == "sampling.max_tokens=200"
    both = [make_config(denoise__tau_quantile=None, pairs__truncated=rule) for rule in ("allow", "reject")]
    counts = [Sample.of(make_episodes(rows, c), c, RUN).outcome.pairs.num_rows for c in both]
    assert counts[0] > counts[1]
    assert f"drops {counts[0] - counts[1]} pairs" in found["truncated"]["text"]
    assert "truncated" not in advice(healthy())


def test_what_answers_look_like() -> None:
    alike = changed(lambda response, at: response.update(text="the same" if at < 4 else "another"))
    assert advice(alike)["duplicates"]["change"] == "sampling.temperature=1.5"
    assert advice(alike, sampling__resample_duplicates=False)["duplicates"]["change"].endswith("=true")
    declining = changed(lambda response, at: response.update(text=f"I cannot help with that. {at}"))
    assert "refusals" in advice(declining)
    looping = changed(lambda response, at: response.update(token_ids=[5 + at] * 20))
    assert advice(looping)["repetitive"]["change"] == "sampling.repetition_penalty=1.1"
    assert "empty" in advice(changed(lambda response, at: response.update(text=" " if at < 2 else f"a {at}")))
    assert not {"duplicates", "refusals", "repetitive", "empty"} & set(advice(healthy()))


def test_pairs_without_weight() -> None:
    trade = scores(lambda at: [3 + at, 9 - at])
    assert advice(trade, **OPEN)["zero_weight"]["change"] == "train.gap=l1"
    assert "zero_weight" not in advice(trade, train__gap="l1", **OPEN)
    assert "zero_weight" not in advice(healthy(), **OPEN)


def test_prompts_that_failed() -> None:
    rows = healthy()
    for row in rows[:4]:
        row.update(responses=[], scores=[], error="refused: no")
    assert "the first: refused: no" in advice(rows)["errors"]["text"]
    assert "errors" not in advice(healthy())
    for row in rows:
        row.update(responses=[], scores=[], error="refused: no")
    assert set(advice(rows)) == {"errors", "few_pairs"}


# --- numbers --------------------------------------------------------------------------------------------------------


def test_the_object_is_the_designs() -> None:
    config = make_config(denoise__tau_quantile=None)
    signal = judge_signal(make_episodes(healthy(), config), config, prompts=RUN)
    assert list(signal) == ["prompts", "objectives", "all_tie", "kept", "pairs", "steps", "advice"]
    assert list(signal["objectives"]) == ["harmless", "helpful"]
    found = signal["objectives"]["harmless"]
    assert list(found) == [
        "histogram", "at_low", "at_high", "within_var", "between_var", "off_scale", "parse_failures",
    ]  # fmt: skip
    assert sum(found["histogram"].values()) == 16 * 6
    assert found["between_var"] == pytest.approx(np.var([3, 5, 6, 4, 2, 8], ddof=1), abs=1e-4)
    assert (found["within_var"], found["off_scale"]) == (None, None)
    assert signal["kept"]["all"][0] == 1
    assert signal["pairs"] == [RUN * 15 - RUN * sum_below(2)] * 3
    assert signal["steps"][0] == optimizer_steps(round(signal["pairs"][0]), config.train)
    assert "optimizer steps" in "\n".join(signal_lines(signal))


def sum_below(delta: float) -> int:
    points = [r["scores"] for r in sound(0)["responses"]]
    return sum(
        abs(a[0] - b[0]) + abs(a[1] - b[1]) < delta for at, a in enumerate(points) for b in points[:at]
    )  # fmt: skip


def test_the_whole_run_needs_no_estimate_and_nothing_found_is_not_nothing_there() -> None:
    rows = healthy()
    for row in rows[::2]:
        row.update(responses=[], scores=[], error="refused: no")
    config = make_config(denoise__tau_quantile=None)
    table = make_episodes(rows, config)
    mean, low, high = judge_signal(table, config, prompts=16)["pairs"]
    assert mean == low == high > 0
    mean, low, high = judge_signal(table, config, prompts=RUN)["pairs"]
    assert low < mean < high
    none = make_config(pairs__delta=100)
    mean, low, high = judge_signal(make_episodes(healthy(), none), none, prompts=RUN)["pairs"]
    assert mean == low == 0 < high


def test_steps_are_those_that_training_takes() -> None:
    draw = random.Random(0)
    for _ in range(200):
        train = Train(
            batch_size=draw.choice([1, 8, 32]),
            epochs=draw.choice([0.3, 1, 1.5, 2, 2.7]),
            max_steps=draw.choice([None, None, 7]),
            max_pairs=draw.choice([None, None, 20]),
        )
        n = draw.randint(1, 200)
        order = order_pairs(
            min(n, train.max_pairs or n), seed=0, batch_size=train.batch_size, epochs=train.epochs,
            max_steps=train.max_steps,
        )  # fmt: skip
        assert optimizer_steps(n, train) == len(order.epoch), (n, train)
    assert optimizer_steps(0, Train()) == 0


def test_wilsons_interval() -> None:
    assert wilson(0, 0) == [0, 0, 1]
    assert wilson(5, 10) == [0.5, 0.2366, 0.7634]
    assert wilson(0, 10)[:2] == [0, 0]
    assert wilson(10, 10)[2] == 1


# --- arms -----------------------------------------------------------------------------------------------------------


def test_every_arm_that_uses_the_episodes_has_its_own_pairs_and_steps() -> None:
    first = make_config(denoise__tau_quantile=None)
    arms = {
        "spa": first,
        "twin": first.model_copy(update={"name": "twin"}),
        "sft": make_config(denoise__tau_quantile=None, train__method="sft"),
        "far": make_config(denoise__tau_quantile=None, pairs__delta=1000.0),
    }
    episodes = make_episodes(healthy(), first)
    signal = judge_signal(episodes, first, prompts=RUN, arms=arms)
    assert list(signal) == ["prompts", "objectives", "all_tie", "kept", "pairs", "steps", "arms", "advice"]
    for name, arm in arms.items():
        alone = judge_signal(episodes, arm, prompts=RUN)
        assert signal["arms"][name] == {key: alone[key] for key in ("kept", "pairs", "steps")}
    assert signal["pairs"] == signal["arms"]["spa"]["pairs"]
    assert signal["arms"]["sft"]["steps"][0] < signal["arms"]["spa"]["steps"][0]
    told = "\n".join(signal_lines(signal))
    for names in ("arms spa, twin", "arm sft", "arm far"):
        assert f"signal     {names}: to expect: pairs " in told
    (few,) = [found for found in signal["advice"] if found["code"] == "few_pairs"]
    assert few["text"].startswith("arm far: about 0 pairs")
    (delta,) = [found for found in signal["advice"] if found["code"] == "delta"]
    assert delta["change"] == "pairs.delta=auto"


def test_arms_that_expect_the_same_are_told_once() -> None:
    config = make_config()
    episodes = make_episodes(healthy(), config)
    told = signal_lines(judge_signal(episodes, config, prompts=RUN, arms={"a": config, "b": config}))
    assert told == signal_lines(judge_signal(episodes, config, prompts=RUN))
    assert "arms" not in judge_signal(episodes, config, prompts=RUN, arms={"a": config})


def test_a_preview_covers_the_arms_that_share_its_episodes() -> None:
    arms = arm_configs(
        {
            "model": {"path": "m"},
            "arms": {
                "a": {},
                "b": {"pairs.delta": 1, "train.method": "sft"},
                "c": {"sampling.temperature": 0.5},
                "d": {"denoise.consistency": "off", "resources.concurrency": 4},
            },
        },
        [],
        where="test",
        stem="test",
    )
    assert list(sharing(with_dtype(arms["a"]), arms)) == ["a", "b", "d"]


# --- during a run ---------------------------------------------------------------------------------------------------


def test_a_stage_of_a_run_is_told_for_the_arms_that_use_it(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    raw = {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(tiny_model), "engine": "spa_ray.engine.scripted:ScriptedEngine"},
        "prompts": {"source": str(tmp_path / "p.jsonl")},
        "arms": {"a": {}, "b": {"pairs.delta": 1}, "c": {"sampling.temperature": 0.5}, "d": {"train.method": "sft"}},
    }
    pipeline = Pipeline(arm_configs(raw, [], where="test", stem="test"), progress=Progress(quiet=True))
    for nodes in islice(levels(pipeline.arms), 2):
        works = pipeline.works(nodes)
    assert [list(work.arms) for work in works.values()] == [["a", "b", "d"], ["c"]]


def write(folder: Path, name: str, numbers: range) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(make_episodes([sound(n) for n in numbers], make_config()), folder / name)


def watch(folder: Path, said: list[str]) -> SignalWatch:
    return SignalWatch(make_config(), folder / "episodes", count=lambda update: None, say=said.append)


def test_the_signal_is_told_once_while_a_file_is_still_being_written(tmp_path: Path) -> None:
    folder, said = tmp_path / "episodes" / "part=0", []
    write(folder, "a.parquet", range(40))
    watched = watch(tmp_path, said)
    (folder / "b.parquet").write_bytes(b"PAR1 half")
    for done in (10, 63, 64):
        watched({"done": done, "total": 100})
        if watched._thread:
            watched._thread.join()
    assert said == []  # 40 rows can be read
    write(folder, "b.parquet", range(40, 80))
    watched({"done": 80, "total": 100})
    watched._thread.join()
    assert read_json(tmp_path / "signal.json")["prompts"] == SAMPLE
    told = list(said)
    watched({"done": 90, "total": 100})
    watched.finish(100)
    watch(tmp_path, said).finish(100)  # a resumed run
    assert said == told != []


def test_a_run_of_fewer_prompts_hears_it_at_the_end(tmp_path: Path) -> None:
    write(tmp_path / "episodes" / "part=0", "a.parquet", range(8))
    said: list[str] = []
    watched = watch(tmp_path, said)
    watched({"done": 8, "total": 8})
    assert said == []
    watched.finish(8)
    assert read_json(tmp_path / "signal.json")["prompts"] == 8
    assert any("to expect: pairs" in line for line in said)


def test_a_prompt_that_was_asked_again_counts_by_its_later_row(tmp_path: Path) -> None:
    write(tmp_path / "part=1", "a.parquet", range(3))
    rows = [make_row([], prompt_id="p1", error="timeout: x"), sound(7)]
    (tmp_path / "part=0").mkdir()
    pq.write_table(make_episodes(rows, make_config()), tmp_path / "part=0" / "a.parquet")
    sample = read_sample(tmp_path, whole=True)
    assert sorted(sample["prompt_id"].to_pylist()) == ["p0", "p1", "p2", "p7"]
    assert sample["error"].null_count == 4


def test_the_first_four_prompts_of_a_preview_are_told_before_the_rest() -> None:
    from spa_ray.generation.preview import preview

    config: Config = scripted_config({"answers": 3})
    firsts: list[int] = []
    prompts = [prompt(f"question {n}?") for n in range(6)]
    shown = asyncio.run(preview(config, WEIGHTS, prompts, on_first=lambda some: firsts.append(len(some))))
    assert firsts == [4]
    assert [s["episode"]["prompt_id"] for s in shown] == [p["prompt_id"] for p in prompts]
    for asked, seen in zip(prompts, shown, strict=True):
        assert seen["calls"]
        assert all(asked["prompt_id"] in call["prompt"] for call in seen["calls"])
    alone = [asyncio.run(preview(config, WEIGHTS, [p]))[0] for p in prompts]
    assert [s["episode"] for s in alone] == [s["episode"] for s in shown]
    assert pa.array([len(s["calls"]) for s in shown]).null_count == 0
