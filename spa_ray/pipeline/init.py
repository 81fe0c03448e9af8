"""`spa init`: a commented YAML config for one model, one prompts file and this machine.

Takes the model, the prompts and a `Machine`. Returns the text, which was loaded and planned before it is returned, so
that `spa plan` accepts it. Loads no weights and starts nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spa_ray.config.load import arm_configs, parse_yaml
from spa_ray.config.models import Config, Model, Resources
from spa_ray.config.prompts import Prompts
from spa_ray.config.training import Train
from spa_ray.engine.cpu_dtype import with_dtype
from spa_ray.errors import InputError
from spa_ray.logs import printable
from spa_ray.pipeline.host import memory_gib
from spa_ray.pipeline.init_text import Choices, Scale, render
from spa_ray.pipeline.plan import make_plan
from spa_ray.pipeline.plan_memory import training_memory
from spa_ray.pipeline.plan_model import ModelFacts, model_facts
from spa_ray.pipeline.plan_prompts import prompt_facts
from spa_ray.rollout.chat import Chat, open_chat
from spa_ray.rollout.check import PromptCheck
from spa_ray.rollout.labels import labels_of
from spa_ray.rollout.thinking import switch_of
from spa_ray.storage.files import kind, write_text
from spa_ray.training.memory import GIB
from spa_ray.training.trainable import check_trainable

ENGINE_SHARE = 0.7  # of a GPU that an engine's weights may take: the rest is for the KV cache
MAX_CONTEXT = 8192
ANSWERS_IN_CONTEXT = 8  # a refinement reads all candidates and writes one more
MAX_TOKENS = {True: 1024, False: 256}  # by whether there is a GPU: a processor writes a few tokens a second


@dataclass(frozen=True)
class Machine:
    """What this machine computes with. `gpu_gib`: memory of its smallest GPU; `ram_gib`: the machine's memory."""

    gpus: int
    gpu_gib: float
    bfloat16: bool
    ram_gib: float


def this_machine() -> Machine:
    """The GPUs that torch sees, and this machine's memory."""
    import torch

    ram = memory_gib()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        return Machine(0, 0.0, False, ram)
    found = [torch.cuda.get_device_properties(i) for i in range(count)]
    smallest = min(device.total_memory for device in found) / GIB
    return Machine(count, smallest, all(device.major >= 8 for device in found), ram)


def init(model: str, prompts: str, out: str) -> dict[str, Any]:
    """Write the config to `out`, or print it for `-`. Raises: InputError, before anything is written."""
    path = None if out == "-" else Path(os.path.expanduser(out))
    if path is not None and kind(path) is not None:
        raise InputError(f"--out {out}: exists already; give another --out or remove it")
    text = config_text(model, prompts, this_machine())
    if path is None:
        print(printable(text), end="")
    else:
        try:
            write_text(path, text)
        except OSError as e:
            raise InputError(f"--out {out}: cannot be written ({e.strerror}); give another --out") from e
        print(printable(f"{path}: look through it, then run: spa plan {path}; spa preview {path}; spa run {path}"))
    return {"config": text if path is None else str(path)}


def config_text(model: str, prompts: str, machine: Machine) -> str:
    """The config's text. Raises: InputError for a model or prompts that no run would take."""
    chosen = choose(model, prompts, machine)
    text = render(chosen)
    arms = arm_configs(parse_yaml(text.encode(), where="spa init"), [], where="spa init", stem="init")
    said = make_plan(arms)["refusal"]
    if said:
        raise InputError(said)
    return text


