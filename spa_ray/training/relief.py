"""Changes of a config that make training need less memory, the smallest change first. Pure; nothing is tried here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from spa_ray.config.models import Resources
from spa_ray.config.training import Lora, Train

MOST_WORKERS = 64
WORDS = ("out of memory", "alloc_failed", "can't allocate memory")  # of CUDA, NCCL, cuBLAS, torch's CPU allocator
Change = tuple[dict[str, Any], dict[str, Any]]  # updates of `train` and of `resources`


def changes(train: Train, resources: Resources) -> Iterator[tuple[str, Change]]:
    """Changes by how much they cost: first those that leave the trained weights alike, alone and together; then
    adapters, then adapters on 4-bit weights, then more ranks."""
    sequence = train.max_length
    quantized = train.lora is not None and train.lora.quantize is not None
    alike: list[tuple[str, dict[str, Any]]] = []
    if not train.gradient_checkpointing:
        alike.append(("train.gradient_checkpointing=true", {"gradient_checkpointing": True}))
    if train.micro_batch_limit > sequence:
        alike.append((f"train.micro_batch_tokens={sequence}", {"micro_batch_tokens": sequence}))
    if train.zero_stage < 3 and resources.train_workers > 1 and not quantized:
        alike.append(("train.zero_stage=3", {"zero_stage": 3}))
    if not train.offload:
        alike.append(("train.offload=true", {"offload": True}))
    for text, update in alike:
        yield text, (update, {})
    for count in range(2, len(alike) + 1):
        yield _joined(alike[:count])
    small = [item for item in alike if item[1].keys() <= {"gradient_checkpointing", "micro_batch_tokens"}]
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


def host_changes(train: Train, resources: Resources) -> Iterator[tuple[str, Change]]:
    """Changes by which less is kept in the host's memory: no offload, alone and with what else the GPU then needs, then
    those with fewer trained weights."""
    kept = train.model_copy(update={"offload": False})
    yield "train.offload=false", ({"offload": False}, {})
    for text, (of_train, of_resources) in changes(kept, resources):
        if "offload" not in of_train:
            yield f"train.offload=false {text}", ({**of_train, "offload": False}, of_resources)
    yield from changes(train, resources)


def _joined(items: list[tuple[str, dict[str, Any]]]) -> tuple[str, Change]:
    merged = {key: value for _, update in items for key, value in update.items()}
    return " ".join(text for text, _ in items), (merged, {})


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was used up: torch.OutOfMemoryError is a RuntimeError, as what cuBLAS, NCCL and the CPU raise."""
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in WORDS)


def out_of_memory(job: Mapping[str, Any], error: BaseException) -> str:
    """One line on a job (as JSON) whose memory is used up: the settings to change first, and what the device said."""
    wanted = " or ".join(text for text, _ in islice(changes(Train.model_validate(job["train"]), Resources()), 2))
    said = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return (
        f"job {job['name']}: memory is used up on a rank; set {wanted}; `spa plan` names what fits, with "
        f"resources.gpu_memory_gib at what the GPU has ({said})"
    )
