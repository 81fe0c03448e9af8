"""Kill a training run at random, again and again, and compare the weights it ends with to those of an undisturbed run.

    python -m tests.chaos_training --kills 20 --seed 0

Each kill is a SIGKILL of one Ray Train worker, of all workers, or of the driver, at a random step; up to five hit one
run, which is then compared and followed by another. Prints one JSON object; exit status 1 when any weight differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

from spa_ray.training.job import TrainJob, read_job, write_job
from tests.tiny_model import build_tiny_model
from tests.training_support import make_job, pair_rows, write_pairs

TARGETS = ("worker", "all workers", "driver")
SETTINGS = [
    {"zero_stage": 2},
    {"zero_stage": 3},
    {"zero_stage": 1, "method": "spa_dpo", "save_every_steps": 4},
    {"zero_stage": 2, "lora": {"r": 4, "alpha": 8.0, "dropout": 0.1}},
]
WORKERS = 2
STEPS = 40
PATIENCE = 300.0  # seconds without a new step, start-up included


def job_of(folder: Path, model: Path, pairs: Path, run: int) -> TrainJob:
    settings = {"save_every_steps": 5, **SETTINGS[run % len(SETTINGS)]}
    return make_job(folder, model, pairs, name=f"run{run}", batch_size=48, max_steps=STEPS, **settings)


def drive(path: Path) -> None:
    """The driver: Ray, Ray Train, one job. Its own process, so that it can be killed."""
    import ray

    from spa_ray.config.models import Resources
    from spa_ray.training.launch import train_jobs

    job = read_job(path)
    # Ray's workers are nice by default: beside other work they would run out of the test's patience.
    settings = {"worker_niceness": 0}
    ray.init(num_cpus=4, include_dashboard=False, address="local", logging_level="ERROR", _system_config=settings)
    train_jobs([job], Resources(train_workers=WORKERS), storage=path.parent / "ray", name=job.name)


def start(job: TrainJob) -> subprocess.Popen[bytes]:
    job.work.mkdir(parents=True, exist_ok=True)
    write_job(job)
    command = [sys.executable, "-m", "tests.chaos_training", "--drive", str(job.work / "job.json")]
    with (job.work / "driver.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def steps_done(job: TrainJob) -> int:
    log = job.work / "train_log.jsonl"
    return log.read_text().count("\n") if log.is_file() else 0


def train_workers(driver: psutil.Process) -> list[psutil.Process]:
    found = []
    for process in driver.children(recursive=True):
        try:
            if process.name().startswith("ray::RayTrain") or "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def kill(target: str, driver: subprocess.Popen[bytes], rng: random.Random) -> bool:
    """Whether there was something to kill."""
    if target == "driver":
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        return True
    workers = train_workers(psutil.Process(driver.pid))
    for process in workers if target == "all workers" else rng.sample(workers, min(1, len(workers))):
        process.send_signal(signal.SIGKILL)
    return bool(workers)


def disturbed(job: TrainJob, kills: int, rng: random.Random, seen: Counter[str]) -> list[dict[str, object]]:
    """Run the job to its end, killing on the way up to `kills` times. Returns what was killed, and when."""
    events: list[dict[str, object]] = []
    driver, failures = start(job), 0
    try:
        while True:
            last, moved = steps_done(job), time.monotonic()
            at = rng.randint(last + 1, STEPS) if len(events) < kills and last < STEPS else None
            while driver.poll() is None and (at is None or steps_done(job) < at):
                if steps_done(job) != last:
                    last, moved = steps_done(job), time.monotonic()
                if time.monotonic() - moved > PATIENCE:
                    raise TimeoutError(f"{job.name}: no step for {PATIENCE:.0f} s; see {job.work / 'driver.log'}")
                time.sleep(0.02)
            if driver.poll() is None:
                target = min(TARGETS, key=lambda t: (seen[t], rng.random()))
                if kill(target, driver, rng):
                    seen[target] += 1
                    events.append({"run": job.name, "target": target, "step": steps_done(job)})
                    print(json.dumps(events[-1]), file=sys.stderr, flush=True)
            if driver.poll() == 0:
                return events
            if driver.poll() is not None:  # killed, or given up after too many dead workers: the user starts it again
                failures = 0 if driver.returncode == -signal.SIGKILL else failures + 1
                if failures > 3:
                    raise RuntimeError(f"{job.name}: ends with {driver.returncode}; see {job.work / 'driver.log'}")
                driver = start(job)
    finally:
        if driver.poll() is None:
            driver.kill()


def worst_difference(a: Path, b: Path) -> float:
    from safetensors.torch import load_file

    left, right = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert left.keys() == right.keys()
    return max(float((left[k] - right[k]).abs().max()) for k in left)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--drive", type=Path, help="run this job as a driver (used by the script itself)")
    arguments = parser.parse_args()
    if arguments.drive:
        drive(arguments.drive)
        return 0
    rng, seen, events, runs = random.Random(arguments.seed), Counter[str](), [], {}
    started = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="chaos-training-"))
    model = build_tiny_model(folder / "tiny")
    pairs = write_pairs(folder / "pairs.parquet", pair_rows(400))
    while len(events) < arguments.kills:
        number = len(runs)
        calm, job = (job_of(folder / kind, model, pairs, number) for kind in ("calm", "killed"))
        disturbed(calm, 0, rng, seen)
        events += disturbed(job, min(5, arguments.kills - len(events)), rng, seen)
        runs[job.name] = {"settings": SETTINGS[number % len(SETTINGS)], "worst": worst_difference(calm.out, job.out)}
    worst = max(run["worst"] for run in runs.values())
    summary = {
        "kills": len(events),
        "by_target": dict(seen),
        "events": events,
        "runs": runs,
        "worst_weight_difference": worst,
        "same": worst <= 1e-5,
        "seconds": round(time.monotonic() - started, 1),
        "python": os.fspath(sys.version.split()[0]),
    }
    print(json.dumps(summary))
    return 0 if summary["same"] else 1


if __name__ == "__main__":
    sys.exit(main())
