"""The weights of a model folder, as far as file names, the index and the safetensors' headers tell.

Takes a local model folder; returns the files that make up the model and the tensors in their headers. The other formats
of weights are pickles and are refused; no weights are read.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from spa_ray.errors import InputError

ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
CONVERT = (
    "convert it where you trust it: AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW), and copy the "
    "tokenizer's files along"
)
Header = dict[str, Any]


def check_safetensors(folder: Path) -> None:
    """Raises: InputError for a folder without safetensors, for an index that names anything else, and for names that
    transformers and vLLM do not look for."""
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        what = (
            f"only {pickles[0]}, a pickle, which can run code when it is read; {CONVERT}" if pickles else "no weights"
        )
        raise InputError(f"{folder}: no *.safetensors in it, {what}")
    for index in sorted(folder.glob("*.safetensors.index.json")):
        strange = sorted(str(n) for n in set(_weight_map(index).values()) if not _is_safetensors(n))
        if strange:
            raise InputError(f"{index}: names {strange[0]!r}, which is no safetensors file of this folder; {CONVERT}")
    if not (folder / ONE_FILE).is_file() and not (folder / INDEX).is_file():
        several = len(files) > 1
        raise InputError(
            f"{folder}: neither {ONE_FILE} nor {INDEX}, only {files[0]}{f' and {len(files) - 1} more' * several}; "
            + (f"fetch {INDEX} as well" if several else f"rename it to {ONE_FILE} if it is the complete model")
        )
    if (folder / ONE_FILE).is_file() and (folder / INDEX).is_file():
        others = sorted(set(_weight_map(folder / INDEX).values()) - {ONE_FILE})
        if others:
            raise InputError(
                f"{folder}: {ONE_FILE} beside an index of other files ({others[0]}): transformers would read the one "
                "and vLLM the others; remove those that are not the model"
            )


def _is_safetensors(name: Any) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and "/" not in name


def _weight_map(index: Path) -> dict[str, Any]:
    try:
        found = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"].items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as e:
        raise InputError(f"{index}: not an index of weights ({type(e).__name__}: {e}); fetch the model again") from e
    if not found:
        raise InputError(f"{index}: an index without weights; fetch the model again")
    return found


def check_complete(folder: Path) -> None:
    """Every weight file complete, and every file of the index there with the tensors that the index names.

    Raises: InputError naming the first file that is missing, cut or without a tensor.
    """
    headers = {file.name: set(tensors(read_header(file))) for file in sorted(folder.glob("*.safetensors"))}
    if not (folder / INDEX).is_file():
        return
    wanted: dict[str, set[str]] = {}
    for tensor, file in _weight_map(folder / INDEX).items():
        wanted.setdefault(file, set()).add(tensor)
    missing = sorted(set(wanted) - set(headers))
    if missing:
        raise InputError(
            f"{folder}: {len(missing)} of {len(wanted)} weight files are missing, the first {missing[0]}; fetch the "
            "model again"
        )
    for file, names in wanted.items():
        for tensor in sorted(names - headers[file]):
            raise InputError(
                f"{folder / file}: no tensor {tensor!r}, which the index places there; fetch the model again"
            )


def weight_files(folder: Path) -> list[Path]:
    """The files that make up the model, as transformers and vLLM choose them of a folder that `check_safetensors` let
    pass: others beside them hold the same weights in another library's names."""
    if (folder / ONE_FILE).is_file():
        return [folder / ONE_FILE]
    return sorted(folder / name for name in set(_weight_map(folder / INDEX).values()))


def read_header(file: Path) -> Header:
    """A safetensors file's header. Raises: InputError when the file is cut or is no safetensors file."""
    try:
        size = file.stat().st_size
        with file.open("rb") as f:
            (length,) = struct.unpack("<Q", f.read(8))
            header: Header = json.loads(f.read(length)) if length < size else {}
        ends = [tensor["data_offsets"][1] for tensor in tensors(header).values()]
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError) as e:
        what = "empty" if file.is_file() and not file.stat().st_size else f"not a safetensors file ({type(e).__name__})"
        raise InputError(f"{file}: {what}; fetch it again") from e
    if not ends or 8 + length + max(ends) > size:
        raise InputError(f"{file}: cut at {size:,} bytes, less than its own header says; fetch it again")
    return header


def tensors(header: Header) -> dict[str, dict[str, Any]]:
    """The tensors of a header: dtype, shape, data_offsets by name."""
    return {name: tensor for name, tensor in header.items() if name != "__metadata__"}
