"""The tokenizer of a model folder, loaded by one function for generation, training, plan and checks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spa_ray.errors import InputError
from spa_ray.logs import printable
from spa_ray.storage.pointers import check_pointers

FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False, estimate: bool = False) -> Any:
    """The folder's Hugging Face tokenizer, also where Mistral's own files are beside it, as vLLM's `tokenizer_mode: hf`
    loads it. `estimate`: one that counts alike where there is a tokenizer.json, and is loaded without torch, in a third
    of the time. Raises: InputError, in one line, whatever goes wrong.
    """
    check_pointers(folder, FILES)
    try:
        if estimate and (folder / "tokenizer.json").is_file():
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast.from_pretrained(folder)
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, mistral_format=False)
    except Exception as e:
        raise InputError(
            f"model {folder}: its tokenizer cannot be read ({why(e)}); fetch the model again, or upgrade transformers "
            "where a newer version wrote it"
        ) from e


def embedding_rows(folder: Path) -> int | None:
    """How many token ids the model has an embedding for, by its config.json; None where that does not say.

    Raises: InputError for a config that is not JSON.
    """
    file = folder / "config.json"
    if not file.is_file():
        return None
    check_pointers(folder, ("config.json",))
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise InputError(f"{file}: not JSON ({why(e)}); fetch the model again") from e
    inner = settings.get("text_config") if isinstance(settings, dict) else None
    rows = (inner if isinstance(inner, dict) else settings if isinstance(settings, dict) else {}).get("vocab_size")
    return rows if isinstance(rows, int) else None


def check_vocabulary(tokenizer: Any, rows: int | None, *, model: str) -> None:
    """Every token that text can become has a row in the embedding; tokens that were added besides may have none, as
    long as no template writes them. Raises: InputError."""
    if rows is None or not hasattr(tokenizer, "get_vocab"):
        return
    added = getattr(tokenizer, "added_tokens_decoder", {})
    last = max((number for number in tokenizer.get_vocab().values() if number not in added), default=-1)
    if last >= rows:
        raise InputError(
            f"model {model}: its tokenizer has ids up to {last}, and its embedding has {rows} rows; the tokenizer is "
            "another model's, or the embedding was not resized (model.resize_token_embeddings)"
        )


def why(error: BaseException) -> str:
    """What an exception says, in one line that fits into a message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = printable(lines[0] if lines else "")[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
