"""Whether training fits into the GPUs of a config, and if not, the smallest change that makes it fit.

Takes arm configs, `ModelFacts` and a GPU's memory; returns `StepMemory`, a line of refusal or None. Reads no weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from spa_ray.config.models import Config, Lora, Resources, Train
from spa_ray.runs.plan_model import ModelFacts, text_settings
from spa_ray.training.memory import GIB, Shape, StepMemory, shape_of, step_memory

GPU_MEMORY_GIB = 80.0  # an A100 or H100 of the larger kind
MOST_WORKERS = 64

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


def refusal(arms: Mapping[str, Config], facts: ModelFacts) -> str | None:
    """One line where an arm's training does not fit into the GPU, with the first change that makes all arms fit."""
    needs = {name: training_memory(c.train, facts, c.resources).total / GIB for name, c in arms.items()}
    worst = max(needs, key=lambda name: needs[name])
    resources, train = arms[worst].resources, arms[worst].train
    room = gpu_gib(resources)
    if needs[worst] <= room:
        return None
    fix = next((text for text, change in changes(train, resources) if _all_fit(arms, facts, change)), None)
    where = f"arm {worst}: " if len(arms) > 1 else ""
    advice = f"set {fix}" if fix else "no setting makes it fit: take larger GPUs or a smaller model"
    return (
        f"{where}training needs {needs[worst]:.1f} GiB on each of {resources.train_workers} ranks, and a GPU has "
        f"{room:g} (resources.gpu_memory_gib); {advice}"
    )


Change = tuple[dict[str, Any], dict[str, Any]]  # updates of `train` and of `resources`


def changes(train: Train, resources: Resources) -> Iterator[tuple[str, Change]]:
    """Changes by how much they cost: first those that leave the trained weights alike, alone and together; then
    adapters, then adapters on 4-bit weights, then more ranks."""
    pair = 2 * train.max_length
    quantized = train.lora is not None and train.lora.quantize is not None
    alike: list[tuple[str, dict[str, Any]]] = []
    if not train.gradient_checkpointing:
        alike.append(("train.gradient_checkpointing=true", {"gradient_checkpointing": True}))
    if (train.micro_batch_tokens or 8 * train.max_length) > pair:
        alike.append((f"train.micro_batch_tokens={pair}", {"micro_batch_tokens": pair}))
    if train.zero_stage < 3 and resources.train_workers > 1 and not quantized:
        alike.append(("train.zero_stage=3", {"zero_stage": 3}))
    if not train.offload:
        alike.append(("train.offload=true", {"offload": True}))
    for text, update in alike:
        yield text, (update, {})
    for count in range(2, len(alike) + 1):
        yield _joined(alike[:count])
    saving = alike[:2] if not train.gradient_checkpointing else alike[:1]
    small = [item for item in saving if "zero_stage" not in item[1] and "offload" not in item[1]]
    if train.lora is None:
        yield _joined([("train.lora.r=16", {"lora": Lora()})])
        yield _joined([("train.lora.r=16", {"lora": Lora()}), *small])
    if not quantized:
        base = train.lora or Lora()
        nf4 = {"lora": base.model_copy(update={"quantize": "nf4"}), "zero_stage": min(2, train.zero_stage)}
        text = "train.lora.quantize=nf4" + (" train.zero_stage=2" if train.zero_stage == 3 else "")
        yield _joined([(text, nf4)])
        yield _joined([(text, nf4), *small])
    full = {} if quantized else {"zero_stage": 3}
    workers = resources.train_workers
    while (workers := workers * 2) <= MOST_WORKERS:
        text = f"resources.train_workers={workers}" + (
            "" if quantized or train.zero_stage == 3 else " train.zero_stage=3"
        )
        yield text, (full, {"train_workers": workers})
        update = {**full, **{k: v for _, item in small for k, v in item.items()}}
        yield " ".join([text, *(t for t, _ in small)]), (update, {"train_workers": workers})


def _joined(items: list[tuple[str, dict[str, Any]]]) -> tuple[str, Change]:
    merged = {key: value for _, update in items for key, value in update.items()}
    return " ".join(text for text, _ in items), (merged, {})


def _all_fit(arms: Mapping[str, Config], facts: ModelFacts, change: Change) -> bool:
    return all(_fits(config, facts, change) for config in arms.values())


def _fits(config: Config, facts: ModelFacts, change: Change) -> bool:
    train = config.train.model_copy(update=change[0])
    resources = config.resources.model_copy(update=change[1])
    return training_memory(train, facts, resources).total <= gpu_gib(resources) * GIB
