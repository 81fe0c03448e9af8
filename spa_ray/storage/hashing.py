"""Content addresses: the hash of a stage covers what it reads, its inputs and its version, never where it ran.

Comes in: JSON-like values, files, folders. Goes out: short hex digests. Never: code hashes, resources, clocks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from spa_ray.storage.files import AnyPath, arrow_filesystem, children, is_file, parquet_files

DIGITS = 16
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.model.v*", "*.txt", "*.py")
UNREAD_FILES = ("consolidated*.safetensors",)  # the same weights once more, in another library's names


def digest(value: Any) -> str:
    """Hash of a JSON-like value (keys sorted). Raises: TypeError for anything that JSON cannot hold."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


def stage_hash(stage: str, version: int, settings: Any, inputs: Iterable[str]) -> str:
    """The address of a stage's output: name and version, the settings that it reads, its inputs' hashes in order."""
    return digest({"stage": stage, "version": version, "settings": settings, "inputs": list(inputs)})


def file_hash(path: AnyPath) -> str:
    found = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            found.update(block)
    return found.hexdigest()[:DIGITS]


def folder_hash(folder: AnyPath, patterns: Iterable[str] = ("*",), unread: Iterable[str] = ()) -> str:
    """Hash over names and contents of a folder's files that match a pattern and no `unread` one, subfolders apart."""

    def counts(name: str) -> bool:
        return any(fnmatchcase(name, p) for p in patterns) and not any(fnmatchcase(name, p) for p in unread)

    return digest([[f.name, file_hash(f)] for f in children(folder) if counts(f.name) and is_file(f)])


def parquet_hash(folder: AnyPath) -> str:
    """Hash over names and contents of the Parquet files under a folder, or of the one file that it is."""
    root = arrow_filesystem(folder)[1]
    inside = [name[len(root) :].strip("/") for name in parquet_files(folder)]
    return digest([[name, file_hash(folder / name if name else folder)] for name in inside])


def model_hash(folder: AnyPath) -> str:
    """Hash of a model folder: weights, config, tokenizer, chat template and the model's own code."""
    return folder_hash(folder, MODEL_FILES, UNREAD_FILES)
