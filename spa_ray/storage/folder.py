"""The run folder, on a disk or an object store: stages that count only once their `stage.json` stands, and arms.

Comes in: a path or a URI. Goes out: stage folders. Never: what a stage computes. A stage folder without `stage.json` is
unfinished: its own stage resumes it and every reader refuses it. Nothing is deleted here but by `clean`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from spa_ray.errors import InputError
from spa_ray.storage.files import (
    AnyPath,
    as_path,
    children,
    delete_file,
    delete_tree,
    is_file,
    make_folder,
    read_json,
    write_json,
    write_text,
)

MARKER = "stage.json"
ATTEMPTS = "attempts.json"  # in an unfinished stage: with which values each call worked on it
EVALUATION = "evaluation.json"  # in the run folder: which stages hold the answers to held-out prompts
KEPT = "kept.json"  # in the run folder: stages that an unfinished call found in use
PASS = "pass-"  # how the folders of an evaluation of several models begin, which hold its rows until it is done
FURTHER = ("benchmarks", "judges")  # in it: label -> arm -> the stage's folder
CLAIM = ".stage"  # in a folder that a user named: whose output it is to become
LOCKS = "lock"  # a folder in the run folder, or in one that a user named


@dataclass(frozen=True)
class StageFolder:
    """One stage's folder in a run: `stages/NAME-HASH/`."""

    name: str
    hash: str
    folder: AnyPath

    @property
    def done(self) -> bool:
        return is_file(self.folder / MARKER)

    def facts(self) -> dict[str, Any]:
        """What the stage wrote about itself. Raises: InputError when it is unfinished."""
        if not self.done:
            raise InputError(f"{self.folder}: unfinished (no {MARKER}); run the same command again to finish it")
        return read_json(self.folder / MARKER)

    def begin(self, attempt: dict[str, Any]) -> None:
        """Note that a call works on the stage now, and the values that its hash does not cover."""
        write_json(self.folder / ATTEMPTS, {"attempts": [*self._attempts(), attempt]})

    def finish(self, started: float, **facts: Any) -> dict[str, Any]:
        """Write `stage.json`, last of all. `started` is a `time.time()`."""
        record = {"stage": self.name, "hash": self.hash, "seconds": round(time.time() - started, 2), **facts}
        if attempts := self._attempts():
            record["attempts"] = attempts
        write_json(self.folder / MARKER, record)
        return record

    def _attempts(self) -> list[dict[str, Any]]:
        noted = self.folder / ATTEMPTS
        return read_json(noted)["attempts"] if is_file(noted) else []


@dataclass(frozen=True)
class RunFolder:
    """`runs/NAME/` (DESIGN, «Files»)."""

    path: AnyPath

    def stage(self, name: str, digest: str) -> StageFolder:
        """The stage's folder, made if need be."""
        folder = self.path / "stages" / f"{name}-{digest}"
        make_folder(folder)
        return StageFolder(name, digest, folder)

    def arm_file(self, arm: str, iteration: int) -> AnyPath:
        return self.path / "arms" / arm / f"iter_{iteration}.json"

    def arm_files(self) -> list[AnyPath]:
        """Every arm's records, by name."""
        return sorted(self.path.glob("arms/*/iter_*.json"), key=str)

    def stages(self) -> Iterator[AnyPath]:
        """Every stage folder, finished or not, by name."""
        for child in children(self.path / "stages"):
            if "-" in child.name and not child.name.startswith("."):
                yield child

    def used(self) -> set[str]:
        """Names of the stage folders that an arm's iteration or the evaluation refers to, or did before a call that did
        not end."""
        evaluation, kept = self.path / EVALUATION, self.path / KEPT
        records = [read_json(file) for file in (*self.arm_files(), *([evaluation] if is_file(evaluation) else []))]
        names = {name for record in records for name in record["stages"].values()}
        further = [arms for r in records for part in FURTHER for arms in r.get(part, {}).values()]
        names |= {name for arms in further for name in arms.values()}
        return names | set(read_json(kept)["stages"] if is_file(kept) else ())

    def keep_used(self) -> None:
        """Spare what is in use now until `release`: a call writes its records again, one stage after the other."""
        write_json(self.path / KEPT, {"stages": sorted(self.used())})

    def release(self) -> None:
        """A call has written all its records."""
        delete_file(self.path / KEPT)

    def clean(self) -> list[AnyPath]:
        """Delete the stage folders that no arm refers to. Returns: what was deleted."""
        used = self.used()
        working = any(p.name in used and not is_file(p / MARKER) for p in self.stages())
        stray = [p for p in self.stages() if p.name not in used and not (working and p.name.startswith(PASS))]
        for folder in stray:
            delete_tree(folder)
        return stray


def claim(out: AnyPath, name: str, digest: str) -> StageFolder:
    """A folder that the user named as one stage's output: new, unfinished by the same settings, or finished by them.

    Raises: InputError when it holds anything else, so that nothing is mixed or overwritten.
    """
    out = as_path(out)
    stage, fresh = check_claim(out, name, digest)
    if fresh:
        write_text(out / CLAIM, digest)
    return stage


def check_claim(out: AnyPath, name: str, digest: str) -> tuple[StageFolder, bool]:
    """The stage that `claim` would give, and whether nobody has claimed the folder yet. Nothing is written.

    Raises: InputError as `claim` does.
    """
    stage, note = StageFolder(name, digest, out), out / CLAIM
    if stage.done:
        if stage.facts()["hash"] != digest:
            raise InputError(f"{out}: finished with other settings or input; give another --out or remove it")
        return stage, False
    if is_file(note):
        if note.read_text(encoding="utf-8") != digest:
            raise InputError(f"{out}: begun with other settings or input; give another --out or remove it")
        return stage, False
    if is_file(out) or any(child.name != LOCKS for child in children(out)):
        raise InputError(f"{out}: stands already and is not an output of `spa {name}`; give another --out")
    return stage, True


def open_run(path: str | AnyPath) -> RunFolder:
    """An existing run. Raises: InputError when the folder is not one."""
    folder = as_path(path)
    if not is_file(folder / "config.yaml"):
        raise InputError(f"{folder}: not a run folder (no config.yaml); give the path that `spa run` printed")
    return RunFolder(folder)
