"""One schedule of the chaos suite, played on a cluster: the run's files, what is seen of it, and what is done to it.

Comes in: a schedule, a `Town`, rows of prompts. Goes out: a `Scene` that has ended, for `tests.chaos_checks` to judge.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from spa_ray.data.schemas import PROMPTS
from spa_ray.generation.seeds import seed_for
from tests.chaos_cluster import Driver, Town, complaint, engines, fill, reason, title
from tests.chaos_schedules import LOAD_S, PROMPT_S, STALL_S, START_S, Event, Schedule

POLL = 0.03
ATTEMPTS = 3
TRIES = 6  # starts of the driver beyond those that the schedule itself makes needful
ARRIVALS = 3  # starts that an engine is dead on arrival for
SUSPECT = 17  # the row whose prompt kills or stalls its engine
Key = tuple[str, int]  # prompt_id and attempt


class HungError(Exception):
    """Nothing moved for longer than the deadlines allow."""


def suspect(row: int) -> str:
    return f"question {row}?"


def config_of(schedule: Schedule, folder: Path) -> dict[str, Any]:
    """The run's config, as YAML (which JSON is)."""
    script: dict[str, Any] = {"trace": str(folder / "trace")}
    config: dict[str, Any] = {
        "name": "chaos",
        "run_dir": str(folder / "disk" / "run"),
        "model": {"path": "package://spa_ray.microworld/model", "engine": f"tests.chaos_engine:{schedule.engine}"},
        "prompts": {"source": str(folder / "prompts.parquet")},
        "sampling": {"n": 3, "max_tokens": 60},
        "refine": {"max_tokens": 100},
        "generation": {
            "rows_per_block": schedule.rows_per_block,
            "max_attempts": ATTEMPTS,
            "start_timeout_s": START_S,
            "stall_timeout_s": STALL_S,
            "prompt_timeout_s": PROMPT_S,
        },
        "resources": {
            "engines": {"min": schedule.engines, "max": schedule.engines},
            "concurrency": schedule.concurrency,
        },
    }
    if schedule.engine == "vllm":
        from spa_ray.cli.demo import demo_config

        demo = demo_config(full=False)
        for name in ("scoring", "refine", "sampling"):
            config[name] = demo[name]
        config["model"].update(dtype="float32", max_model_len=512)
        config["generation"].update(start_timeout_s=LOAD_S, stall_timeout_s=30.0)
    else:
        script.update(jitter=schedule.jitter, **_fault(schedule.fault, folder))
    config["model"]["engine_kwargs"] = script
    return config


def _fault(fault: str | None, folder: Path) -> dict[str, Any]:
    once = str(folder / "struck")
    return {
        "dies once": {"die": suspect(SUSPECT), "die_once": once},
        "always dies": {"die": suspect(SUSPECT)},
        "stalls once": {"hang": suspect(SUSPECT), "hang_once": once},
        "dead on arrival": {"dead_on_arrival": str(folder / "dead")},
        "dead for long": {"dead_on_arrival": str(folder / "dead")},
    }.get(fault or "", {})


