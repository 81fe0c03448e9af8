"""`spa plan`: what a run would do and cost, from the config, at most 200 sampled prompts and the model's config alone.

Comes in: arm configs. Goes out: a JSON-like plan and its printed form. Starts nothing and loads no weights; what could
not be looked up is estimated and marked so, with the assumption beside it.
"""

from __future__ import annotations

import json
import math
import re
import struct
from itertools import islice
from pathlib import Path
from typing import Any

from spa_ray.config.models import Config, Prompts
from spa_ray.data.prompts import read_prompts
from spa_ray.errors import InputError
from spa_ray.runs.models import local_model
from spa_ray.training.guards import check_lr

SAMPLED = 200
CHARS_PER_TOKEN = 4.0
ANSWER_SHARE = 0.5  # of max_tokens that an answer is assumed to use
DECODE_FLOPS = 4.0e13  # per GPU and second, batched decoding of a vLLM engine: 2,500 tokens/s at 8 B parameters
PREFILL_FLOPS = 4.0e14  # per GPU and second
TRAIN_FLOPS = 3.0e14  # per GPU and second
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2}


def make_plan(arms: dict[str, Config]) -> dict[str, Any]:
    """The plan of every arm. Raises: InputError where the config or a local model or prompt file is wrong."""
    return {"arms": {name: plan_arm(config) for name, config in arms.items()}, "assumptions": assumptions()}


def assumptions() -> list[str]:
    return [
        f"an answer uses {ANSWER_SHARE:.0%} of its max_tokens; a refinement reads every candidate",
        f"a GPU: {PREFILL_FLOPS:.0e} FLOP/s of prefill, {DECODE_FLOPS:.0e} of decoding, {TRAIN_FLOPS:.0e} of training",
        "a sampled prompt's prefix is computed once and shared by its candidates, each score reads prompt and answer",
        "half of the pairs that n + 1 answers can form pass δ, for one prompt in three",
    ]


def plan_arm(config: Config) -> dict[str, Any]:
    """Stages, requests, tokens, memory and GPU-hours of one arm."""
    model, notes = model_facts(config)
    prompts = prompt_facts(config.prompts, config, notes, "prompts")
    generation = generation_cost(config, prompts)
    train = config.train.resolved()
    pairs = round(prompts["count"] * config.sampling.n * (config.sampling.n + 1) / 2 * 0.5 / 3)
    steps = math.ceil(pairs / train.batch_size * train.epochs)
    pair_tokens = 2 * (prompts["tokens"] + ANSWER_SHARE * config.sampling.max_tokens)
    gpus = config.resources.engines.max * max(1, config.model.tensor_parallel_size)
    warning = check_lr(train, model["parameters"])
    notes += [warning] if warning else []
    flops = 2 * model["parameters"]
    hours = {
        "generate": flops
        * (generation["prefill_tokens"] / PREFILL_FLOPS + generation["decode_tokens"] / DECODE_FLOPS)
        / 3600,
        "train": 3 * flops * pair_tokens * pairs * train.epochs / TRAIN_FLOPS / 3600,
    }
    return {
        "stages": ["prompts", "generate", "build", "train"] + (["evaluate"] if config.evaluation.prompts else []),
        "iterations": config.iterations.count,
        "model": model,
        "prompts": prompts,
        "generate": generation,
        "train": {
            "method": train.method, "beta": train.beta, "gamma": train.gamma, "lr": train.lr, "gap": train.gap,
            "pairs_estimated": pairs, "steps_estimated": min(steps, train.max_steps or steps),
        },
        "memory_gib": memory(config, model),
        "gpu_hours": {stage: round(value * config.iterations.count, 3) for stage, value in hours.items()},
        "gpus": {"engines": gpus, "train": config.resources.train_workers},
        "notes": notes,
    }  # fmt: skip


def model_facts(config: Config) -> tuple[dict[str, Any], list[str]]:
    """Parameters and KV-cache bytes a token, read off the model folder or estimated from a hub id's name."""
    notes: list[str] = []
    folder = local_model(config.model)
    if folder is None:
        billions = re.search(r"(\d+(?:\.\d+)?)\s*[bB](?![a-zA-Z])", config.model.path)
        size = float(billions.group(1)) if billions else 8.0
        notes.append(f"model {config.model.path}: not on this machine; {size:g} B parameters estimated from its name")
        return {
            "path": config.model.path,
            "parameters": size * 1e9,
            "kv_bytes_per_token": None,
            "estimated": True,
        }, notes
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings = settings.get("text_config", settings)
    heads = settings.get("num_attention_heads")
    layers, width = settings.get("num_hidden_layers"), settings.get("hidden_size")
    kv = None
    if heads and layers and width:
        head = settings.get("head_dim") or width // heads
        kv = 2 * layers * (settings.get("num_key_value_heads") or heads) * head * BYTES[config.model.dtype]
    return {
        "path": config.model.path, "parameters": parameters(folder), "kv_bytes_per_token": kv, "estimated": False
    }, notes  # fmt: skip


