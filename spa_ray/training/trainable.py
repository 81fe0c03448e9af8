"""Whether a model folder can be trained, as far as its config and the headers of its weights say: no torch, no weights.

Takes a local model folder and a `Train` section; returns nothing, or raises InputError with the reason and the fix.
"""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

from spa_ray.config.models import Lora, Train
from spa_ray.errors import InputError

ALL_LINEAR = "all-linear"
TIED = {"lm_head", "embed_tokens", "wte", "embed_in", "embed_out", "word_embeddings"}  # the two ends that may be tied
PREFIXES = ("model", "transformer", "gpt_neox")
OTHER_KINDS = ("ForSequenceClassification", "ForTokenClassification", "ForMaskedLM", "ForQuestionAnswering")


def check_trainable(folder: Path, train: Train) -> None:
    """Refuse what is known not to train before anything is generated for it. Raises: InputError."""
    config = _config(folder)
    _check_kind(folder, config)
    if train.lora is not None:
        check_targets(folder, config, train.lora)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: cannot be read as JSON ({type(e).__name__}); fetch the model again") from e
    if not isinstance(config, dict):
        raise InputError(f"{path}: holds a {type(config).__name__}, a model's config is an object; fetch it again")
    return config


def _check_kind(folder: Path, config: dict[str, Any]) -> None:
    quantized = config.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method", "unknown") if isinstance(quantized, dict) else "unknown"
        raise InputError(
            f"{folder}: its weights are quantized ({method}) and cannot be trained; give the checkpoint that it was "
            "made from, and train.lora.quantize=nf4 where memory is short"
        )
    if (folder / "adapter_config.json").is_file():
        raise InputError(
            f"{folder}: adapter_config.json beside complete weights, so it is not known whether the adapter is merged; "
            "move the adapter's files elsewhere, or merge them first with spa export"
        )
    if config.get("is_encoder_decoder"):
        raise InputError(f"{folder}: an encoder-decoder; only decoder-only language models are trained")
    names = config.get("architectures") or []
    strange = [n for n in names if isinstance(n, str) and n.endswith(OTHER_KINDS)]
    if strange:
        raise InputError(f"{folder}: a {strange[0]}, which writes no text; give a causal language model")


def check_targets(folder: Path, config: dict[str, Any], lora: Lora) -> None:
    """LoRA's targets exist, and none is an embedding that is tied to the head. Raises: InputError."""
    if isinstance(lora.target_modules, str) and lora.target_modules.lower() == ALL_LINEAR:
        return
    modules = _modules(folder) | {"lm_head"}  # the head is a module of its own where no weight of its own is stored
    if isinstance(lora.target_modules, str):  # of complete names, which some files store without their first part
        modules |= {f"{prefix}.{name}" for prefix in PREFIXES for name in modules}
    matched = {name for name in modules if _matches(name, lora.target_modules)}
    if isinstance(lora.target_modules, str):
        missing = [] if matched or "text_config" in config else [lora.target_modules]
    else:
        missing = [t for t in lora.target_modules if not any(_matches(name, (t,)) for name in modules)]
    if missing:
        have = sorted({name.rsplit(".", 1)[-1] for name in modules if not name.endswith("norm")})
        raise InputError(
            f"train.lora.target_modules: {missing[0]!r} matches no module of {folder}; there are {', '.join(have)}"
        )
    reached = {name.rsplit(".", 1)[-1] for name in matched}
    if reached & TIED and _tied(config, _modules(folder)):
        raise InputError(
            f"train.lora.target_modules: {min(reached & TIED)!r} is tied to the other end of {folder}: merging an "
            "adapter on one end would lose the other; leave it out, or set train.lora=null"
        )


def _matches(name: str, targets: str | tuple[str, ...]) -> bool:
    """As peft matches: a string is a regular expression of the complete name, a list holds names or their ends."""
    if isinstance(targets, str):
        try:
            return re.fullmatch(targets, name) is not None
        except re.error as e:
            raise InputError(f"train.lora.target_modules: {targets!r} is no regular expression ({e})") from e
    return any(name == t or name.endswith(f".{t}") for t in targets)


def _tied(config: dict[str, Any], modules: set[str]) -> bool:
    """Whether head and embedding are one matrix: as the config says, and where it is silent, as the weights show."""
    text = config.get("text_config")
    sections = [config, *([text] if isinstance(text, dict) else [])]
    said = [s["tie_word_embeddings"] for s in sections if isinstance(s.get("tie_word_embeddings"), bool)]
    return said[-1] if said else not any(m.endswith(("lm_head", "embed_out")) for m in modules)


def _modules(folder: Path) -> set[str]:
    """Names of the modules that have a weight, read off the headers."""
    names: set[str] = set()
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with file.open("rb") as f:
                (length,) = struct.unpack("<Q", f.read(8))
                header: dict[str, Any] = json.loads(f.read(length)) if length < file.stat().st_size else {}
            names |= {name for name in header if name.endswith(".weight")}
        except (OSError, struct.error, ValueError, TypeError) as e:
            raise InputError(f"{file}: not a safetensors file ({type(e).__name__}); fetch it again") from e
    return {name.removesuffix(".weight") for name in names}