class Scene:
    """A run on its way. `begins` counts, for each prompt and attempt, how often an engine was asked for its first
    answer; `promised` holds what that count was when the prompt's row was first seen committed; `unsure` what it may
    still reach for a row that was not committed when an engine or a node was lost, even if it is by now: its block may
    have reached the driver while the task that made it did not come to its end."""

    def __init__(self, schedule: Schedule, town: Town, folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
        self.schedule, self.town, self.folder = schedule, town, folder
        self.ids = [row["prompt_id"] for row in rows[: schedule.rows]]
        (folder / "disk").mkdir(parents=True, exist_ok=True)
        self.source = folder / "prompts.parquet"
        table = pa.Table.from_pylist([dict(row) for row in rows[: schedule.rows]], schema=PROMPTS)
        pq.write_table(table.select(["prompt_id", "messages"]), self.source)
        (folder / "config.yaml").write_text(json.dumps(config_of(schedule, folder)))
        self.driver = Driver(folder / "config.yaml", town.address)
        self._keys = {
            seed_for(0, 1, name, "sample", response=0, attempt=1000 * attempt): (name, attempt)
            for name in self.ids
            for attempt in range(ATTEMPTS)
        }
        self._read = 0
        self._known: dict[Path, list[str]] = {}
        self._void: set[Path] = set()  # checkpoints of rows that are no more
        self.begins: Counter[Key] = Counter()
        self.lives: dict[str, set[Key]] = {}
        self.promised: dict[Key, int] = {}
        self.unsure: dict[Key, int] = {}
        self.limits: list[tuple[str, int]] = []  # what may be asked again, and why
        self._open: int | None = None  # the limit that still grows with what engines begin before they are gone
        self.calm_risk = 0  # most rows begun and not committed, before anything was done
        self.done: list[str] = []
        self.missed: list[str] = []
        self.failures: list[str] = []
        self.expected: list[str] = []  # patterns of failures that the schedule asks for
        self.mends: list[Callable[[], object]] = []  # what the user does before the next start
        self.wrong: list[str] = []  # violations that show on the way
        self.silence = 0.0
        self.deaths = 0  # engine processes killed while they held prompts

    # --- what can be seen -------------------------------------------------------------------------------------------

    @property
    def stage(self) -> Path | None:
        found = sorted((self.folder / "disk" / "run" / "stages").glob("generate-*"))
        return found[0] if found else None

    def look(self) -> tuple[int, ...]:
        """Read what is new. Returns: births, bytes of the trace, committed rows, and whether the driver's stage is
        there: any change is a sign of life."""
        committed = self.committed()
        lines = self._trace()
        for key in committed:
            self.promised.setdefault(key, self.begins[key])
        at_risk = len(self._uncommitted())
        if self._open is not None:
            label, value = self.limits[self._open]
            self.limits[self._open] = (label, max(value, at_risk))
        elif not self.limits:
            self.calm_risk = max(self.calm_risk, at_risk)
        return len(self.lives), lines, len(committed), self.driver.starts, self.stage is not None

    def _uncommitted(self) -> list[Key]:
        return [key for key in self.begins if key not in self.promised]

    def _lose(self) -> None:
        """An engine or a node is about to be lost."""
        self.look()
        self.unsure.update({key: self.begins[key] + 1 for key in self._uncommitted()})

    def committed(self) -> set[Key]:
        found: set[Key] = set()
        stage = self.stage
        for file in stage.glob("checkpoint/part=*/*.parquet") if stage else ():
            if ".pending" in file.name or file in self._void:
                continue
            if file not in self._known:
                try:
                    self._known[file] = pq.read_table(file)["prompt_id"].to_pylist()
                except (OSError, pa.ArrowInvalid):
                    continue  # cut, by us
            part = int(file.parent.name.partition("=")[2])
            found.update((name, part) for name in self._known[file])
        return found

    def _trace(self) -> int:
        path = self.folder / "trace"
        if not path.exists():
            return 0
        with path.open() as file:
            file.seek(self._read)
            text = file.read()
        whole = text[: text.rfind("\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            words = line.split()
            if words[0] == "born":
                self.lives[words[1]] = set()
                self._open = None  # whoever was to die has died
            elif int(words[1]) in self._keys:
                key = self._keys[int(words[1])]
                self.begins[key] += 1
                self.lives.setdefault(words[0], set()).add(key)
        return self._read

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait. Raises: HungError."""
        last, moved = self.look(), time.monotonic()
        while not condition():
            time.sleep(POLL)
            seen = self.look()
            if seen != last:
                last, moved = seen, time.monotonic()
            self.silence = max(self.silence, time.monotonic() - moved)
            if time.monotonic() - moved > self.schedule.patience:
                raise HungError(f"nothing moved for {self.schedule.patience:.0f} s; see {self.driver.output()}")

    # --- the play ---------------------------------------------------------------------------------------------------

    def play(self) -> None:
        """Raises: HungError."""
        self._set()
        self.driver.start()
        for event in self.schedule.events:
            self._run_until(partial(self._reached, event))
            if self.driver.poll() == 0:
                self.missed.append(str(event))
                continue
            said = self._act(event)
            self.done.append(f"{event}{f' ({said})' if said else ''}")
        self._run_until(lambda: False)

    def _set(self) -> None:
        fault = self.schedule.fault
        if fault in ("dead on arrival", "dead for long"):
            (self.folder / "dead").touch()
        if fault == "dead for long":
            self.expected.append("started 6 times without answering one prompt.*dead on arrival")
            self.mends.append(lambda: (self.folder / "dead").unlink())
        if fault == "cut input":
            whole = self.source.read_bytes()
            self.source.write_bytes(whole[: len(whole) // 2])
            self.expected.append(re.escape(str(self.source)))
            self.mends.append(lambda: self.source.write_bytes(whole))
        if fault in ("dies once", "stalls once"):
            self.limits.append((fault, self.schedule.engine_bound))
            self.deaths += 1

    def _run_until(self, condition: Callable[[], bool]) -> None:
        """Until then, or until the run has ended well; a driver that fails is mended and started again."""
        while True:
            self.until(lambda: condition() or self.driver.poll() is not None or self._arrived())
            status = self.driver.poll()
            if status is None and condition():
                return
            if status == 0:
                return
            if status is not None:
                self._failed(status)

    def _arrived(self) -> bool:
        """Engines that are dead on arrival come to life after a few starts."""
        if self.schedule.fault == "dead on arrival" and len(self.lives) >= ARRIVALS:
            (self.folder / "dead").unlink(missing_ok=True)
        return False

    def _reached(self, event: Event) -> bool:
        return event.count <= (len(self.begins) if event.when == "begun" else len(self.promised))

    def _failed(self, status: int) -> None:
        output = self.driver.output()
        said = complaint(output, status)
        if said:
            self.wrong.append(f"start {self.driver.starts}: {said}")
        self.failures.append(reason(output))
        if not any(re.search(pattern, reason(output)) for pattern in self.expected):
            self.wrong.append(f"start {self.driver.starts} failed for nothing: {reason(output)}")
        if len(self.failures) > TRIES:
            raise HungError(f"{TRIES} starts failed; the last: {reason(output)}")
        if self.mends:
            self.mends.pop(0)()
        self.risk("driver failed")
        self.driver.start()

    def risk(self, label: str) -> None:
        """From now on all that is begun and not committed may be asked again."""
        self.limits.append((label, 0))
        self._open = len(self.limits) - 1
        self.look()

    # --- acts -------------------------------------------------------------------------------------------------------

    def _act(self, event: Event) -> str:
        return {
            "kill engine": self._kill_engine,
            "kill worker": self._kill_worker,
            "kill node": self._kill_node,
            "kill driver": self._kill_driver,
            "second driver": self._second_driver,
            "fill disk": self._fill_disk,
            "cut rows": self._cut_rows,
            "cut checkpoint": self._cut_checkpoint,
            "freeze engine": self._freeze_engine,
        }[event.act](event)

    def _pick(self, event: Event, among: list[psutil.Process], sent: signal.Signals) -> str:
        if not among:
            return "nothing there"
        process = sorted(among, key=lambda p: p.pid)[int(event.choice * len(among))]
        name = title(process)
        self._lose()
        with suppress(psutil.NoSuchProcess):
            process.send_signal(sent)
        if "EpisodeActor" in name:
            self.deaths += 1
            self.limits.append((str(event), self.schedule.engine_bound))
        return name

    def _kill_engine(self, event: Event) -> str:
        return self._pick(event, engines(self.town.workers()), signal.SIGKILL)

    def _kill_worker(self, event: Event) -> str:
        """Any worker that does something, engines or not."""
        return self._pick(event, self.town.busy(), signal.SIGKILL)

    def _kill_node(self, event: Event) -> str:
        self.risk(str(event))
        node = self.town.nodes[int(event.choice * len(self.town.nodes))]
        held = len(engines(self.town.workers()))
        self._lose()
        self.town.lose_node(node)
        lost = held - len(engines(self.town.workers()))
        self.look()
        self.town.add_node()
        return f"with {lost} engines"

    def _kill_driver(self, event: Event) -> str:
        self.driver.kill()
        self.risk(str(event))
        self.driver.start()
        return ""

    def _second_driver(self, event: Event) -> str:
        command = [sys.executable, "-m", "spa_ray.cli.main", "run", str(self.driver.config), "--until", "generate"]
        output = self.folder / "second.out"
        with output.open("wb") as out:
            status = subprocess.run(
                command, cwd=self.folder, stdout=out, stderr=out, timeout=self.schedule.patience, check=False
            ).returncode
        if status == 0 and self.driver.poll() == 0:
            return "too late"
        said = complaint(output, status)
        if said or status != 2 or "in use by" not in reason(output):
            self.wrong.append(f"second driver: exit {status}: {said or reason(output)}")
        return "refused"

    def _fill_disk(self, event: Event) -> str:
        """Some users try again before they give space."""
        ballast = fill(self.folder / "disk")
        self.expected.append("No space left|GiB free")
        self.mends += [*([lambda: None] if event.choice < 0.5 else []), ballast.unlink]
        return ""

    def _cut(self, event: Event, folder: str) -> tuple[Path, Path]:
        """Kill the driver, wait for its engines to be gone, and cut a file of committed rows, or of their checkpoint,
        in two. Returns: the file that is cut, and the checkpoint of its rows."""
        self.driver.kill()
        self.risk(str(event))
        self.wrong += [f"left behind: {name}" for name in self.town.settle()]
        self.look()
        assert self.stage is not None
        checkpoints = [f for f in sorted(self.stage.glob("checkpoint/part=*/*.parquet")) if ".pending" not in f.name]
        checkpoint = checkpoints[int(event.choice * len(checkpoints))]
        (rows,) = self.stage.glob(f"episodes/{checkpoint.parent.name}/{checkpoint.stem}*")
        file = {"episodes": rows, "checkpoint": checkpoint}[folder]
        with file.open("r+b") as cut:
            cut.truncate(file.stat().st_size // 2)
        return file, checkpoint

    def _cut_rows(self, event: Event) -> str:
        """The reader names the file; its user deletes it, and its rows are asked again."""
        file, checkpoint = self._cut(event, "episodes")
        self.expected.append(re.escape(str(file)))
        self.mends.append(file.unlink)
        for name in self._known[checkpoint]:
            self.promised.pop((name, int(file.parent.name.partition("=")[2])), None)
        self._void.add(checkpoint)
        self.driver.start()
        return file.name

    def _cut_checkpoint(self, event: Event) -> str:
        """Nobody needs to do anything: the rows themselves say what is done."""
        file, _ = self._cut(event, "checkpoint")
        self.driver.start()
        return file.name

    def _freeze_engine(self, event: Event) -> str:
        self.expected.append("no progress|without a sign")
        return self._pick(event, engines(self.town.workers()), signal.SIGSTOP)
