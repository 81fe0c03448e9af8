"""How many GPUs an actor asks for where the config leaves it open.

Comes in: the key's value, the GPUs that the cluster has now. Goes out: a number. Never: Ray, torch.
"""

from __future__ import annotations

from importlib.metadata import version

from spa_ray.errors import InputError


def gpus_wanted(asked: float | None, on_gpus: float, *, cluster_gpus: float, key: str) -> float:
    """GPUs of an actor: as the key says, else `on_gpus` where the cluster has a GPU, else none.

    Raises: InputError where that would be a guess: no GPU is there, yet the installed packages are the GPU set (a
    cluster that starts its GPU nodes only when they are asked for).
    """
    if asked is not None:
        return asked
    if cluster_gpus:
        return on_gpus
    if cuda_build():
        raise InputError(
            f"{key}: the cluster has no GPU now and the installed torch is a CUDA build; say {key}={on_gpus:g} where "
            f"the cluster starts GPU nodes on demand, {key}=0 to run on CPUs"
        )
    return 0.0


def cuda_build() -> bool:
    """Whether the installed torch is one for GPUs (its CPU build says so in its version)."""
    return "+cpu" not in version("torch")
