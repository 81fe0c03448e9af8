"""Whether a model folder's weights are safetensors, the only kind that is read: the other kinds are pickles.

Comes in: a local model folder. Never: the weights themselves.
"""

from __future__ import annotations

import json
from pathlib import Path

from spa_ray.errors import InputError

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
CONVERT = (
    "convert it where you trust it: AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW), and copy the "
    "tokenizer's files along"
)


def check_safetensors(folder: Path) -> None:
    """Raises: InputError for a folder without safetensors, and for an index that names anything else."""
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        what = (
            f"only {pickles[0]}, a pickle, which can run code when it is read; {CONVERT}" if pickles else "no weights"
        )
        raise InputError(f"{folder}: no *.safetensors in it, {what}")
    for index in sorted(folder.glob("*.safetensors.index.json")):
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as e:
            raise InputError(f"{index}: not an index of weights ({type(e).__name__}: {e})") from e
        strange = sorted(
            str(n) for n in named if not (isinstance(n, str) and n.endswith(".safetensors") and "/" not in n)
        )
        if strange:
            raise InputError(f"{index}: names {strange[0]!r}, which is no safetensors file of this folder; {CONVERT}")
