"""Whether training fits into the GPUs and the memory that a cluster has, before anything is generated for it.

Takes arm configs, the base model's folder and a connected Ray's nodes. Raises InputError with the change that makes it
fit. On CPUs only what `train.offload` keeps in memory is checked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from spa_ray.config.gpus import gpus_wanted
from spa_ray.config.models import Config
from spa_ray.errors import InputError
from spa_ray.pipeline.host import largest_host
from spa_ray.pipeline.placement import Node
from spa_ray.pipeline.plan_memory import refusal
from spa_ray.pipeline.plan_model import model_facts

# GiB of the GPUs that Ray names in a node's `accelerator_type:…`; of a name with several sizes the smallest.
TYPES = {
    "V100": 16, "P100": 16, "T4": 16, "A10G": 24, "L4": 24, "L40S": 48, "A100": 40, "A100-40G": 40, "A100-80G": 80,
    "H100": 80, "H200": 141, "H20": 96, "B200": 180, "GB200": 186, "B300": 270, "GB300": 270, "RTX-PRO-6000": 96,
}  # fmt: skip


def check_training_memory(arms: Mapping[str, Config], base: Path, nodes: Iterable[Node]) -> None:
    """Refuse training that does not fit. `resources.gpu_memory_gib` is taken where it is set, else the smallest GPU
    that the nodes name, else the plan's assumption; of the hosts `resources.host_memory_gib`, else the largest node's
    memory by Ray. Raises: InputError."""
    first, nodes = next(iter(arms.values())), list(nodes)
    gpus = sum(node.resources.get("GPU", 0.0) for node in nodes)
    each = gpus_wanted(first.resources.gpus_per_worker, 1.0, cluster_gpus=gpus, key="resources.gpus_per_worker")
    host = largest_host(first.resources, nodes, gpus=each)
    found = first.resources.gpu_memory_gib or smallest_gpu(nodes)
    with_memory = {
        name: config.model_copy(update={"resources": config.resources.model_copy(update={"gpu_memory_gib": found})})
        for name, config in arms.items()
    }
    said = refusal(with_memory, model_facts(first.model, [], base), host, gpu=each > 0)
    if said is not None and "gpu_memory_gib" in said and found and not first.resources.gpu_memory_gib:
        said += f"; {found:g} GiB is the smallest GPU of the type that Ray names: where it has more, say so by that key"
    if said is not None:
        raise InputError(said)


def smallest_gpu(nodes: Iterable[Node]) -> float | None:
    """GiB of the smallest GPU among those whose type Ray knows; None where it knows none."""
    named = [
        TYPES[found.group(1)]
        for node in nodes
        for key in node.resources
        if (found := re.fullmatch(r"accelerator_type:(.+)", key)) and found.group(1) in TYPES
    ]
    return float(min(named)) if named else None
