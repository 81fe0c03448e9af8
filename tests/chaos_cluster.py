"""What the chaos suite runs on: a Ray cluster of several nodes on this machine, and drivers that can be killed.

A node is a raylet with its workers; the head has no CPU, so that all work lies on nodes that may be lost. The driver is
`spa run` in a process of its own. Every process is ended by its pid.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parent.parent
NODE_CPUS = 3
STORE = 100_000_000  # bytes, of each node's object store
FAILURES = 3  # health checks that a node may miss
PERIOD_MS = 1000
GONE_SECONDS = 30.0  # for the processes of a driver or of a node to be gone
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")  # of a node
# Ray Data's own, one a cluster: they stay when a driver ends.
DETACHED = (
    "ray::_StatsActor",
    "ray::_AutoscalingCoordinatorActor",
    "ray::_UsageCollectionActor",
    "ray::ActorLocationTracker",
)


class Town:
    """The cluster: a head and `nodes` more."""

    def __init__(self, nodes: int = 2) -> None:
        from ray.cluster_utils import Cluster

        path = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{path}" if path else str(ROOT)  # of every worker
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        # Ray makes its workers nicer than other processes: on a machine that does something else they would starve.
        settings = {
            "health_check_period_ms": PERIOD_MS,
            "health_check_failure_threshold": FAILURES,
            "worker_niceness": 0,
        }
        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE, "_system_config": settings}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes: list[Any] = []
        self._strays: list[psutil.Process] = []  # workers of lost nodes
        for _ in range(nodes):
            self.add_node()

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def add_node(self) -> None:
        self.nodes.append(self.cluster.add_node(num_cpus=NODE_CPUS, object_store_memory=STORE))

    def lose_node(self, node: Any) -> None:
        """All of its own processes are killed at once; its workers must end by themselves."""
        self._strays += workers_of(node)
        self.cluster.remove_node(node, allow_graceful=False)
        self.nodes.remove(node)

    def workers(self) -> list[psutil.Process]:
        """Python workers of all nodes, idle ones too."""
        return [w for node in [self.cluster.head_node, *self.nodes] for w in workers_of(node)]

    def busy(self) -> list[psutil.Process]:
        """Workers that hold an actor or run a task."""
        return [w for w in self.workers() if title(w) not in ("", "ray::IDLE")]

    def left(self) -> list[psutil.Process]:
        """Workers that a driver has left behind, or a lost node."""
        working = [w for w in self.busy() if not title(w).startswith(DETACHED)]
        return [*working, *(w for w in self._strays if title(w))]

    def settle(self) -> list[str]:
        """Wait until none is left. Returns: titles of those that stay.

        Ray asks an actor to end and does not insist: one that stands still (SIGSTOP) and that the pass could do without
        stays until its node goes. It is ended here.
        """
        for frozen in self.left():
            with suppress(psutil.Error):
                if frozen.status() == psutil.STATUS_STOPPED:
                    frozen.kill()
        deadline = time.monotonic() + GONE_SECONDS
        while (left := self.left()) and time.monotonic() < deadline:
            time.sleep(0.1)
        self._strays = [w for w in self._strays if title(w)]
        return [title(w) for w in left]

    def shutdown(self) -> list[str]:
        """End it. Returns: the command lines of processes that stay."""
        known = [p for node in [self.cluster.head_node, *self.nodes] for p in family_of(node)]
        self.cluster.shutdown()
        psutil.wait_procs(known, timeout=GONE_SECONDS)
        left = [title(p) for p in known if title(p)]
        for process in known:
            with suppress(psutil.Error):
                process.kill()
        return left


@contextmanager
def town(nodes: int = 2) -> Iterator[Town]:
    built = Town(nodes)
    try:
        yield built
    finally:
        built.shutdown()


def workers_of(node: Any) -> list[psutil.Process]:
    return [p for p in family_of(node) if title(p).startswith("ray::") and not title(p).startswith(AGENTS)]


def family_of(node: Any) -> list[psutil.Process]:
    """A node's own processes and all that descend from them."""
    found: list[psutil.Process] = []
    for infos in node.all_processes.values():
        for info in infos:
            with suppress(psutil.Error):
                process = psutil.Process(info.process.pid)
                found += [process, *process.children(recursive=True)]
    return found


def title(process: psutil.Process) -> str:
    """The process's command line, empty when it is gone."""
    try:
        return "" if process.status() == psutil.STATUS_ZOMBIE else " ".join(process.cmdline()).strip()
    except psutil.Error:
        return ""


def engines(workers: Iterable[psutil.Process]) -> list[psutil.Process]:
    return [w for w in workers if "EpisodeActor" in title(w)]


@dataclass
class Driver:
    """`spa run CONFIG --until generate` against a cluster; `start` it as often as need be. One output file a start."""

    config: Path
    address: str
    starts: int = 0
    process: subprocess.Popen[bytes] | None = None
    _members: list[psutil.Process] = field(default_factory=list)

    def start(self) -> None:
        self.starts += 1
        command = [sys.executable, "-m", "spa_ray.cli.main", "run", str(self.config), "--until", "generate", "--json"]
        environment = {**os.environ, "RAY_ADDRESS": self.address}
        with self.output().open("wb") as out:
            self.process = subprocess.Popen(
                command, cwd=self.config.parent, env=environment, stdout=out, stderr=out, start_new_session=True
            )

    def output(self) -> Path:
        return self.config.with_name(f"driver-{self.starts}.out")

    def poll(self) -> int | None:
        assert self.process is not None
        return self.process.poll()

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def left(self) -> list[str]:
        """Members of the session of any driver that was started: none may outlive its driver."""
        return [] if self.process is None else [title(p) for p in session(self.process.pid)]


def session(leader: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError, PermissionError):
            if os.getsid(process.pid) == leader and title(process):
                found.append(process)
    return found


def complaint(output: Path, status: int) -> str | None:
    """What is wrong with how a driver failed: anything but exit 1 or 2 with one last line `spa: …`. None when nothing.

    Lines before it may be warnings and progress, never a traceback.
    """
    lines = [line for line in output.read_text(errors="replace").splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("spa: ")]
    if status not in (1, 2):
        return f"exit {status}: {lines[-1:]}"
    if any("Traceback" in line or "Logging error" in line for line in lines):
        return f"exit {status} with a traceback: {lines[-1:]}"
    if len(said) != 1 or lines[-1] != said[0]:
        return f"exit {status} without one last line: {lines[-3:]}"
    return None


def reason(output: Path) -> str:
    """The one line of a driver that failed."""
    said = [line for line in output.read_text(errors="replace").splitlines() if line.startswith("spa: ")]
    return said[-1] if said else "?"


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    """A disk of its own at `folder` (a tmpfs, which only root may mount). Raises: OSError where that is not allowed."""
    folder.mkdir(parents=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if done.returncode:
        raise OSError(f"{folder}: no small disk: {done.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def may_mount() -> bool:
    return os.geteuid() == 0


def fill(folder: Path) -> Path:
    """Take all space that is left on a disk. Returns: the file that holds it."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"\0" * 4096)
    return ballast
