"""Checkpoints of a running job: written whole or not at all, resumed exactly or refused.

Comes in: a DeepSpeed engine, the job's fingerprint. Goes out: folders `step_N` under `work/checkpoints`, their hashes
beside `work`. All ranks call `save` and `load` together. Never: a silent fresh start, a file of somebody else's.
"""

from __future__ import annotations

import json
import pickle
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from spa_ray.config.training import Train
from spa_ray.errors import InputError, RunError
from spa_ray.training import comm, hashes
from spa_ray.training.own_modules import OwnModules

TAG = "state"
META = "meta.json"


def is_due(
    done: int, steps: int, *, every_steps: int | None, every_minutes: float | None, seconds_since: float
) -> bool:
    """Whether to save now that `done` of `steps` steps are done, `seconds_since` the last save (or the start).

    Never after the last step: the model itself is written then.
    """
    if done >= steps:
        return False
    by_steps = every_steps is not None and done % every_steps == 0
    return by_steps or (every_minutes is not None and seconds_since >= 60 * every_minutes)


class SaveTimer:
    """When to save, by steps and by rank 0's clock, alike on every rank. `now` counts seconds."""

    def __init__(self, train: Train, steps: int, now: Callable[[], float] = time.monotonic) -> None:
        self.train, self.steps, self.now = train, steps, now
        self.last = now()

    def due(self, done: int) -> bool:
        """Whether to save after this step. Collective where a clock is asked for."""
        decide = partial(self._decide, done)
        return decide() if self.train.save_every_minutes is None else comm.on_rank_zero(decide)

    def restart(self) -> None:
        """A checkpoint has been written: the time that it took counts for nothing."""
        self.last = self.now()

    def _decide(self, done: int) -> bool:
        return is_due(
            done,
            self.steps,
            every_steps=self.train.save_every_steps,
            every_minutes=self.train.save_every_minutes,
            seconds_since=self.now() - self.last,
        )


@dataclass(frozen=True)
class CheckpointMeta:
    """What a checkpoint belongs to. A resume needs all of it to be equal but `step`."""

    step: int
    fingerprint: str
    workers: int
    zero_stage: int


def save(
    engine: Any,
    folder: Path,
    meta: CheckpointMeta,
    *,
    keep: int,
    frozen_excluded: bool,
    own: OwnModules | None = None,
) -> None:
    """Write `folder/step_N` under another name, record its hashes, rename it, and delete all but the newest `keep`.

    Whatever is killed in between, a checkpoint that has its name has its record.
    """
    final = folder / f"step_{meta.step:08d}"
    partial = folder / f".partial_{meta.step:08d}"
    comm.on_rank_zero(lambda: _fresh(partial))
    engine.save_checkpoint(str(partial), tag=TAG, save_latest=False, exclude_frozen_parameters=frozen_excluded)
    if own is not None:
        comm.on_rank_zero(lambda: own.save(partial))
    comm.on_rank_zero(lambda: (partial / META).write_text(json.dumps(asdict(meta))))  # all have written, and see it
    mine = hashes.hash_files(partial, rank=comm.rank(), ranks=comm.world_size())
    found = comm.gather_lists([f"{digest} {name}" for name, digest in mine.items()])
    recorded = {name: digest for digest, _, name in (line.partition(" ") for line in found)}
    comm.on_rank_zero(lambda: _publish(partial, final, recorded, keep))


def newest(folder: Path) -> tuple[Path, CheckpointMeta] | None:
    """The newest complete checkpoint, or None. Raises: RunError when its meta.json cannot be read."""
    found = _complete(folder)
    if not found:
        return None
    try:
        return found[-1], read_meta(found[-1])
    except (OSError, ValueError, TypeError) as e:
        raise RunError(
            f"{found[-1]}: the checkpoint cannot be read ({e}); delete it to resume from the one before"
        ) from e


def read_meta(path: Path) -> CheckpointMeta:
    """What the checkpoint `path` (a folder `step_N`) belongs to. Raises: OSError, ValueError, TypeError."""
    return CheckpointMeta(**json.loads((path / META).read_text()))


def load(
    engine: Any,
    path: Path,
    found: CheckpointMeta,
    expected: CheckpointMeta,
    *,
    frozen_excluded: bool,
    own: OwnModules | None = None,
) -> None:
    """Put the engine, and the method's own modules, where the checkpoint left them, once every file is known to be the
    job's own.

    Raises: InputError when it belongs to another run; RunError when a file is not as the job wrote it.
    """
    if found.workers != expected.workers:
        raise InputError(
            f"{path}: written by {found.workers} workers, this run has {expected.workers}; "
            f"set resources.train_workers={found.workers}, or delete {path.parent} to start over"
        )
    if (found.fingerprint, found.zero_stage) != (expected.fingerprint, expected.zero_stage):
        raise InputError(f"{path}: of another model, data or config; delete {path.parent} to start over")
    mend = f"delete {path} to resume from the one before"
    comm.on_rank_zero(lambda: _recorded(path, mend))
    bad = comm.gather_lists(hashes.damage(path, rank=comm.rank(), ranks=comm.world_size()))
    if bad:
        raise RunError(f"{path}: not as the job wrote it ({bad[0]}); {mend}")
    try:
        with hashes.no_code():
            loaded, _ = engine.load_checkpoint(str(path), tag=TAG, load_module_strict=not frozen_excluded)
            if own is not None:
                own.load(path)
    except pickle.UnpicklingError as e:
        raise RunError(f"{path}: holds more than tensors and plain values ({str(e).splitlines()[0]}); {mend}") from e
    if loaded is None:
        raise RunError(f"{path}: DeepSpeed could not load this checkpoint; delete it to resume from the one before")


def _complete(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step_*") if (p / META).is_file())


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _recorded(path: Path, mend: str) -> None:
    try:
        hashes.read_record(path)
    except RunError as e:
        raise RunError(f"{e}; {mend}") from e


def _publish(partial: Path, final: Path, recorded: dict[str, str], keep: int) -> None:
    if final.exists():
        shutil.rmtree(final)
    hashes.write_record(final, recorded)
    partial.rename(final)
    for old in _complete(final.parent)[:-keep]:
        shutil.rmtree(old)
    hashes.forget(final.parent)
