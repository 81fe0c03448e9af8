"""What a plan needs to know of a model: its size, its type in the engine, its KV cache; read off headers, no weights.

Comes in: the `model` section. Goes out: `ModelFacts`. A hub id that is not on this machine is estimated from its name
and marked so. Never: torch, a download.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spa_ray.config.models import Model
from spa_ray.errors import InputError
from spa_ray.pipeline.models import local_model
from spa_ray.storage.model_folder import check_model_folder, read_config
from spa_ray.storage.weights import read_header, tensors, weight_files

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
UNKNOWN_BILLIONS = 8.0


@dataclass(frozen=True)
class ModelFacts:
    """A model as an engine would hold it. `kv_bytes_per_token` and `context` are None where they are not known."""

    path: str
    parameters: float
    dtype: str  # of the engine's weights and KV cache
    weight_bytes: float
    kv_bytes_per_token: float | None
    kv_heads: int | None
    context: int | None
    estimated: bool
    folder: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "folder"}


def model_facts(model: Model, notes: list[str], folder: Path | None = None) -> ModelFacts:
    """Facts of the model's folder (`folder`: where it was fetched to), or an estimate by its name, told in `notes`."""
    folder = folder or found_folder(model)
    if folder is None:
        return _estimated(model, notes)
    settings = text_settings(folder)
    headers = [read_header(file) for file in weight_files(folder)]
    parameters = float(sum(math.prod(t["shape"]) for header in headers for t in tensors(header).values()))
    dtype = engine_dtype(model.dtype, settings.get("dtype") or settings.get("torch_dtype"))
    stored = sum(t["data_offsets"][1] - t["data_offsets"][0] for header in headers for t in tensors(header).values())
    weight_bytes = float(stored) if "quantization_config" in settings else parameters * BYTES[dtype]
    values, heads = kv_values(settings)
    kv_size = 1 if str(model.engine_kwargs.get("kv_cache_dtype", "auto")).startswith("fp8") else BYTES[dtype]
    return ModelFacts(
        path=model.path,
        parameters=parameters,
        dtype=dtype,
        weight_bytes=weight_bytes,
        kv_bytes_per_token=None if values is None else float(values * kv_size),
        kv_heads=heads,
        context=model.max_model_len or context_of(settings),
        estimated=False,
        folder=folder,
    )


def text_settings(folder: Path) -> dict[str, Any]:
    """config.json's settings of the language model. Raises: InputError where they are not an object."""
    settings = read_config(folder)
    inner = settings.get("text_config")
    found = inner if inner is not None else settings
    if not isinstance(found, dict):
        raise InputError(f"{folder / 'config.json'}: not a model's settings; fetch the model again")
    return found


def found_folder(model: Model) -> Path | None:
    """The model's folder where it is on this machine. Raises: InputError for a path that is no model folder."""
    return local_model(model) or _downloaded(model)


def _downloaded(model: Model) -> Path | None:
    """The folder of a hub id that an earlier run fetched, if it is whole."""
    if "://" in model.path:
        return None
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(model.path, "config.json", revision=model.revision)
        if not isinstance(found, str):
            return None
        check_model_folder(Path(found).parent)
    except (InputError, ValueError):  # fetched in part, or no name that a hub has
        return None
    return Path(found).parent


def _estimated(model: Model, notes: list[str]) -> ModelFacts:
    found = re.search(r"(\d+(?:\.\d+)?)\s*[bB](?![a-zA-Z])", model.path)
    billions = float(found.group(1)) if found else UNKNOWN_BILLIONS
    how = "estimated from its name" if found else "assumed"
    notes.append(f"model {model.path}: not on this machine; {billions:g} B parameters {how}, its KV cache is not known")
    dtype = engine_dtype(model.dtype, None)
    size = billions * 1e9
    return ModelFacts(model.path, size, dtype, size * BYTES[dtype], None, None, model.max_model_len, True)


def engine_dtype(wanted: str, own: str | None) -> str:
    """The type that vLLM holds the weights in. `auto` is the model's own, but bfloat16 for a float32 model."""
    if wanted != "auto":
        return wanted
    return own if own in ("bfloat16", "float16") else "bfloat16"


def kv_values(settings: dict[str, Any]) -> tuple[int | None, int | None]:
    """Numbers kept for a token in the KV cache over all layers, and the heads they are divided by across GPUs.

    Full attention in every layer is assumed: sliding windows and layers without attention keep less.
    """
    layers = settings.get("num_hidden_layers")
    if layers and settings.get("kv_lora_rank"):  # multi-head latent attention: one vector a layer, on every GPU
        return layers * (settings["kv_lora_rank"] + settings.get("qk_rope_head_dim", 0)), 1
    heads, width = settings.get("num_attention_heads"), settings.get("hidden_size")
    if not (layers and heads and (width or settings.get("head_dim"))):
        return None, None
    kv_heads = settings.get("num_key_value_heads") or heads
    return 2 * layers * kv_heads * (settings.get("head_dim") or width // heads), kv_heads


LENGTHS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length", "max_target_positions",
    "max_sequence_length", "max_seq_length", "seq_len",
)  # fmt: skip
SCALED = ("su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling")  # their lengths are so already


def context_of(settings: dict[str, Any]) -> int | None:
    """The model's own context in tokens by its config.json, reckoned as vLLM does; None where it does not say.

    A plan takes this, so that it needs no vLLM; before a run starts vLLM itself is asked (`preflight`).
    """
    known = [value for value in map(settings.get, LENGTHS) if isinstance(value, int) and value > 0]
    if not known:
        return None
    own = settings.get("model_max_length")
    length = own if isinstance(own, int) and own > 0 else min(known)
    rope = settings.get("rope_scaling") or settings.get("rope_parameters") or {}
    kind = rope.get("rope_type") or rope.get("type") if isinstance(rope, dict) else None
    if kind == "longrope":
        return int(settings.get("original_max_position_embeddings") or length)
    if kind is None or kind in SCALED or "gemma3" in str(settings.get("model_type")):
        return length
    return int(length * (rope.get("factor") or 1.0))
