"""Whether a folder is a complete Hugging Face model folder: config.json, safetensors and a tokenizer.

Takes a path; returns nothing, or raises InputError that says what is there instead and what to give. Reads no weights.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from spa_ray.errors import InputError
from spa_ray.storage.pointers import check_pointers
from spa_ray.storage.weights import check_complete, check_safetensors

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "tekken.json")
OBJECTS = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "method.json")
READ = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.py")
WANTED = "a model is a folder with config.json, safetensors and a tokenizer"


def check_model_folder(folder: Path) -> None:
    """Raises: InputError unless the folder holds config.json, complete safetensors and a tokenizer."""
    if not folder.is_dir():
        inside = (folder.parent / "config.json").is_file()
        raise InputError(f"{folder}: not a folder; {f'give {folder.parent}' if inside else WANTED}")
    _check_links(folder)
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: not a model folder (no config.json); {_instead(folder)}")
    check_pointers(folder, READ)
    _check_config(folder)
    check_safetensors(folder)
    check_complete(folder)
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise InputError(f"{folder}: no tokenizer in it (tokenizer.json or tokenizer.model); fetch it as well")


def read_config(folder: Path) -> dict[str, Any]:
    """config.json, an object. Raises: InputError."""
    return _object(folder / "config.json")


def stamp(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of each of the folder's files: while it is the same, so is what was found of the folder."""
    states = [(file.name, file.stat()) for file in sorted(folder.iterdir()) if file.is_file()]
    return tuple((name, state.st_size, state.st_mtime_ns) for name, state in states)


def _object(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        what = "empty" if file.is_file() and not file.stat().st_size else f"not JSON ({type(e).__name__})"
        raise InputError(f"{file}: {what}; fetch the model again") from e
    if not isinstance(found, dict):
        raise InputError(f"{file}: holds a {type(found).__name__}, where a JSON object belongs; fetch it again")
    return found


def _check_config(folder: Path) -> None:
    names = read_config(folder).get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise InputError(f"{folder / 'config.json'}: architectures is {names!r}; write a list of names")
    for name in OBJECTS:
        if (folder / name).is_file():
            _object(folder / name)


def _check_links(folder: Path) -> None:
    """The hub's cache is made of links. Raises: InputError for one whose file is gone."""
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not path.exists():
            raise InputError(f"{path}: a link to {os.readlink(path)}, which is not there; fetch the model again")


def _instead(folder: Path) -> str:
    """What a folder without config.json is, and what to give in its place."""
    found = sorted(path.parent for path in (*folder.glob("*/config.json"), *folder.glob("snapshots/*/config.json")))
    if (folder / "adapter_config.json").is_file():
        return "an adapter alone; give the merged model folder (spa export merges it)"
    if (folder / "model_index.json").is_file():
        return "a diffusers pipeline; give a causal language model"
    if found:
        return f"there is one in {found[0]}: give that"
    if any(folder.glob("*.gguf")):
        return "a GGUF, which cannot be trained; give the folder that it was made from"
    if (folder / "params.json").is_file():
        return "the weights in their maker's own format; give the Hugging Face form of the model"
    if not any(folder.iterdir()):
        return "it is empty"
    return WANTED
