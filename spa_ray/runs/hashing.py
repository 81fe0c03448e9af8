"""Content addresses: the hash of a stage covers what it reads, its inputs and its version, never where it ran.

Comes in: JSON-like values, files, folders. Goes out: short hex digests. Never: code hashes, resources, clocks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

DIGITS = 16
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")


def digest(value: Any) -> str:
    """Hash of a JSON-like value (keys sorted). Raises: TypeError for anything that JSON cannot hold."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


def stage_hash(stage: str, version: int, settings: Any, inputs: Iterable[str]) -> str:
    """The address of a stage's output: name and version, the settings that it reads, its inputs' hashes in order."""
    return digest({"stage": stage, "version": version, "settings": settings, "inputs": list(inputs)})


def file_hash(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()[:DIGITS]


def folder_hash(folder: Path, patterns: Iterable[str] = ("*",)) -> str:
    """Hash over names and contents of a folder's files (not its subfolders) that match a pattern."""
    files = sorted({f for pattern in patterns for f in folder.glob(pattern) if f.is_file()})
    return digest([[f.name, file_hash(f)] for f in files])


def model_hash(folder: Path) -> str:
    """Hash of a model folder: weights, config, tokenizer and chat template."""
    return folder_hash(folder, MODEL_FILES)