def parameters(folder: Path) -> float:
    """Number of parameters, from the headers of the safetensors files."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as f:
            size = struct.unpack("<Q", f.read(8))[0]
            header = json.loads(f.read(size))
        total += sum(math.prod(t["shape"]) for name, t in header.items() if name != "__metadata__")
    return float(total)


def prompt_facts(prompts: Prompts, config: Config, notes: list[str], where: str) -> dict[str, Any]:
    """Count and mean tokens of the prompts, over at most 200 of them."""
    if prompts.source is None:
        raise InputError(f"{where}.source: missing; give a file, a folder, module:reader or a named data set")
    try:
        rows = list(islice(read_prompts(prompts, where=where), SAMPLED))
    except InputError as e:
        if not _named(prompts.source):
            raise
        notes.append(f"{where}: {e}; 60 tokens a prompt and {prompts.limit or 1000} prompts estimated")
        return {"source": prompts.source, "count": prompts.limit or 1000, "tokens": 60.0, "estimated": True}
    if not rows:
        raise InputError(f"{where}.source: {prompts.source}: no prompt in it")
    count, exact = _count(prompts, len(rows), where)
    if not exact:
        notes.append(f"{where}: the source was not counted; {count} prompts assumed (set {where}.limit)")
    tokens = mean_tokens([row["messages"] for row in rows], config, notes)
    return {"source": prompts.source, "count": count, "tokens": tokens, "sampled": len(rows), "estimated": not exact}


def _named(source: str) -> bool:
    return ":" not in source and not Path(source).expanduser().exists() and not Path(source).suffix


def _count(prompts: Prompts, seen: int, where: str) -> tuple[int, bool]:
    if seen < SAMPLED:
        return seen, True
    if prompts.limit:
        return prompts.limit, True
    return seen, False


def mean_tokens(conversations: list[list[dict[str, str]]], config: Config, notes: list[str]) -> float:
    """Mean tokens of a rendered prompt; characters / 4 where the tokenizer is not on this machine."""
    folder = local_model(config.model)
    if folder is None:
        notes.append(
            f"tokenizer of {config.model.path}: not on this machine; {CHARS_PER_TOKEN:g} characters a token estimated"
        )
        chars = sum(len(m["content"]) for messages in conversations for m in messages)
        return round(chars / CHARS_PER_TOKEN / len(conversations) + 8, 1)
    if (folder / "tokenizer.json").is_file():
        from transformers import PreTrainedTokenizerFast

        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)  # counts alike, and imports in a third of the time
    else:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=config.model.trust_remote_code)
    if not tokenizer.chat_template:
        raise InputError(f"{folder}: the tokenizer has no chat template; add chat_template.jinja to the model folder")
    sizes = [
        len(tokenizer.apply_chat_template(m, add_generation_prompt=True, tokenize=True, return_dict=False))
        for m in conversations
    ]
    return round(sum(sizes) / len(sizes), 1)


def generation_cost(config: Config, prompts: dict[str, Any]) -> dict[str, Any]:
    """Requests and tokens of the generate stage, one iteration."""
    n, k, draws = config.sampling.n, len(config.objectives), config.scoring.draws
    count, tokens = prompts["count"], prompts["tokens"]
    answer, refined = ANSWER_SHARE * config.sampling.max_tokens, ANSWER_SHARE * config.refine.max_tokens
    scores = (n + 1) * k * draws
    requests = n + scores + 1
    judged = 1 if config.scoring.mode != "regex" else config.scoring.max_tokens
    prefill = n * tokens + scores * (tokens + answer + 80) + (tokens + n * (answer + 12) + 120)
    return {
        "requests": round(count * requests),
        "requests_per_prompt": requests,
        "prefill_tokens": round(count * prefill),
        "decode_tokens": round(count * (n * answer + scores * judged + refined)),
    }


def memory(config: Config, model: dict[str, Any]) -> dict[str, Any]:
    """GiB per GPU: engine weights, KV cache of one full context, and the training state under ZeRO."""
    gib = 1024**3
    size, world = model["parameters"], config.resources.train_workers
    train = config.train
    trainable = size if train.lora is None else size * 0.01
    weights = size * BYTES[train.dtype]
    state = trainable * (12 if train.dtype == "bfloat16" else 8)  # master copy and two moments; fp32 needs no copy
    gradients = trainable * BYTES[train.dtype]
    shard = {0: (1, 1, 1), 1: (1, 1, world), 2: (1, world, world), 3: (world, world, world)}[train.zero_stage]
    context = config.model.max_model_len or 8192
    kv = model["kv_bytes_per_token"]
    return {
        "engine_weights": round(size * BYTES[config.model.dtype] / config.model.tensor_parallel_size / gib, 3),
        "kv_cache_per_context": round(kv * context / config.model.tensor_parallel_size / gib, 3) if kv else None,
        "training_state": round((weights / shard[0] + gradients / shard[1] + state / shard[2]) / gib, 3),
    }


def print_plan(plan: dict[str, Any]) -> None:
    """The plan as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for name, arm in plan["arms"].items():
        table = Table(title=f"arm {name}: {' → '.join(arm['stages'])}", show_header=False, title_justify="left")
        mark = {True: " (estimated)", False: ""}
        model, prompts, generation, train = arm["model"], arm["prompts"], arm["generate"], arm["train"]
        rows = {
            "model": f"{model['path']}, {model['parameters'] / 1e6:,.1f} M parameters{mark[model['estimated']]}",
            "prompts": f"{prompts['count']:,} of {prompts['tokens']} tokens{mark[prompts['estimated']]}",
            "requests": f"{generation['requests']:,} ({generation['requests_per_prompt']} a prompt)",
            "tokens": f"{generation['prefill_tokens']:,} prefill, {generation['decode_tokens']:,} decoded",
            "train": f"{train['method']}: β {train['beta']:g}, γ {train['gamma']:g}, lr {train['lr']:g}, "
            f"gap {train['gap']}; about {train['pairs_estimated']:,} pairs, {train['steps_estimated']:,} steps",
            "memory, GiB": ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in arm["memory_gib"].items()),
            "GPU-hours": ", ".join(f"{key} {value}" for key, value in arm["gpu_hours"].items())
            + (f" (× {arm['iterations']} iterations, included)" if arm["iterations"] > 1 else ""),
        }
        for key, value in rows.items():
            table.add_row(key, value)
        console.print(table)
        for note in arm["notes"]:
            print(f"note: {note}")
    for line in plan["assumptions"]:
        print(f"assumed: {line}")
