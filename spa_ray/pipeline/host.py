"""The memory of the machines that hold offloaded optimizer state: this one's, or those that a cluster's nodes name.

Returns `Host`s; None where nothing is known. Starts nothing and asks no GPU library.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from spa_ray.config.models import Resources
from spa_ray.pipeline.placement import Node
from spa_ray.pipeline.ray_address import named_address

GIB = 1024**3
MOST_RANKS = 8  # of one node, where nothing says how many GPUs it has
# What limits a container's memory, below the machine's: cgroups of version 2 and 1.
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
DEVICES = Path("/dev")


@dataclass(frozen=True)
class Host:
    """`gib` of memory of one machine, which at most so many `ranks` share; `what` names it in a message."""

    gib: float
    ranks: int
    what: str


def memory_gib() -> float:
    """This machine's memory, or its container's where that has less."""
    found = [float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))]
    for file in LIMITS:
        try:
            text = file.read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit():  # version 2 says «max» where there is no limit
            found.append(float(text))
    return min(found) / GIB


def planned_host(resources: Resources, *, on_gpus: bool) -> Host | None:
    """What a plan may take: the config's key, else this machine where the run would be on it."""
    if resources.host_memory_gib:
        return Host(resources.host_memory_gib, MOST_RANKS, "a node")
    gpus = len(list(DEVICES.glob("nvidia[0-9]*")))
    if named_address() is not None or (on_gpus and not gpus):
        return None
    share = resources.gpus_per_worker or 1.0
    return Host(memory_gib(), max(1, int(gpus / share)) if on_gpus else resources.train_workers, "this machine")


def largest_host(resources: Resources, nodes: Iterable[Node], *, gpus: float) -> Host | None:
    """The node with most memory among those that can hold a rank of so many GPUs, by what Ray counts there; the
    config's key where it is set. Nodes that an autoscaler may bring are not known."""
    need = {"GPU": gpus} if gpus else {"CPU": resources.cpus_per_worker}
    ((kind, amount),) = need.items()
    found = []
    for node in nodes:
        ranks = int(node.resources.get(kind, 0.0) / amount)
        memory = node.resources.get("memory", 0.0)
        if ranks and memory:
            gib = (memory + node.resources.get("object_store_memory", 0.0)) / GIB
            found.append(Host(resources.host_memory_gib or gib, ranks, "a node"))
    if not found and resources.host_memory_gib:
        return Host(resources.host_memory_gib, MOST_RANKS, "a node")
    return max(found, key=lambda host: host.gib, default=None)
