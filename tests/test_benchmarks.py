"""Every benchmark runs at toy size and prints one JSON object whose figures go together. No figure here is a result."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.bench
FOLDER = Path(__file__).parents[1] / "benchmarks"
needs_trl = pytest.mark.skipif(find_spec("trl") is None, reason="compares with TRL")


def run(script: str, *options: str) -> dict[str, Any]:
    """What the script prints, which must be one JSON object and nothing besides."""
    command = [sys.executable, str(FOLDER / script), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def assert_where(printed: dict[str, Any]) -> None:
    where = printed["environment"]
    assert where["cores"] >= 1
    assert where["device"]
    assert {"spa_ray", "torch"} <= where["versions"].keys()


def test_planning_times_the_plan_of_both_layouts() -> None:
    printed = run("planning.py", "--pairs", "3000", "--repeats", "2", "--batch-size", "64", "--ranks", "2")
    assert_where(printed)
    layouts = printed["layouts"]
    assert [row["layout"] for row in layouts] == ["packed", "padded"] * 2
    assert [row["order"] for row in layouts] == ["prompts"] * 2 + ["pairs"] * 2
    packed, padded, by_pair, _ = layouts
    for layout in layouts:
        assert 1 <= layout["busiest_rank_over_mean"] < 1.5
        assert layout["steps"] == 47  # ⌈3000 / 64⌉
        assert len(layout["seconds"]) == 2
        assert min(layout["seconds"]) <= layout["median_seconds"] <= max(layout["seconds"])
        assert layout["peak_resident_mib"] >= layout["resident_before_mib"] > 0
    assert packed["micro_batches_a_step"] <= padded["micro_batches_a_step"]
    assert packed["tokens_of_pairs_over_tokens"] > 3 > 1.5 > by_pair["tokens_of_pairs_over_tokens"] > 1


def test_packing_runs_the_same_pairs_in_every_layout() -> None:
    printed = run(
        "packing.py", "--pairs", "5", "--random-pairs", "2", "--hidden", "32", "--layers", "1", "--vocab", "64",
        "--micro-batch-tokens", "2048", "--sigma", "0,1", "--repeats", "1",
    )  # fmt: skip
    assert_where(printed)
    equal, spread = printed["spreads"]
    for part in (equal, spread):
        assert set(part["loss"]) == {"packed", "padded_sorted", "padded_random"}
        assert max(part["loss"].values()) - min(part["loss"].values()) < 1e-4
        assert part["share_of_tokens_that_count"]["packed"] == 1
        assert part["micro_batches"]["padded_random"] == 3  # 2, 2 and 1 pairs
        rates = part["median_tokens_per_s"]
        assert part["packed_over_random"] == pytest.approx(rates["packed"] / rates["padded_random"])
    assert set(equal["share_of_tokens_that_count"].values()) == {1.0}
    assert max(spread["share_of_tokens_that_count"][layout] for layout in ("padded_sorted", "padded_random")) < 1


@needs_trl
def test_logprob_memory_says_what_did_not_fit() -> None:
    printed = run(
        "logprob_memory.py", "--vocab", "4096", "--tokens", "1024,4096", "--hidden", "16", "--logits-mib", "1",
        "--memory-gib", "0.1",
    )  # fmt: skip
    assert_where(printed)
    cases = {(row["path"], row["tokens"]): row for row in printed["cases"]}
    assert len(cases) == 6
    # 1024 tokens × 4096 × 4 bytes = 16 MiB of logits, four times; 4096 tokens are beyond 0.1 GiB with all logits.
    assert {case for case, row in cases.items() if "skipped" in row} == {("full", 4096), ("trl", 4096)}
    losses = [cases[path, 1024]["loss"] for path in ("chunked", "full", "trl")]
    assert max(losses) - min(losses) < 1e-5
    chunked, full, trl = (cases[path, 1024]["growth_mib"] for path in ("chunked", "full", "trl"))
    assert chunked < full < trl
    assert full > 16 * 0.7  # the response tokens' share of the logits, at the very least
    (line,) = printed["summary"]
    assert line["chunked_over_trl"] == {"1024": pytest.approx(chunked / trl)}


@needs_trl
@pytest.mark.engine
@pytest.mark.parametrize("work", ["independent", "spa"])
def test_training_beside_trl_follows_one_loss_curve(work: str) -> None:
    printed = run(
        "train_vs_trl.py", "--work", work, "--hidden", "32", "--layers", "1", "--vocab", "128", "--batch-size", "4",
        "--steps", "3", "--warmup", "1", "--repeats", "1", "--micro-batch-tokens", "1600", "--trl-micro-batch", "2",
        "--lr", "1e-3",
    )  # fmt: skip
    assert_where(printed)
    assert set(printed["matmul"]["share"]) == {"ours", "trl"}
    assert all(0 < share < 1 for share in printed["matmul"]["share"].values())
    assert printed["work"]["pairs"] == 12
    assert (printed["work"]["tokens_of_pairs_over_distinct"] > 1.2) == (work == "spa")
    ours, trl = printed["ours"], printed["trl"]
    for side in (ours, trl):
        assert len(side["loss"]) == 3
        assert [len(steps) for steps in side["step_seconds"]] == [2]
        assert side["pairs_per_s"] == [side["median_pairs_per_s"]]
        assert side["median_peak_memory_mib"] > side["resident_before_mib"][0] > 0
    assert printed["largest_loss_difference"] < 1e-5
    assert max(ours["loss"]) - min(ours["loss"]) > 1e-3  # so that other pairs in a step would show
    assert printed["speed_ratio"] == pytest.approx(ours["median_pairs_per_s"] / trl["median_pairs_per_s"])


TOY_WORLD = ("sampling.max_tokens=12", "refine.max_tokens=12", "sampling.resample_duplicates=false")


@pytest.mark.engine
def test_generation_asks_as_many_requests_on_every_side() -> None:
    printed = run("generation.py", "--prompts", "6", "--repeats", "1", "--concurrency", "4", "--set", *TOY_WORLD)
    assert_where(printed)
    sides = ("spa_ray", "coroutines", "raw", "raw_two", "processors")
    for side in sides:
        (ran,) = printed[side]["runs"]
        assert (ran["prompts"], ran["requests"]) == (6, 6 * (5 + 10 + 1 + 2))
        assert ran["seconds"] > 0
        assert ran["startup_seconds"] > 0
        assert printed[side]["median_requests_per_s"] == pytest.approx(ran["requests"] / ran["seconds"])
    rates = {side: printed[side]["median_requests_per_s"] for side in sides}
    assert printed["over_raw"]["of_medians"] == pytest.approx(rates["spa_ray"] / rates["raw"])
    assert printed["over_processors"]["by_run"] == [pytest.approx(rates["spa_ray"] / rates["processors"])]
    (raw,) = printed["raw"]["runs"]
    assert set(raw["stage_seconds"]) == {"sample", "score", "refine", "rescore"}
    assert sum(raw["stage_seconds"].values()) == pytest.approx(raw["seconds"], abs=0.01)


@pytest.mark.engine
def test_generation_compares_the_bytes_of_episodes_in_different_company() -> None:
    printed = run("generation.py", "--determinism", "--prompts", "4", "--in-flight", "3", "--set", *TOY_WORLD)
    again, reversed_, shared = printed["companies"]
    assert [c["engines"] for c in (again, reversed_, shared)] == [1, 1, 2]
    assert reversed_["order"] == "reversed"
    for company in (again, reversed_, shared):
        assert company["prompts"] == 4
        assert 0 <= company["same_episodes"] <= company["same_candidates"] <= 1


def test_build_is_timed_from_memory_and_from_parquet() -> None:
    printed = run("build.py", "--prompts", "500", "--repeats", "2")
    assert set(printed) == {"35_tokens", "300_tokens"}
    for case in printed.values():
        rates = {name: rate for name, rate in case.items() if name.endswith("_per_s")}
        assert {"denoise_per_s", "denoise_and_pairs_per_s", "stage_32_rows_a_file_per_s"} <= rates.keys()
        assert all(0 < rate["lowest"] <= rate["median"] <= rate["highest"] for rate in rates.values())
        assert case["pairs_per_prompt"] == pytest.approx(15 * case["kept_share"], rel=0.1)  # few of the 15 lie below δ


@pytest.mark.engine
def test_scale_asks_what_is_missing_and_says_what_its_model_foresaw() -> None:
    printed = run(
        "scale.py", "--prompts", "600", "--engines", "1", "--task", "answer", "--rows-per-block", "20",
        "--latency", "0.05", "--resume-at", "0.4", "--every", "0.2", "--ledger-messages", "200",
    )  # fmt: skip
    assert_where(printed)
    first, rest = printed["resume"]["first"], printed["resume"]["rest"]
    assert (first["asked"], first["errors"], first["files"]) == (240, 0, 12)
    assert (rest["asked"], rest["errors"], rest["files"]) == (360, 0, 30)
    assert printed["resume"]["requests_beyond_the_missing"] == 0
    assert printed["ledger"]["messages_per_s"] > 0
    assert 0 < printed["predicted"]["engines"] <= 128 / 0.05  # prompts in flight over the law's shortest answer


def test_sensing_is_timed_both_ways_beside_generation_and_both_sense_the_same() -> None:
    printed = run("sensing.py", "--prompts", "12", "--tokens", "4", "--repeats", "1")
    assert_where(printed)
    assert set(printed["sides"]) == {"transformers", "pooling", "generation"}
    for side in printed["sides"].values():
        assert side["ms"] == side["all_ms"][0] > 0
        assert side["startup_seconds"] > 0
    for way, share in printed["sensing_over_generation"].items():
        assert share == pytest.approx(printed["sides"][way]["ms"] / printed["sides"]["generation"]["ms"])
    assert 0 < printed["largest_difference"] < 1e-3
