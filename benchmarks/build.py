"""Throughput of the build stage on one core: denoising alone, denoising with pairs, and from Parquet to Parquet.

`taskset -c 0 python benchmarks/build.py [--prompts 20000] [--repeats 15]` prints one JSON object: prompts per second of
the core's own time (so that other work on the machine counts less), the median and the extremes. Ray's part is not in
it. Episodes are synthetic: n candidates and a refined answer that beats them all for a fifth of the prompts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import LocalFileSystem

from spa_ray.config.models import Config, Model
from spa_ray.data.schemas import EPISODES, with_metadata
from spa_ray.pipeline.build_files import pair_task, plan_tasks
from spa_ray.preferences import Funnel, build_pairs, denoise, resolve_tau

KEPT = 0.2
LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz      ", dtype=np.uint8)
BYTES_PER_TOKEN = 4
ROWS_PER_FILE = (32, 256, 4096)  # the first is `generation.rows_per_block` as it comes


def episodes(prompts: int, tokens: int, config: Config, seed: int = 0) -> pa.Table:
    """Random episodes: answers of `tokens` ± 20% tokens, integer scores 1-10."""
    rng = np.random.default_rng(seed)
    per_prompt, k = config.sampling.n + 1, len(config.objectives)
    total = prompts * per_prompt
    scores = rng.integers(1, 10, size=(prompts, per_prompt, k)).astype(float)
    scores[rng.random(prompts) < KEPT, -1] = 10
    lengths = rng.integers(int(0.8 * tokens), int(1.2 * tokens) + 1, size=total)
    ids = pa.ListArray.from_arrays(_offsets(lengths), pa.array(rng.integers(0, 32000, lengths.sum(), dtype=np.int32)))
    letters = LETTERS[rng.integers(0, len(LETTERS), BYTES_PER_TOKEN * lengths.sum())]
    text = pa.StringArray.from_buffers(total, _offsets(BYTES_PER_TOKEN * lengths).buffers()[1], pa.py_buffer(letters))
    columns: dict[str, Any] = {
        "index": np.tile(np.arange(per_prompt), prompts),
        "kind": pa.array(["candidate"] * (per_prompt - 1) + ["refined"]).take(
            pa.array(np.tile(np.arange(per_prompt), prompts))
        ),
        "text": text,
        "token_ids": ids,
        "finish_reason": pa.repeat("stop", total),
        "scores": _lists(pa.array(scores.ravel()), k),
        "score_status": _lists(pa.repeat("ok", total * k), k),
        "judge_texts": _lists(pa.repeat("Rating: [[7]]", total * k), k),
    }
    fields = list(EPISODES.field("responses").type.value_type)
    responses = pa.StructArray.from_arrays(
        [
            pa.array(columns[f.name], f.type)
            if isinstance(columns.get(f.name), np.ndarray)
            else columns.get(f.name, pa.nulls(total, f.type)).cast(f.type)
            for f in fields
        ],
        fields=fields,
    )
    messages = [
        [{"role": "user", "content": f"How do I do thing number {i} with what I have at home?"}] for i in range(prompts)
    ]
    return pa.Table.from_arrays(
        [
            pa.array([f"{i:016x}" for i in range(prompts)]),
            pa.array(messages, EPISODES.field("messages").type),
            pa.repeat("{}", prompts),
            _lists(responses, per_prompt),
            _lists(columns["scores"], per_prompt),
            pa.nulls(prompts, pa.string()),
            pa.array(np.ones(prompts, np.int32)),
            pa.array(np.zeros(prompts, np.int64)),
            pa.array(np.zeros(prompts, np.int64)),
        ],
        schema=with_metadata(EPISODES, objectives=config.objectives, model="synthetic", config_hash="benchmark"),
    )


def _offsets(lengths: np.ndarray) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))


def _lists(values: pa.Array, size: int) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(np.arange(0, len(values) + 1, size, dtype=np.int32)), values)


def own_seconds(work: Callable[[], object], repeats: int) -> list[float]:
    """CPU seconds of this process, each time. The first time, which warms caches up, is left out."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return seconds[1:]


def stage_seconds(table: pa.Table, rows_per_file: int, repeats: int, config: Config) -> list[float]:
    """Of all tasks of the stage, one after the other: files of episodes in, files of pairs out."""
    local = LocalFileSystem()
    with tempfile.TemporaryDirectory() as folder:
        for start in range(0, len(table), rows_per_file):
            pq.write_table(table.slice(start, rows_per_file), f"{folder}/{start:09d}.parquet")
        sizes = {str(file): file.stat().st_size for file in sorted(Path(folder).iterdir())}

        def stage() -> None:
            for number, task in enumerate(plan_tasks(sizes, folder, local)):
                pair_task(
                    task, f"{folder}/{number}.pairs", config, tau=None, filesystem=local, target=local,
                    metadata=table.schema.metadata, retried=None,
                )  # fmt: skip

        return own_seconds(stage, repeats)


def rate(prompts: int, seconds: list[float]) -> dict[str, int]:
    return {
        "median": round(prompts / statistics.median(seconds)),
        "lowest": round(prompts / max(seconds)),
        "highest": round(prompts / min(seconds)),
    }


def measure(tokens: int, prompts: int, repeats: int, config: Config) -> dict[str, Any]:
    """Rates at one answer length, with Arrow held to one thread.

    For a fresh process: one that has given large pieces of memory back meets no page faults, and runs up to three times
    as fast (docs/SCALE.md).
    """
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    table = episodes(prompts, tokens, config)
    # No upper bound, so that the share of kept prompts is the share of refined answers that win.
    denoised = denoise(table, config, tau=None)
    funnel = Funnel.of(denoised, build_pairs(denoised, config), config, tau=None)
    rates = {
        "resolve_tau": own_seconds(lambda: resolve_tau(table["scores"], config), repeats),
        "denoise": own_seconds(lambda: denoise(table, config, tau=None), repeats),
        "denoise_and_pairs": own_seconds(lambda: build_pairs(denoise(table, config, tau=None), config), repeats),
    }
    rates |= {f"stage_{rows}_rows_a_file": stage_seconds(table, rows, repeats, config) for rows in ROWS_PER_FILE}
    return {f"{name}_per_s": rate(prompts, seconds) for name, seconds in rates.items()} | {
        "kept_share": round(funnel.kept / prompts, 3),
        "pairs_per_prompt": round(funnel.pairs / prompts, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    config = Config(name="benchmark", run_dir="none", model=Model(path="none"))
    cases = {t: harness.in_fresh_process(measure, t, args.prompts, args.repeats, config) for t in (35, 300)}
    print(json.dumps({f"{tokens}_tokens": rates for tokens, rates in cases.items()}, indent=1))


if __name__ == "__main__":
    from spa_ray.cli.guard import guarded

    guarded(main, name="build")
