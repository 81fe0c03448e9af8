"""A job of a run on an object store: its folders are made on the training node and mirrored while it runs.

Comes in: the job with URIs for paths. Goes out: a `TrainJob` in a scratch folder of this node, and at the end the model
and the job's files where they belong. All ranks share one node. A node that is lost costs the steps since the last
checkpoint that was mirrored. Never: what a step computes.
"""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from spa_ray.config.training import Tracking, Train, train_section
from spa_ray.errors import RunError
from spa_ray.rollout.settings import ChatSettings
from spa_ray.storage.files import (
    AnyPath,
    as_path,
    children,
    copy_file,
    copy_files,
    delete_file,
    delete_tree,
    files_under,
    is_file,
    is_local,
    read_json,
    write_json,
)
from spa_ray.storage.node_cache import cache_root, local_folder
from spa_ray.training.hashes import record_of
from spa_ray.training.job import TrainJob, TrainResult

CHECKPOINTS, STEP, META = "checkpoints", "step_", "meta.json"
LOG = "train_log.jsonl"
DONE = "stored.json"  # in the stored work folder, once the model is stored: several jobs share one worker group
LOOK_EVERY = 5.0  # seconds between two looks at what is new
PATHS = ("pairs", "model", "out", "work", "cache")


@dataclass(frozen=True)
class StoredJob:
    """A `TrainJob` whose `pairs`, `model`, `out`, `work` and `cache` may be URIs; the same fields otherwise."""

    name: str
    pairs: AnyPath
    model: AnyPath
    out: AnyPath
    work: AnyPath
    train: Train
    seed: int
    trust_remote_code: bool = False
    tracking: Tracking = field(default_factory=Tracking)
    cache: AnyPath | None = None
    chat: ChatSettings | None = None
    context: int | None = None
    models: Mapping[str, AnyPath] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        sections = {name: getattr(self, name).model_dump(mode="json") for name in ("train", "tracking")}
        paths = {name: str(path) for name in PATHS if (path := getattr(self, name)) is not None}
        plain = {"name": self.name, "seed": self.seed, "trust_remote_code": self.trust_remote_code}
        chat = None if self.chat is None else self.chat.model_dump(mode="json")
        models = {name: str(path) for name, path in self.models.items()}
        return {**plain, "chat": chat, "context": self.context, "models": models, **sections, **paths}

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> StoredJob:
        sections = {
            "train": train_section(raw["train"]),
            "tracking": Tracking.model_validate(raw["tracking"]),
            "chat": None if raw.get("chat") is None else ChatSettings.model_validate(raw["chat"]),
        }
        models = {name: as_path(path) for name, path in raw.get("models", {}).items()}
        paths = {name: as_path(raw[name]) for name in PATHS if raw.get(name)}
        return cls(**{**raw, **sections, **paths, "models": models})

    @property
    def scratch(self) -> Path:
        """This node's folder for the job, the same whenever the job comes back to this node."""
        return cache_root() / "scratch" / hashlib.sha256(str(self.work).encode()).hexdigest()[:16]

    def placed(self) -> TrainJob:
        """The job on this node. Every process of the node may ask: the model is fetched once."""
        scratch = self.scratch
        return TrainJob(
            name=self.name,
            pairs=scratch / "pairs",
            model=local_folder(self.model),
            out=scratch / "out" / self.out.name,
            work=scratch / "work",
            train=self.train,
            seed=self.seed,
            trust_remote_code=self.trust_remote_code,
            tracking=self.tracking,
            cache=scratch / "cache",
            chat=self.chat,
            context=self.context,
            models={name: local_folder(path) for name, path in self.models.items()},
        )


def train_job(**fields: Any) -> TrainJob | StoredJob:
    """A job from `TrainJob`'s fields: a plain one where every folder that it reads or writes is local."""
    job = StoredJob(**fields)
    folders = [*job.models.values(), *(folder for name in PATHS if (folder := getattr(job, name)))]
    return TrainJob(**fields) if all(map(is_local, folders)) else job


def run_stored(stored: StoredJob, run: Callable[[TrainJob], TrainResult]) -> TrainResult:
    """`run` the job on this node, mirrored. Collective; all ranks on one node. Raises: as `run` does, RunError."""
    from spa_ray.training import comm

    before = comm.on_rank_zero(lambda: read_json(stored.work / DONE) if is_file(stored.work / DONE) else None)
    if before is not None:
        return replace(TrainResult.from_dict(before), skipped=True)
    job = stored.placed()
    comm.on_rank_zero(lambda: pull(stored, job))
    mirror = Mirror(stored, job) if comm.rank() == 0 else None
    try:
        result = run(job)
    finally:
        if mirror is not None:
            mirror.close()
    late = comm.on_rank_zero(lambda: [mirror.failure] if mirror is not None and mirror.failure else [])
    result = replace(result, model=stored.out, warnings=[*result.warnings, *late])
    comm.on_rank_zero(lambda: push(stored, job, result))
    return result


