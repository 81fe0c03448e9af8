"""How many prompts and engines a generation stage carries: real Ray Data over an engine that costs next to nothing.

`python benchmarks/scale.py [--prompts 100000 --engines 4]` prints one JSON object: prompts/s, memory of the driver and
of the object store against prompts, CPU by kind of process, the ledger's messages, files, and (`--resume-at 0.5`) what
it takes to go on. `--latency` and its like give the engine a law; the scaling model's prediction stands beside.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from processes import Processes
from scaling_model import Law, Phase, engine_rate, episode

from spa_ray.config import arm_configs
from spa_ray.config.models import Config
from spa_ray.data.schemas import PROMPTS
from spa_ray.generation.ledger import Ledger
from spa_ray.generation.setup import Task
from spa_ray.generation.stage import PassCounts, generate
from spa_ray.pipeline.cluster import quiet_ray_data
from spa_ray.storage.files import parquet_files

BATCH = 100_000
STEADY = (0.2, 0.95)  # of the prompts: where slopes and rates are taken


def write_prompts(path: Path, prompts: int, first: int = 0) -> None:
    """A file of prompts of about 20 tokens."""
    with pq.ParquetWriter(path, PROMPTS) as writer:
        for start in range(first, first + prompts, BATCH):
            numbers = range(start, min(start + BATCH, first + prompts))
            rows = [
                {
                    "prompt_id": f"{k:032x}",
                    "messages": [{"role": "user", "content": f"How do I do thing number {k} with what is at home?"}],
                    "meta": "{}",
                }
                for k in numbers
            ]
            writer.write_table(pa.Table.from_pylist(rows, schema=PROMPTS), row_group_size=16_384)


def stage_config(args: argparse.Namespace) -> Config:
    law = {"latency": args.latency, "token_latency": args.token_latency, "batch_latency": args.batch_latency}
    raw: dict[str, Any] = {
        "model": {
            "path": "none",
            "engine": "instant_engine:InstantEngine",
            "engine_kwargs": {"tokens": args.tokens, **law},
        },
        "sampling": {"n": args.n, "max_tokens": 64, "resample_duplicates": False},
        "refine": {"max_tokens": 64},
        "generation": {"rows_per_block": args.rows_per_block},
        "resources": {
            "engines": {"min": args.engines, "max": args.engines},
            "cpus_per_engine": args.cpus_per_engine,
            "concurrency": args.concurrency,
        },
    }
    return arm_configs(raw, [], where="benchmark", stem="benchmark")["main"]


def phases_of(args: argparse.Namespace, config: Config) -> tuple[Phase, ...]:
    if args.task == "answer":
        return (Phase(1, args.tokens),)
    return episode(args.n, len(config.objectives), args.tokens, judgement=2)


# --- what is watched --------------------------------------------------------------------------------------------------


@dataclass
class Watch:
    """Samples of a running stage, one every few seconds, and what each kind of process has worked."""

    every: float
    rows: int = 0
    first_row: float | None = None
    samples: list[dict[str, float]] = field(default_factory=list)
    cpu: list[dict[str, float]] = field(default_factory=list)  # seconds by kind of process, at each sample
    _processes: Processes = field(default_factory=Processes)
    _began: float = field(default_factory=time.monotonic)

    def told(self, news: Mapping[str, Any]) -> None:
        """The stage's own display."""
        self.rows = news["done"]
        if self.rows and self.first_row is None:
            self.first_row = time.monotonic() - self._began

    def sample(self) -> None:
        self._processes.look()
        self.cpu.append(self.cpu_seconds(own=time.thread_time()))
        store = _object_store()
        self.samples.append(
            {
                "seconds": round(time.monotonic() - self._began, 2),
                "rows": self.rows,
                "driver_mib": round(harness.resident_mib(), 2),
                "store_mib": round(store["bytes"] / harness.MIB, 3),
                "store_objects": store["objects"],
            }
        )

    def cpu_seconds(self, own: float) -> dict[str, float]:
        """By kind of process; those that ended between two samples are counted up to the last one. `own`: seconds of
        the watching itself, which runs on the driver."""
        found = self._processes.seconds()
        found["driver"] -= own
        return {kind: round(seconds, 2) for kind, seconds in found.items()}


def _object_store() -> dict[str, int]:
    """Bytes and objects in this node's store, as its raylet says."""
    from ray._private.internal_api import node_stats

    node = next(n for n in ray.nodes() if n["Alive"])
    stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], include_memory_info=False).store_stats
    return {"bytes": stats.object_store_bytes_used, "objects": stats.num_local_objects}


