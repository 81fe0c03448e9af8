"""What the cores did: CPU seconds by kind of process, of this process and all that it started.

Comes in: nothing. Goes out: plain numbers. Used beside a stage of generation: its engines compute, and the rest is what
Ray runs beside them.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil

# In a process's title; else it is Ray itself. A worker is of no kind until its first task.
RAYLET = "raylet/raylet"  # of kind ray: its command line also names all that it starts
KINDS = {"EpisodeActor": "engines", "Ledger": "ledger", "ray::": "tasks", "default_worker": "tasks"}
OF_RAY = {
    "gcs_server": "gcs",
    "log_monitor": "log monitor",
    "dashboard": "agents",
    "runtime_env": "agents",
    "monitor.py": "autoscaler",
}


@dataclass
class Processes:
    """CPU seconds since this object was made. `finely`: Ray's own processes one by one."""

    finely: bool = False
    _cpu: dict[tuple[str, int], float] = field(default_factory=dict)
    _before: dict[int, float] = field(default_factory=dict)  # CPU seconds of processes that were there before
    _titles: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.look()
        self._before = {pid: seconds for (_, pid), seconds in self._cpu.items()}

    def look(self) -> None:
        me = psutil.Process()
        for process in [me, *me.children(recursive=True)]:
            try:
                kind = "driver" if process.pid == me.pid else self._kind(process)
                spent = process.cpu_times()
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
            self._cpu[kind, process.pid] = spent.user + spent.system

    def seconds(self) -> Counter[str]:
        """By kind of process; those that ended between two looks are counted up to the last one."""
        found: Counter[str] = Counter()
        for (kind, pid), seconds in self._cpu.items():
            found[kind] += seconds - self._before.get(pid, 0.0)
        return found

    def _kind(self, process: psutil.Process) -> str:
        """An engine's process keeps its title; other workers change theirs with every task."""
        title = self._titles.get(process.pid)
        if title is None or title == "tasks":
            command = process.cmdline() or [process.name()]
            line = "" if command[0].endswith(RAYLET) else " ".join(command)
            kinds = {**KINDS, **OF_RAY} if self.finely else KINDS
            title = next((kind for mark, kind in kinds.items() if mark in line), "ray")
            if title != "tasks":
                self._cpu.pop(("tasks", process.pid), None)
            self._titles[process.pid] = title
        return title


@dataclass
class Cores:
    """Looks at the processes, every so many seconds of `time.time()`."""

    looks: list[tuple[float, Counter[str]]] = field(default_factory=list)

    def between(self, first: float, last: float) -> dict[str, float]:
        """Cores that each kind of process kept busy on average, between the looks next to these two moments."""
        inside = [look for look in self.looks if first <= look[0] <= last]
        if len(inside) < 2:
            return {}
        (start, before), (end, after) = inside[0], inside[-1]
        return {kind: round((seconds - before[kind]) / (end - start), 3) for kind, seconds in after.most_common()}


@contextmanager
def watched_cores(every: float = 0.5) -> Iterator[Cores]:
    """Look while the block runs; the looking itself is part of what the driver does."""
    processes, cores, done = Processes(finely=True), Cores(), threading.Event()

    def watch() -> None:
        while not done.wait(every):
            processes.look()
            cores.looks.append((time.time(), processes.seconds()))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield cores
    finally:
        done.set()
        thread.join()