def pull(stored: StoredJob, job: TrainJob) -> None:
    """Bring the pairs here, and where the store is further than this node the newest checkpoint and the log."""
    shutil.rmtree(job.pairs, ignore_errors=True)
    copy_files(stored.pairs, job.pairs, files_under(stored.pairs))
    job.work.mkdir(parents=True, exist_ok=True)
    if stored.cache is not None:
        held = [name for name in files_under(stored.cache) if not (job.shared / name).exists()]
        copy_files(stored.cache, job.shared, held)
    kept, ours = newest(stored.work / CHECKPOINTS), newest(job.work / CHECKPOINTS)
    if kept is None or (ours is not None and ours.name >= kept.name):
        return
    delete_tree(job.work / CHECKPOINTS)
    copy_file(stored.work / LOG, job.work / LOG)
    partial = job.work / CHECKPOINTS / ".pulled"
    copy_files(kept, partial, files_under(kept))
    if is_file(record_of(kept)):  # without it the resume says so
        copy_file(record_of(kept), record_of(job.work / CHECKPOINTS / kept.name))
    partial.rename(job.work / CHECKPOINTS / kept.name)


def push(stored: StoredJob, job: TrainJob, result: TrainResult) -> None:
    """Put the model and all of the job's files but tokens and checkpoints where they belong, then the result, which
    says that they are there, and clear the scratch.

    Raises: RunError when the store does not take them; the scratch then stays, and the next call goes on from it.
    """
    try:
        files = [n for n in files_under(job.work) if not n.startswith(("tokens_", f"{CHECKPOINTS}/"))]
        copy_files(job.work, stored.work, files)  # the result among them: before the model, as everywhere
        copy_files(job.out, stored.out, files_under(job.out))
        write_json(stored.work / DONE, result.to_dict())
    except OSError as e:
        raise RunError(f"training: {stored.out} cannot be written ({e}); run the same command again") from e
    shutil.rmtree(stored.scratch)


def newest(checkpoints: AnyPath) -> AnyPath | None:
    """The newest complete checkpoint of a folder, local or stored: one whose `meta.json` stands."""
    found = [p for p in children(checkpoints) if p.name.startswith(STEP) and is_file(p / META)]
    return found[-1] if found else None


class Mirror:
    """Copies what appears in the job's folders to the store, from a thread of rank 0, so that no step waits for it.

    `failure` is what went wrong last: a checkpoint that is not mirrored is made up for by the next one.
    """

    def __init__(self, stored: StoredJob, job: TrainJob, *, every: float = LOOK_EVERY) -> None:
        self.failure: str | None = None
        self._stored, self._job, self._every = stored, job, every
        self._sent: dict[str, int] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True, name="mirror")
        self._thread.start()

    def close(self) -> None:
        """Send what is new and end."""
        self._done.set()
        self._thread.join()

    def _follow(self) -> None:
        last = False
        while not last:
            last = self._done.wait(self._every)
            try:
                self.look()
                self.failure = None
            except Exception as e:  # noqa: BLE001  # of whatever client: training goes on, and it is told at the end
                self.failure = f"not everything was mirrored to {self._stored.work}: {type(e).__name__}: {e}"

    def look(self) -> None:
        """Send the log, reference log-probs and the newest checkpoint, each once it has changed."""
        self._send(self._job.work / LOG, self._stored.work / LOG)
        if self._stored.cache is not None:
            for name in files_under(self._job.shared):
                if name.endswith(".npz") and ".partial" not in name:
                    self._send(self._job.shared / name, self._stored.cache / name)
        found = newest(self._job.work / CHECKPOINTS)
        if found is not None and found.name not in self._sent:
            self._send_checkpoint(found, self._stored.work / CHECKPOINTS / found.name)
            self._sent[found.name] = 1

    def _send(self, source: Path, target: AnyPath) -> None:
        stamp = source.stat().st_mtime_ns if source.is_file() else None
        if stamp is not None and self._sent.get(str(target)) != stamp:
            copy_file(source, target)
            self._sent[str(target)] = stamp

    def _send_checkpoint(self, source: AnyPath, target: AnyPath) -> None:
        """`meta.json` last: with it the stored checkpoint is complete. Older ones go then, but for those that stay."""
        delete_file(target / META)
        copy_files(source, target, [name for name in files_under(source) if name != META])
        copy_file(record_of(source), record_of(target))
        self._send(self._job.work / LOG, self._stored.work / LOG)  # as many rows as the checkpoint has steps, or more
        copy_file(source / META, target / META)
        kept = [p for p in children(target.parent) if p.name.startswith(STEP)]
        for old in kept[: -self._job.train.keep_checkpoints]:
            delete_file(old / META)
            delete_tree(old)
            delete_file(record_of(old))