@contextmanager
def watched(every: float) -> Iterator[Watch]:
    watch, ended = Watch(every), threading.Event()

    def follow() -> None:
        while not ended.wait(every):
            watch.sample()
        watch.sample()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        ended.set()
        thread.join()


def slopes(samples: list[dict[str, float]], rows: int, before: int = 0) -> dict[str, Any]:
    """MiB in the steady part of the run, and bytes a prompt by a straight line through it (± its standard error)."""
    low, high = (before + share * (rows - before) for share in STEADY)
    steady = [s for s in samples if low <= s["rows"] <= high]
    out: dict[str, Any] = {"samples": len(steady)}
    for name in ("driver_mib", "store_mib"):
        values = np.array([s[name] for s in steady])
        at = np.array([s["rows"] for s in steady])
        out[name] = (
            {"median": round(float(np.median(values)), 2), "most": round(float(values.max()), 2)} if steady else {}
        )
        if len(set(at)) > 2:
            (slope, _), cov = np.polyfit(at, values * harness.MIB, 1, cov=True)
            out[name] |= {"bytes_per_prompt": round(slope, 2), "error": round(float(cov[0, 0]) ** 0.5, 2)}
    return out


def steady_rate(samples: list[dict[str, float]], rows: int, before: int = 0) -> float | None:
    """Prompts/s between the first and the last sample of the steady part."""
    low, high = (before + share * (rows - before) for share in STEADY)
    steady = [s for s in samples if low <= s["rows"] <= high]
    if len(steady) < 2 or steady[-1]["seconds"] == steady[0]["seconds"]:
        return None
    return (steady[-1]["rows"] - steady[0]["rows"]) / (steady[-1]["seconds"] - steady[0]["seconds"])


def steady_cpu(watch: Watch, rows: int, before: int) -> dict[str, float]:
    """CPU seconds a prompt, by kind of process, over the steady part: starts of processes are not in it."""
    low, high = (before + share * (rows - before) for share in STEADY)
    steady = [k for k, s in enumerate(watch.samples) if low <= s["rows"] <= high]
    if len(steady) < 2:
        return {}
    first, last = steady[0], steady[-1]
    done = watch.samples[last]["rows"] - watch.samples[first]["rows"]
    if not done:
        return {}
    return {kind: (s - watch.cpu[first].get(kind, 0.0)) / done for kind, s in watch.cpu[last].items()}


# --- what is run ------------------------------------------------------------------------------------------------------


def run_stage(args: argparse.Namespace, config: Config, prompts: Path, folder: Path, before: int = 0) -> dict[str, Any]:
    rows = pq.read_metadata(prompts).num_rows
    with watched(args.every) as watch:
        counts: PassCounts = generate(
            config,
            Task(kind=args.task, scored=args.task != "answer"),
            prompts=prompts,
            out=folder / "episodes",
            checkpoint=folder / "checkpoint",
            model=folder,
            config_hash="benchmark",
            on_progress=watch.told,
            shard_rows=args.shard_rows,
        )
    done = rows - before
    cpu = steady_cpu(watch, rows, before)
    tasks = sum(cpu.get(kind, 0.0) for kind in ("tasks", "ray", "ledger"))
    new = next((s["seconds"] for s in watch.samples if s["rows"] > before), None)
    rate = steady_rate(watch.samples, rows, before)
    return {
        "prompts": rows,
        "asked": done,
        "errors": counts.errors,
        "requests": counts.requests,
        "seconds": round(counts.seconds, 1),
        "first_row_seconds": watch.first_row if not before else new,
        "prompts_per_s": round(done / counts.seconds, 1),
        "steady_prompts_per_s": None if rate is None else round(rate, 1),
        "blocks_per_s": None if rate is None else round(rate / args.rows_per_block, 2),
        "ledger_messages_per_s": None
        if rate is None
        else round(2 * rate / args.rows_per_block + args.engines + 1, 1),  # and the display's question
        "engine_busy": counts.engine_busy,
        "cpu_seconds": watch.cpu[-1],
        "engine_ms_per_prompt": round(1000 * cpu.get("engines", 0.0), 3),
        "tasks_ms_per_block": round(1000 * tasks * args.rows_per_block, 2),
        "driver_ms_per_block": round(1000 * cpu.get("driver", 0.0) * args.rows_per_block, 2),
        "ledger_ms_per_block": round(1000 * cpu.get("ledger", 0.0) * args.rows_per_block, 2),
        "memory": slopes(watch.samples, rows, before),
        "files": len(parquet_files(folder / "episodes")),
        "checkpoint_files": len(parquet_files(folder / "checkpoint")),
        "samples": watch.samples if args.samples else len(watch.samples),
    }


