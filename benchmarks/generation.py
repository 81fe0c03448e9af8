"""Throughput of generation: the same requests through spa_ray, raw vLLM and four chained `ray.data.llm` processors.

`python benchmarks/generation.py [--prompts 600] [--repeats 3]` prints one JSON object. The sides, in turn, each run in
a process of its own, on the demo's embedded model and prompts, or on those of `--config`:

    spa_ray     the generation pass itself: Ray Data, one engine actor, Parquet in and out
    coroutines  the same episodes on the same engine, without Ray; this side records every request for the next
    raw         vLLM's `LLM.generate`, all prompts known up front: the samples of all, then all scores, then all
                refinements, then their scores; same token ids, parameters and engine arguments
    raw_two     two of raw side by side, half of the cores and of the requests each
    processors  four `ray.data.llm` processors in a row, hence four engines; same prompts, seeds and parameters

Steady state, on every side: requests, over the seconds from the first request to the last answer. So loading, imports
and Ray's start are left out (`startup_seconds`: from the beginning of the side's work to its first request) and so is
what follows the last answer; filling and draining are in it, once for spa_ray, four times for raw (a stage waits for
the last answer of the one before) and for the chain its length. More prompts make that share smaller for all.

`--determinism` asks another question: how many episodes have the same bytes when only the company in the batch differs.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
from generation_processors import run_processors
from generation_work import Run, Work, episode_bytes, run_coroutines, run_pass, run_raw, run_raw_two

DEMO = Path(__file__).parents[1] / "spa_ray" / "microworld" / "demo.yaml"
SIDES: dict[str, Callable[[Work, int], Run]] = {
    "coroutines": run_coroutines,  # first: it records what raw asks
    "raw": run_raw,
    "raw_two": run_raw_two,
    "spa_ray": run_pass,
    "processors": run_processors,
}


def prepare(args: argparse.Namespace, folder: Path) -> Work:
    from spa_ray.config import load_config
    from spa_ray.data.prompts import write_prompts
    from spa_ray.pipeline.models import fetch_model

    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # of the sides without Ray, which gives an actor as many as CPUs
    cpus = f"resources.cpus_per_engine={args.threads}"
    overrides = [f"prompts.limit={args.prompts}", f"seed={args.seed}", cpus, *args.set]
    config = next(iter(load_config(args.config, overrides).values()))
    prompts = folder / "prompts.parquet"
    written = write_prompts(config.prompts, prompts)
    if written.rows < args.prompts:
        harness.progress(f"only {written.rows} prompts are there")
    return Work(config, fetch_model(config.model), prompts, folder / "requests.json", folder)


def compare(work: Work, args: argparse.Namespace) -> dict[str, Any]:
    runs: dict[str, list[Run]] = {side: [] for side in args.sides}
    for k in range(args.repeats):
        for side in args.sides:
            run = harness.in_fresh_process(SIDES[side], work, args.concurrency)
            runs[side].append(run)
            more = run.stage_seconds or run.cores or ""
            harness.progress(
                f"run {k + 1} of {args.repeats}, {side}: {run.requests_per_s:.1f} requests/s, {run.requests} in "
                f"{run.seconds:.1f} s after {run.startup_seconds:.1f} s of start-up; {more}"
            )
    printed: dict[str, Any] = {side: figures(of) for side, of in runs.items()}
    for name, (above, below) in {
        "over_raw": ("spa_ray", "raw"),
        "over_raw_two": ("spa_ray", "raw_two"),
        "over_processors": ("spa_ray", "processors"),
        "coroutines_over_raw": ("coroutines", "raw"),
    }.items():
        if above in runs and below in runs:
            printed[name] = ratio(runs[above], runs[below])
    return printed


def figures(runs: list[Run]) -> dict[str, Any]:
    return {
        "median_requests_per_s": statistics.median(run.requests_per_s for run in runs),
        "median_prompts_per_s": statistics.median(run.prompts / run.seconds for run in runs),
        "median_startup_seconds": statistics.median(run.startup_seconds for run in runs),
        "requests_per_s": [run.requests_per_s for run in runs],
        "runs": [dataclasses.asdict(run) for run in runs],
    }


def ratio(above: list[Run], below: list[Run]) -> dict[str, Any]:
    rates = [statistics.median(run.requests_per_s for run in side) for side in (above, below)]
    by_run = [a.requests_per_s / b.requests_per_s for a, b in zip(above, below, strict=True)]
    return {"of_medians": rates[0] / rates[1], "by_run": by_run}


def determinism(work: Work, in_flight: list[int]) -> list[dict[str, Any]]:
    """Every company against the first: the shares of prompts whose candidates, and whose episodes, are the same.

    A company: prompts in flight, their order, engines that share them. The second is the first once more.
    """
    most = in_flight[0]
    companies = [(most, "file", 1)] + [(count, "file", 1) for count in in_flight]
    companies += [(most, "reversed", 1), (most, "file", 2)]
    found, reference = [], None
    for concurrency, order, engines in companies:
        rows: dict[str, list[str]] = {}
        for part in range(engines):
            rows |= harness.in_fresh_process(episode_bytes, work, concurrency, order, part, engines)
        reference = reference or rows
        same = [[a == b for a, b in zip(rows[key], reference[key], strict=True)] for key in reference]
        company = {"in_flight": concurrency, "order": order, "engines": engines}
        episodes, candidates = (sum(kind) / len(same) for kind in zip(*same, strict=True))
        found.append({**company, "same_episodes": episodes, "same_candidates": candidates, "prompts": len(same)})
        harness.progress(str(found[-1]))
    return found[1:]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", type=Path, default=DEMO, help="whose first arm's model, prompts, sampling and templates are used")
    add("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of the config")
    add("--prompts", type=int, default=600)
    add("--concurrency", type=int, default=128, help="prompts in flight, spa_ray and coroutines")
    add("--sides", nargs="+", choices=list(SIDES), default=list(SIDES), help="raw and raw_two need coroutines")
    add("--determinism", action="store_true", help="compare bytes instead of speed")
    add("--in-flight", type=int, nargs="+", default=[128, 16, 1], help="prompts in flight that --determinism compares")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="an engine's, on a CPU; default: all cores")
    add("--seed", type=int, default=0)
    add("--repeats", type=int, default=3)
    args = parser.parse_args()
    args.sides = [side for side in SIDES if side in args.sides]
    if {"raw", "raw_two"} & set(args.sides) and "coroutines" not in args.sides:
        parser.error("raw and raw_two ask what coroutines has recorded: name both in --sides")
    return args


def main() -> None:
    args = arguments()
    where = harness.in_fresh_process(harness.environment)
    with tempfile.TemporaryDirectory() as folder:
        work = prepare(args, Path(folder))
        found = {"companies": determinism(work, args.in_flight)} if args.determinism else compare(work, args)
    harness.report(environment=where, settings=vars(args), **found)


if __name__ == "__main__":
    from spa_ray.cli.guard import guarded

    guarded(main, name="generation")
