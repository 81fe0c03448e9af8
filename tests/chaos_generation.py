"""Kill everything that a generation pass consists of, at random, and look whether a row is lost, doubled or changed.

    python -m tests.chaos_generation --schedules 100 --seed 0 [--engine scripted|vllm] [--only N]

Each schedule (tests/chaos_schedules.py) is one run of `spa run` on a local Ray of several nodes, to which up to three
things happen; afterwards tests/chaos_checks.py judges. Prints one JSON object; exit status 1 on any violation.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa

from tests.chaos_checks import bound, repeats, verdict
from tests.chaos_cluster import Town, may_mount, small_disk
from tests.chaos_scene import HungError, Scene, suspect
from tests.chaos_schedules import Schedule, draw

ROWS = 60
DISK_MB = 64


def prompts_of(engine: str) -> list[dict[str, Any]]:
    """Rows of PROMPTS; a schedule takes the first few."""
    if engine == "vllm":
        from itertools import islice

        from spa_ray.cli.demo import demo_config
        from spa_ray.config import arm_configs
        from spa_ray.data.prompts import read_prompts

        config = next(iter(arm_configs(demo_config(full=False), [], where="chaos", stem="chaos").values()))
        return [dict(row) for row in islice(read_prompts(config.prompts), ROWS)]
    return [
        {"prompt_id": f"p{k:02d}", "messages": [{"role": "user", "content": suspect(k)}], "meta": "{}"}
        for k in range(ROWS)
    ]


def calm_run(town: Town, engine: str, folder: Path) -> pa.Table:
    """The rows of an undisturbed run of all prompts."""
    from spa_ray.data.episodes import EpisodeFolder

    quiet = Schedule("calm", ROWS, 8, 32, 1, 0.0, None, (), engine)
    scene = Scene(quiet, town, folder, prompts_of(engine))
    scene.play()
    wrong = verdict(scene, None)
    if wrong or repeats(scene) or scene.failures:
        raise RuntimeError(f"the undisturbed run: {wrong or scene.failures}; see {folder}")
    assert scene.stage is not None
    return EpisodeFolder(scene.stage / "episodes").table()


def play(schedule: Schedule, town: Town, folder: Path, calm: pa.Table | None) -> dict[str, Any]:
    """One schedule, and what came of it. Its folder stays when something was wrong."""
    started = time.monotonic()
    disk = any(event.act == "fill disk" for event in schedule.events)
    with small_disk(folder / "disk", DISK_MB) if disk else nullcontext():
        scene = Scene(schedule, town, folder, prompts_of(schedule.engine))
        try:
            scene.play()
            wrong = verdict(scene, calm)
        except HungError as e:
            wrong = [*scene.wrong, f"hung: {e}"]
        finally:
            if scene.driver.process is not None and scene.driver.poll() is None:
                scene.driver.kill()
                town.settle()
    if not wrong:
        shutil.rmtree(folder)
    return {
        "schedule": schedule.name,
        "shape": f"{schedule.rows} rows in blocks of {schedule.rows_per_block}, {schedule.engines} engines of "
        f"{schedule.concurrency}",
        "fault": schedule.fault,
        "events": scene.done,
        "missed": scene.missed,
        "starts": scene.driver.starts,
        "failures": scene.failures,
        "engine_lives": len(scene.lives),
        "repeats": repeats(scene),
        "bound": bound(scene),
        "in_flight": scene.calm_risk,
        "in_engines": schedule.engines * schedule.engine_bound,
        "silence": round(scene.silence, 1),
        "seconds": round(time.monotonic() - started, 1),
        "wrong": wrong,
    }


def summary(results: Sequence[Mapping[str, Any]], seconds: float) -> dict[str, Any]:
    acts = Counter(event.split(" at ")[0] for result in results for event in result["events"])
    faults = Counter(result["fault"] for result in results if result["fault"])
    return {
        "schedules": len(results),
        "events": dict(acts.most_common()),
        "faults": dict(faults.most_common()),
        "missed": sum(len(result["missed"]) for result in results),
        "starts": sum(result["starts"] for result in results),
        "engine_lives": sum(result["engine_lives"] for result in results),
        "repeats": sum(result["repeats"] for result in results),
        "bound": sum(result["bound"] for result in results),
        "longest_silence": max((result["silence"] for result in results), default=0.0),
        "violations": {result["schedule"]: result["wrong"] for result in results if result["wrong"]},
        "seconds": round(seconds, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=["scripted", "vllm"], default="scripted")
    parser.add_argument("--only", type=int, help="this schedule alone")
    parser.add_argument("--first", type=int, default=0, help="begin with this schedule")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no schedule after so long")
    parser.add_argument("--log", type=Path, help="a file that gets one line of JSON a schedule")
    arguments = parser.parse_args()
    if not may_mount():
        print("not root: no small disk can be made, so none is filled", file=sys.stderr)
    numbers = range(arguments.first, arguments.schedules) if arguments.only is None else [arguments.only]
    folder, started, results = Path(tempfile.mkdtemp(prefix="chaos-generation-")), time.monotonic(), []
    town = Town()
    try:
        calm = calm_run(town, arguments.engine, folder / "calm")
        for number in numbers:
            if time.monotonic() - started > 60 * arguments.minutes:
                break
            schedule = draw(number, arguments.seed, engine=arguments.engine, disks=may_mount())
            result = play(schedule, town, folder / schedule.name, calm)
            results.append(result)
            print(json.dumps(result), file=sys.stderr, flush=True)
            if arguments.log:
                with arguments.log.open("a") as log:
                    log.write(json.dumps(result) + "\n")
    finally:
        left = town.shutdown()
    report = summary(results, time.monotonic() - started)
    if left:
        report["violations"]["shutdown"] = left
    print(json.dumps(report))
    return 1 if report["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
