"""An autoscaling Ray cluster on one machine: a head with a dashboard, and nodes that its autoscaler starts and stops.

A fake node provider (tests/fake_nodes.py) starts each node as a raylet beside the head. All ports are free ones and all
files lie in a folder of its own, so other Rays of the machine are untouched; at the end every process of it is killed
by its pid.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

PROVIDER = "fake_nodes.SeparateNodes"  # tests/fake_nodes.py, on the path of the cluster's processes
HEAD = "ray.head.default"
START_SECONDS = 180.0
STOP_SECONDS = 30.0
OBJECT_STORE = 100_000_000  # bytes, of each node


@dataclass(frozen=True)
class FakeCluster:
    """A running one. `workers` is how many nodes live besides the head."""

    dashboard: str
    process: int
    mark: str
    folder: Path

    def workers(self) -> int:
        from ray.util.state import list_nodes

        nodes = list_nodes(address=self.dashboard, timeout=10, raise_on_missing_output=False)
        return sum(node.state == "ALIVE" and not node.is_head_node for node in nodes)

    def processes(self) -> list[psutil.Process]:
        """Every process that it started: the descendants of its first one, and whoever else bears its mark."""
        alive: dict[int, psutil.Process] = {}
        parents: dict[int, int] = {}
        found: set[int] = set()
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE:
                    alive[process.pid], parents[process.pid] = process, process.ppid()
                    if process.pid == self.process or process.environ().get("SPA_TEST_CLUSTER") == self.mark:
                        found.add(process.pid)
        while born := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= born
        return [alive[pid] for pid in sorted(found & alive.keys())]

    def log(self) -> str:
        return (self.folder / "ray_start.log").read_text(encoding="utf-8", errors="replace")


def wait_until(condition: Callable[[], bool], seconds: float, what: str, pause: float = 0.3) -> None:
    """Raises: TimeoutError, saying what did not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(pause)


@contextmanager
def fake_cluster(
    worker: Mapping[str, int], *, head_cpus: int = 4, max_workers: int = 2, idle_seconds: float = 8
) -> Iterator[FakeCluster]:
    """A head with `head_cpus`, and up to `max_workers` nodes with the resources of `worker`, none at the start."""
    folder = Path(tempfile.mkdtemp(prefix="spa", dir="/tmp"))  # short: sockets lie below it
    port, dashboard, client, agent = free_ports(4)
    mark = uuid.uuid4().hex
    config = folder / "autoscaling.json"
    config.write_text(json.dumps(autoscaling(worker, head_cpus, max_workers, idle_seconds / 60, f"{own_ip()}:{port}")))
    command = [
        str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--port={port}",
        f"--autoscaling-config={config}", f"--temp-dir={folder}", f"--num-cpus={head_cpus}", "--num-gpus=0",
        f"--object-store-memory={OBJECT_STORE}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
        f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}",
        "--min-worker-port=0", "--max-worker-port=0",
    ]  # fmt: skip
    with (folder / "ray_start.log").open("w") as log:
        head = subprocess.Popen(command, env=environment(mark), cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    cluster = FakeCluster(f"http://127.0.0.1:{dashboard}", head.pid, mark, folder)
    try:
        wait_until(lambda: answers(cluster, head), START_SECONDS, "the dashboard")
        yield cluster
    finally:
        stop(cluster)
        head.wait(timeout=STOP_SECONDS)
        shutil.rmtree(folder, ignore_errors=True)


def answers(cluster: FakeCluster, head: subprocess.Popen[bytes]) -> bool:
    from ray.util.state.exception import RayStateApiException

    if head.poll() is not None:
        raise RuntimeError(f"`ray start` ended:\n{cluster.log()}")
    try:
        return cluster.workers() >= 0
    except (RayStateApiException, ConnectionError, OSError):
        return False


def stop(cluster: FakeCluster) -> None:
    """Kill its processes, by pid, until none is left."""

    def gone() -> bool:
        left = cluster.processes()
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=1)
        return not left

    wait_until(gone, STOP_SECONDS, "the end of the cluster's processes")


def autoscaling(
    worker: Mapping[str, int], head_cpus: int, max_workers: int, idle_minutes: float, address: str
) -> dict[str, Any]:
    """What `ray start --autoscaling-config` wants to read, most of it empty for this provider."""
    return {
        "cluster_name": "fake",
        "max_workers": max_workers,
        "idle_timeout_minutes": idle_minutes,
        "upscaling_speed": 10.0,
        "provider": {
            "type": "external",
            "module": PROVIDER,
            "gcs_address": address,
            "use_node_id_as_ip": True,  # all nodes have this machine's address
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "head_node_type": HEAD,
        "available_node_types": {
            HEAD: {"resources": {"CPU": head_cpus}, "node_config": {}, "max_workers": 0},
            "worker": {
                "resources": {**worker, "object_store_memory": OBJECT_STORE},
                "node_config": {},
                "min_workers": 0,
                "max_workers": max_workers,
            },
        },
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        "cluster_synced_files": [],
        "rsync_exclude": [],
        "rsync_filter": [],
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
    }


def environment(mark: str) -> dict[str, str]:
    """This process's environment without what names another Ray, with what the fake nodes need."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(Path(__file__).parent),
        "SPA_TEST_CLUSTER": mark,
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "0",  # the fake provider is one of v1
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def own_ip() -> str:
    """The address at which Ray's head will listen."""
    from ray.util import get_node_ip_address

    return get_node_ip_address()
