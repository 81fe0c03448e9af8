"""What one engine asks of the cluster: the CPUs and GPUs of the actor that it lives in.

Comes in: the model and resources sections, the GPUs that the cluster has now. Goes out: Ray's resource arguments.
An engine of several GPUs lives in ONE actor that owns them all: vLLM starts a worker process for each beside it, and
they see the GPUs that Ray gave the actor. So an engine never spans nodes. Never: Ray, vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping

from spa_ray.config.gpus import gpus_wanted
from spa_ray.config.models import Model, Resources
from spa_ray.errors import InputError

# Keys of EngineArgs that would place the engine otherwise than its actor is placed.
ELSEWHERE = {
    "tensor_parallel_size": "set model.tensor_parallel_size",
    "data_parallel_size": "set resources.engines: each engine is a replica",
    "nnodes": "an engine lives in one actor, on one node",
    "distributed_executor_backend": "leave it out: the actor owns the GPUs, and another backend would ask for more",
}


def engine_world(model: Model) -> int:
    """GPUs (on a CPU host: worker processes) that share one engine."""
    return model.tensor_parallel_size * int(model.engine_kwargs.get("pipeline_parallel_size", 1))


def executor_backend(model: Model) -> str | None:
    """vLLM's `distributed_executor_backend`, said outright, since vLLM's own choice depends on where it finds itself.

    `mp` for several GPUs: inside a Ray placement group vLLM would take `ray`, and wait for GPUs that its actor holds.
    """
    return "mp" if engine_world(model) > 1 else None


def check_placement(model: Model, resources: Resources) -> None:
    """Raises: InputError where one vLLM engine and `resources.gpus_per_engine` do not fit together."""
    if model.own_engine:
        return
    for key, mend in ELSEWHERE.items():
        if key in model.engine_kwargs:
            raise InputError(f"model.engine_kwargs.{key}: not here; {mend}")
    gpus, world = resources.gpus_per_engine, engine_world(model)
    if not gpus or gpus == world:
        return
    if gpus > 1 or world > 1:
        raise InputError(
            f"resources.gpus_per_engine is {gpus:g}, but an engine uses {world}; say {world}, or leave it out"
        )
    share = model.engine_kwargs.get("gpu_memory_utilization")
    if share is None or share > gpus:
        raise InputError(
            f"resources.gpus_per_engine is {gpus:g}: engines that share a GPU must share its memory; set "
            f"model.engine_kwargs.gpu_memory_utilization to {gpus:g} or less"
        )


def engine_cpus(resources: Resources) -> float:
    """Logical CPUs that one engine's actor asks for."""
    return 1.0 if resources.cpus_per_engine is None else resources.cpus_per_engine


def takes_all_cores(resources: Resources, *, gpus: float, environment: Mapping[str, str]) -> bool:
    """Whether an engine computes with every core of its machine rather than one per logical CPU that it asks for: it is
    the only one, it has no GPU, and neither the config nor the driver's environment says a number of threads."""
    alone = resources.cpus_per_engine is None and resources.engines.max == 1 and not gpus
    return alone and "OMP_NUM_THREADS" not in environment


def engine_resources(model: Model, resources: Resources, *, cluster_gpus: float) -> dict[str, float]:
    """Ray's resource arguments of one engine's actor. Raises: InputError as `check_placement` and `gpus_wanted` do."""
    check_placement(model, resources)
    gpus = gpus_wanted(
        resources.gpus_per_engine, engine_world(model), cluster_gpus=cluster_gpus, key="resources.gpus_per_engine"
    )
    return {"num_cpus": engine_cpus(resources), **({"num_gpus": gpus} if gpus else {})}
