"""What a job's checkpoints hold, by SHA-256, in a folder beside the job's work folder: what the job did not write is
never read.

Comes in: a checkpoint `WORK/checkpoints/step_N`. Goes out: its record `WORK.checkpoints/step_N.json`, written whole
before the checkpoint appears. Checkpoints are pickles, so besides they are read as tensors and plain values only
(`no_code`). Never: torch's unrestricted unpickler.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from spa_ray.errors import RunError
from spa_ray.storage.files import AnyPath, files_under

SAFE_ONLY, UNSAFE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def record_of(checkpoint: AnyPath) -> AnyPath:
    """Where the hashes of a checkpoint stand, or would."""
    work = checkpoint.parent.parent
    return work.with_name(f"{work.name}.checkpoints") / f"{checkpoint.name}.json"


def hash_files(folder: Path, *, rank: int = 0, ranks: int = 1) -> dict[str, str]:
    """Relative path -> SHA-256 of this rank's share of the files: every `ranks`-th one, by name."""
    return {name: _sha256(folder / name) for name in files_under(folder)[rank::ranks]}


def write_record(checkpoint: Path, hashes: Mapping[str, str]) -> None:
    """By rename, and on the disk before the checkpoint can be."""
    path = _local(checkpoint)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump({"sha256": dict(sorted(hashes.items()))}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def forget(checkpoints: Path) -> None:
    """Delete the records of checkpoints that are gone."""
    for path in _local(checkpoints / "any").parent.glob("step_*.json"):
        if not (checkpoints / path.stem).exists():
            path.unlink()


def read_record(checkpoint: Path) -> dict[str, str]:
    """Raises: RunError when there is none, or it cannot be read."""
    path = _local(checkpoint)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["sha256"]
        return {str(name): str(digest) for name, digest in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise RunError(
            f"{checkpoint}: it is not known whether this job wrote it ({path}: {type(e).__name__}), "
            "and a checkpoint is made of pickles"
        ) from e


def damage(checkpoint: Path, *, rank: int = 0, ranks: int = 1) -> list[str]:
    """What of this rank's share of the files is not as recorded, one line each. Raises: RunError as `read_record`."""
    recorded, there = read_record(checkpoint), set(files_under(checkpoint))
    found = []
    for name in sorted(there | recorded.keys())[rank::ranks]:
        if name not in recorded:
            found.append(f"{name} is not the job's")
        elif name not in there:
            found.append(f"{name} is gone")
        elif _sha256(checkpoint / name) != recorded[name]:
            found.append(f"{name} has changed")
    return found


@contextmanager
def no_code() -> Iterator[None]:
    """`torch.load` inside the block, DeepSpeed's too, builds tensors, plain values and three plain classes of
    DeepSpeed's, and raises `pickle.UnpicklingError` for anything else."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address
    from torch.serialization import safe_globals

    before = {name: os.environ.pop(name, None) for name in (SAFE_ONLY, UNSAFE)}
    os.environ[SAFE_ONLY] = "1"
    try:
        with safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        del os.environ[SAFE_ONLY]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _local(checkpoint: Path) -> Path:
    return cast(Path, record_of(checkpoint))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
