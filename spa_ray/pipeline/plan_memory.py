"""Whether training fits into the GPUs and hosts of a config, and if not, the smallest change that makes it fit.

Takes arm configs, `ModelFacts`, a GPU's and a host's memory; returns `StepMemory`, a line of refusal or None. Reads no
weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain

from spa_ray.config.models import Config, Resources
from spa_ray.config.training import Train
from spa_ray.pipeline.host import Host
from spa_ray.pipeline.plan_model import ModelFacts, text_settings
from spa_ray.training.memory import GIB, Shape, StepMemory, shape_of, step_memory
from spa_ray.training.relief import Change, changes, host_changes

GPU_MEMORY_GIB = 80.0  # an A100 or H100 of the larger kind

# Shapes of well-known decoders, for a hub id that is not on this machine: billions -> layers, hidden, intermediate,
# heads, KV heads, head width, vocabulary (Qwen2.5-0.5B, Llama-3.2-1B and -3B, Llama-3.1-8B, Qwen2.5-14B and -32B,
# Llama-3.1-70B).
KNOWN: dict[float, tuple[int, int, int, int, int, int, int]] = {
    0.49: (24, 896, 4864, 14, 2, 64, 151_936),
    1.24: (16, 2048, 8192, 32, 8, 64, 128_256),
    3.21: (28, 3072, 8192, 24, 8, 128, 128_256),
    8.03: (32, 4096, 14_336, 32, 8, 128, 128_256),
    14.8: (48, 5120, 13_824, 40, 8, 128, 152_064),
    32.8: (64, 5120, 27_648, 40, 8, 128, 152_064),
    70.6: (80, 8192, 28_672, 64, 8, 128, 128_256),
}


def model_shape(facts: ModelFacts) -> Shape:
    """The shape by the model's own config.json, else that of the known decoder whose size is nearest."""
    found = None if facts.folder is None else shape_of(text_settings(facts.folder), facts.parameters)
    if found is not None:
        return found
    nearest = min(KNOWN, key=lambda billions: abs(billions * 1e9 / max(facts.parameters, 1.0) - 1))
    layers, hidden, intermediate, heads, kv_heads, head_dim, vocab = KNOWN[nearest]
    return Shape(facts.parameters, layers, hidden, intermediate, heads, kv_heads, head_dim, vocab)


def gpu_gib(resources: Resources) -> float:
    """Memory of the share of a GPU that one rank has."""
    share = 1.0 if resources.gpus_per_worker is None else min(1.0, resources.gpus_per_worker)
    return (resources.gpu_memory_gib or GPU_MEMORY_GIB) * share


def training_memory(train: Train, facts: ModelFacts, resources: Resources, *, gpu: bool = True) -> StepMemory:
    """What one rank holds at the peak of a training step; without a GPU it is a process's memory."""
    limit = gpu_gib(resources) * GIB if gpu else None
    return step_memory(train, model_shape(facts), resources.train_workers, gpu=gpu, limit=limit)


def host_gib(train: Train, facts: ModelFacts, resources: Resources, host: Host) -> float:
    """What all ranks of one machine keep in its memory by `train.offload`."""
    each = training_memory(train, facts, resources).offloaded / GIB
    return each * min(resources.train_workers, host.ranks)


def refusal(arms: Mapping[str, Config], facts: ModelFacts, host: Host | None = None, *, gpu: bool = True) -> str | None:
    """One line where an arm's training does not fit into the GPU, or what it offloads not into the host, with the first
    change that makes all arms fit. `host` null: not known; `gpu` false: no GPU trains."""
    needs = {name: training_memory(c.train, facts, c.resources).total / GIB for name, c in arms.items()}
    worst = max(needs, key=lambda name: needs[name])
    resources, train = arms[worst].resources, arms[worst].train
    room = gpu_gib(resources)
    if not gpu or needs[worst] <= room:
        return _host_refusal(arms, facts, host, gpu=gpu)
    fixes = chain(changes(train, resources), host_changes(train, resources) if train.offload else ())
    advice = _advice(arms, facts, host, fixes) or "no setting makes it fit: take larger GPUs or a smaller model"
    return (
        f"{_of(worst, arms)}training needs {needs[worst]:.1f} GiB on each of {resources.train_workers} ranks, and a "
        f"GPU has {room:g} (resources.gpu_memory_gib); {advice}"
    )


def _host_refusal(arms: Mapping[str, Config], facts: ModelFacts, host: Host | None, *, gpu: bool) -> str | None:
    if host is None:
        return None
    needs = {name: host_gib(c.train, facts, c.resources, host) for name, c in arms.items()}
    worst = max(needs, key=lambda name: needs[name])
    if needs[worst] <= host.gib:
        return None
    resources, train = arms[worst].resources, arms[worst].train
    fixes = host_changes(train, resources)
    advice = (
        _advice(arms, facts, host, fixes, gpu=gpu) or "no setting makes it fit: take more memory or a smaller model"
    )
    ranks = min(resources.train_workers, host.ranks)
    return (
        f"{_of(worst, arms)}train.offload keeps {needs[worst]:.1f} GiB of {ranks} ranks in the memory of one machine, "
        f"and {host.what} has {host.gib:.1f} (resources.host_memory_gib); {advice}"
    )


def _of(arm: str, arms: Mapping[str, Config]) -> str:
    return f"arm {arm}: " if len(arms) > 1 else ""


def _advice(
    arms: Mapping[str, Config],
    facts: ModelFacts,
    host: Host | None,
    fixes: Iterable[tuple[str, Change]],
    *,
    gpu: bool = True,
) -> str | None:
    """The first of the changes under which all arms fit."""
    for text, change in fixes:
        if all(_fits(config, facts, host, change, gpu=gpu) for config in arms.values()):
            return f"set {text}"
    return None


def _fits(config: Config, facts: ModelFacts, host: Host | None, change: Change, *, gpu: bool) -> bool:
    train = config.train.model_copy(update=change[0])
    resources = config.resources.model_copy(update=change[1])
    if host is not None and host_gib(train, facts, resources, host) > host.gib:
        return False
    return not gpu or training_memory(train, facts, resources).total <= gpu_gib(resources) * GIB