def choose(path: str, source: str, machine: Machine) -> Choices:
    """Every value that depends on the model, the prompts or the machine."""
    on_gpu, notes = machine.gpus > 0, list[str]()
    facts = model_facts(Model(path=path), notes)
    dtype = engine_dtype(path, facts, machine)
    chat = None if facts.folder is None else open_chat(Model(path=path), facts.folder, estimate=True)
    check = None if chat is None else PromptCheck(chat, [])
    found = prompt_facts(Prompts(source=source), notes, "prompts", check)
    context = min(facts.context or MAX_CONTEXT, MAX_CONTEXT)
    ranks = tensor_parallel(facts, machine)
    resources = resources_of(machine, ranks)
    base = Train(
        dtype="bfloat16" if machine.bfloat16 else "float32",
        max_length=min(2048 if on_gpu else 1024, context),
        batch_size=8,
        epochs=2 if on_gpu else 1,
        micro_batch_tokens=None if on_gpu else min(2048, 2 * context),
    )
    train = fitting(base, facts, resources, machine)
    if facts.folder is not None:
        notes += check_trainable(facts.folder, train)
    return Choices(
        model=path,
        source=source,
        prompts=found.count,
        estimated=found.estimated,
        parameters=facts.parameters,
        dtype=dtype,
        thinking=None if chat is None else switch_of(chat.source),
        context=context,
        tensor_parallel_size=ranks,
        scale=scale_of(chat),
        max_tokens=max(16, min(MAX_TOKENS[on_gpu], context // ANSWERS_IN_CONTEXT)),
        train=train,
        resources=resources,
        gpus=machine.gpus,
        memory_gib=machine.gpu_gib if on_gpu else machine.ram_gib,
        needs_gib=training_memory(train, facts, resources, gpu=on_gpu).total / GIB,
        notes=notes,
    )


def engine_dtype(path: str, facts: ModelFacts, machine: Machine) -> str:
    """bfloat16 on GPUs that have it, float16 on older ones; on a processor what `auto` becomes there."""
    if machine.gpus:
        return "bfloat16" if machine.bfloat16 else "float16"
    raw = {"model": {"path": path}, "resources": {"gpus_per_engine": 0}}
    config: Config = arm_configs(raw, [], where="spa init", stem="init")["main"]
    return with_dtype(config).model.dtype


def scale_of(chat: Chat | None) -> Scale:
    """The widest scale whose labels are one token each; free text where the template hides its labels."""
    if chat is None:
        return Scale("choice", 10, "the tokenizer is not on this machine; choice needs no one-token labels")
    try:
        labels = labels_of(chat, [str(k) for k in range(1, 11)])
    except InputError:
        return Scale("regex", 10, "the chat template does not say where a label would follow: free text is read")
    if labels.single is not None:
        return Scale("expected", 10, "each of 1 to 10 is one token of this tokenizer")
    if labels_of(chat, [str(k) for k in range(1, 10)]).single is not None:
        return Scale("expected", 9, "each digit is one token of this tokenizer, «10» is several")
    return Scale("choice", 10, "the digits are several tokens of this tokenizer, which expected cannot read")


def tensor_parallel(facts: ModelFacts, machine: Machine) -> int:
    """The fewest GPUs that hold an engine's weights. Raises: InputError where all of them are too few."""
    if not machine.gpus:
        return 1
    ranks = 1
    while facts.weight_bytes / ranks > ENGINE_SHARE * machine.gpu_gib * GIB:
        ranks *= 2
        if ranks > machine.gpus or (facts.kv_heads or ranks) % ranks:
            raise InputError(
                f"model {facts.path}: {facts.weight_bytes / GIB:.1f} GiB of weights do not fit into an engine on "
                f"{machine.gpus} GPUs of {machine.gpu_gib:.0f} GiB; take a smaller model or more GPUs"
            )
    return ranks


def resources_of(machine: Machine, ranks: int) -> Resources:
    """All GPUs for engines, then all for training; without GPUs one engine and one rank."""
    if not machine.gpus:
        return Resources(gpus_per_engine=0, gpus_per_worker=0, concurrency=16)
    engines = machine.gpus // ranks
    return Resources.model_validate(
        {
            "engines": {"min": engines, "max": engines},
            "gpus_per_engine": ranks,
            "train_workers": machine.gpus,
            "gpus_per_worker": 1,
            "gpu_memory_gib": int(machine.gpu_gib * 10) / 10,
        }
    )


def fitting(base: Train, facts: ModelFacts, resources: Resources, machine: Machine) -> Train:
    """The first way of training that fits: every weight, then LoRA, then (on GPUs) LoRA on 4-bit weights.

    Raises: InputError where none fits.
    """
    on_gpu = machine.gpus > 0
    room = (machine.gpu_gib if on_gpu else 0.8 * machine.ram_gib) * GIB
    for train in ways(base, machine):
        if training_memory(train, facts, resources, gpu=on_gpu).total <= room:
            return train
    has = f"{machine.gpus} GPUs of {machine.gpu_gib:.0f} GiB" if on_gpu else f"{machine.ram_gib:.0f} GiB of memory"
    raise InputError(
        f"model {facts.path}: {facts.parameters / 1e9:.1f} B parameters cannot be trained on {has}, with LoRA either; "
        "take a smaller model or a larger machine"
    )


def ways(base: Train, machine: Machine) -> Iterator[Train]:
    """Ways of training by how much of the model they change, each with shorter micro-batches as well."""
    raw = base.model_dump(exclude_none=True)
    full = {"zero_stage": 3 if machine.gpus > 1 else 2}
    if not machine.gpus:
        full = {"zero_stage": 0}
    adapters: list[dict[str, Any]] = [full, {**full, "lora": {}}]
    if machine.gpus:
        adapters.append({"zero_stage": 2, "lora": {"quantize": "nf4"}})
    for change in adapters:
        yield Train.model_validate({**raw, **change})
        small = {"gradient_checkpointing": True, "micro_batch_tokens": 2 * base.max_length}
        yield Train.model_validate({**raw, **change, **small})
