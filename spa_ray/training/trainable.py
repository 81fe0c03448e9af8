"""Whether a model folder can be trained: its kind, its weights against its config.json, and what LoRA is to reach.

Takes a local model folder and a `Train` section; returns notes, or raises InputError with the reason and the fix.
Reads no weights.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from spa_ray.config.training import Lora, Train
from spa_ray.errors import InputError
from spa_ray.storage.model_folder import read_config
from spa_ray.storage.weights import read_header, tensors, weight_files

ALL_LINEAR = "all-linear"
TIED = {"lm_head", "embed_tokens", "wte", "embed_in", "embed_out", "word_embeddings"}  # the two ends that may be tied
PREFIXES = ("model", "transformer", "gpt_neox")
OTHER_KINDS = ("ForSequenceClassification", "ForTokenClassification", "ForMaskedLM", "ForQuestionAnswering")


def check_trainable(folder: Path, train: Train, *, trust_remote_code: bool = False) -> list[str]:
    """Refuse what is known not to train before anything is generated for it. Returns: notes on what is left out.

    Raises: InputError.
    """
    from spa_ray.training.folder import check_weights

    check_section(folder, train)
    return check_weights(folder, trust_remote_code=trust_remote_code)


def check_section(folder: Path, train: Train) -> None:
    """The part of `check_trainable` that needs no torch. Raises: InputError."""
    config = read_config(folder)
    _check_kind(folder, config)
    if train.lora is not None:
        check_targets(folder, config, train.lora)


def _check_kind(folder: Path, config: dict[str, Any]) -> None:
    names = [n for n in config.get("architectures") or [] if isinstance(n, str)]
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
        kind = f" ({names[0]})" if names else ""
        raise InputError(f"{folder}: an encoder-decoder{kind}; only decoder-only language models are trained")
    strange = [n for n in names if n.endswith(OTHER_KINDS)]
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
    names = {name for file in weight_files(folder) for name in tensors(read_header(file))}
    return {name.removesuffix(".weight") for name in names if name.endswith(".weight")}