def ledger_rate(messages: int, rows_per_block: int) -> dict[str, float]:
    """Messages a second that the ledger's actor answers, with as many ids each as a block has rows."""
    ledger = ray.remote(Ledger).options(num_cpus=0).remote()
    ray.get(ledger.born.remote("e", "n", "l"))
    ids = [[f"{block * rows_per_block + k:032x}" for k in range(rows_per_block)] for block in range(64)]
    start = time.perf_counter()
    for first in range(0, messages, 128):
        asked = []
        for k in range(first, min(first + 128, messages), 2):
            block = ids[k // 2 % len(ids)]
            asked += [ledger.begin.remote("e", block), ledger.finished.remote("e", block, {"rows": 1}, {}, True)]
        ray.get(asked)
    seconds = time.perf_counter() - start
    ray.kill(ledger)
    return {"messages": messages, "ids_each": rows_per_block, "messages_per_s": round(messages / seconds)}


def resume(args: argparse.Namespace, config: Config, prompts: Path, folder: Path) -> dict[str, Any]:
    """A stage over the first prompts, then over all: as after a stop at `--resume-at`, within one shard."""
    if args.prompts > args.shard_rows:
        raise SystemExit("--resume-at: at most --shard-rows prompts")
    half = folder / "half.parquet"
    rows = int(args.prompts * args.resume_at)
    write_prompts(half, rows)
    first = run_stage(args, config, half, folder)
    rest = run_stage(args, config, prompts, folder, before=rows)
    asked = args.prompts - rows
    per_prompt = sum(phase.requests for phase in phases_of(args, config))
    return {
        "first": first,
        "rest": rest,
        "extra_seconds": round((rest["first_row_seconds"] or 0) - (first["first_row_seconds"] or 0), 1),
        "requests_beyond_the_missing": rest["requests"] - asked * per_prompt,
    }


def main() -> None:
    args = options().parse_args()
    config = stage_config(args)
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    os.environ |= {"RAY_BACKEND_LOG_LEVEL": "fatal", "RAY_LOG_TO_DRIVER_EVENT_LEVEL": "FATAL"}
    ray.init(address="local", num_cpus=args.cpus, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    quiet_ray_data(False)
    try:
        prompts = folder / "prompts.parquet"
        write_prompts(prompts, args.prompts)
        out: dict[str, Any] = {"environment": harness.in_fresh_process(harness.environment), "settings": vars(args)}
        if args.resume_at:
            out["resume"] = resume(args, config, prompts, folder)
        else:
            out["run"] = run_stage(args, config, prompts, folder)
        out["ledger"] = ledger_rate(args.ledger_messages, args.rows_per_block)
        law = Law(args.latency, args.token_latency, args.batch_latency)
        phases = phases_of(args, config)
        measured = out["resume"]["first"] if args.resume_at else out["run"]
        engine = measured["engine_ms_per_prompt"] / 1000
        around = (measured["tasks_ms_per_block"] + measured["driver_ms_per_block"]) / 1000 / args.rows_per_block
        one = engine_rate(law, phases, args.concurrency, cpu=engine)
        cores = (os.cpu_count() or 1) / (engine + around) if engine else None
        out["predicted"] = {"engines": args.engines * one.prompts_per_s, "cores": cores, "one_engine": asdict(one)}
        print(json.dumps(out, indent=1, default=str))
    finally:
        ray.shutdown()
        if not args.keep:
            shutil.rmtree(folder)


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=100_000)
    parser.add_argument("--engines", type=int, default=4)
    parser.add_argument("--concurrency", type=int, default=128)
    parser.add_argument("--rows-per-block", type=int, default=32)
    parser.add_argument("--shard-rows", type=int, default=1_000_000)
    parser.add_argument("--task", choices=["episode", "answer"], default="episode")
    parser.add_argument("--n", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=35, help="of an answer")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds of a request")
    parser.add_argument("--token-latency", type=float, default=0.0, help="seconds a token")
    parser.add_argument("--batch-latency", type=float, default=0.0, help="the same, for each other request inside")
    parser.add_argument("--cpus", type=int, default=8, help="logical CPUs of the local Ray")
    parser.add_argument("--cpus-per-engine", type=float, default=0.01, help="logical")
    parser.add_argument("--resume-at", type=float, default=0.0, help="share of the prompts that are there already")
    parser.add_argument("--ledger-messages", type=int, default=20_000)
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two samples")
    parser.add_argument("--samples", action="store_true", help="print all samples")
    parser.add_argument("--folder", help="where to write; default: the system's temporary folder")
    parser.add_argument("--keep", action="store_true", help="leave the files there")
    return parser


if __name__ == "__main__":
    from spa_ray.cli.guard import guarded

    guarded(main, name="scale")
