"""Checkpoints of a running job: written whole or not at all, resumed exactly or refused.

Comes in: a DeepSpeed engine, the job's fingerprint. Goes out: folders `step_N` under `work/checkpoints`. All ranks call
`save` and `load` together. Never: a silent fresh start.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spa_ray.errors import InputError, RunError
from spa_ray.training import comm

TAG = "state"


@dataclass(frozen=True)
class CheckpointMeta:
    """What a checkpoint belongs to. A resume needs all of it to be equal but `step`."""

    step: int
    fingerprint: str
    workers: int
    zero_stage: int


def save(engine: Any, folder: Path, meta: CheckpointMeta, *, keep: int, frozen_excluded: bool) -> None:
    """Write `folder/step_N` under another name, rename it, and delete all but the newest `keep`."""
    final = folder / f"step_{meta.step:08d}"
    partial = folder / f".partial_{meta.step:08d}"
    comm.on_rank_zero(lambda: _fresh(partial))
    engine.save_checkpoint(str(partial), tag=TAG, save_latest=False, exclude_frozen_parameters=frozen_excluded)
    comm.on_rank_zero(lambda: _publish(partial, final, meta, keep))


def newest(folder: Path) -> tuple[Path, CheckpointMeta] | None:
    """The newest complete checkpoint, or None. Raises: RunError when its meta.json cannot be read."""
    found = _complete(folder)
    if not found:
        return None
    try:
        return found[-1], CheckpointMeta(**json.loads((found[-1] / "meta.json").read_text()))
    except (OSError, ValueError, TypeError) as e:
        raise RunError(
            f"{found[-1]}: the checkpoint cannot be read ({e}); delete it to resume from the one before"
        ) from e


def load(engine: Any, path: Path, found: CheckpointMeta, expected: CheckpointMeta, *, frozen_excluded: bool) -> None:
    """Put the engine where the checkpoint left it. Raises: InputError when it belongs to another run."""
    if found.workers != expected.workers:
        raise InputError(
            f"{path}: written by {found.workers} workers, this run has {expected.workers}; "
            f"set resources.train_workers={found.workers}, or delete {path.parent} to start over"
        )
    if (found.fingerprint, found.zero_stage) != (expected.fingerprint, expected.zero_stage):
        raise InputError(f"{path}: of another model, data or config; delete {path.parent} to start over")
    loaded, _ = engine.load_checkpoint(str(path), tag=TAG, load_module_strict=not frozen_excluded)
    if loaded is None:
        raise RunError(f"{path}: DeepSpeed could not load this checkpoint; delete it to resume from the one before")


def _complete(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step_*") if (p / "meta.json").is_file())


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _publish(partial: Path, final: Path, meta: CheckpointMeta, keep: int) -> None:
    (partial / "meta.json").write_text(json.dumps(asdict(meta)))
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    for old in _complete(final.parent)[:-keep]:
        shutil.rmtree(old)
