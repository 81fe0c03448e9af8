"""The tokenizer of a model folder, loaded by one function for generation, training, plan and checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spa_ray.errors import InputError
from spa_ray.logs import printable


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The folder's Hugging Face tokenizer. Raises: InputError, in one line, whatever goes wrong while it is loaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, mistral_format=False)
    except Exception as e:
        raise InputError(f"model {folder}: its tokenizer cannot be read ({why(e)}); fetch the model again") from e


def why(error: BaseException) -> str:
    """What an exception says, in one line that fits into a message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = printable(lines[0] if lines else "")[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
