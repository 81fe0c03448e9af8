"""The run folder on disk: stages that count only once their `stage.json` stands, arms, atomic small files.

Comes in: a path. Goes out: stage folders. Never: what a stage computes. A stage folder without `stage.json` is
unfinished: its own stage resumes it and every reader refuses it. Nothing is deleted here but by `clean`.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spa_ray.errors import InputError

MARKER = "stage.json"


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file by rename, so that a reader sees the old one or the new one."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file by rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


@dataclass(frozen=True)
class Stage:
    """One stage's folder in a run: `stages/NAME-HASH/`."""

    name: str
    hash: str
    folder: Path

    @property
    def done(self) -> bool:
        return (self.folder / MARKER).is_file()

    def facts(self) -> dict[str, Any]:
        """What the stage wrote about itself. Raises: InputError when it is unfinished."""
        if not self.done:
            raise InputError(f"{self.folder}: unfinished (no {MARKER}); run the same command again to finish it")
        return json.loads((self.folder / MARKER).read_text(encoding="utf-8"))

    def finish(self, started: float, **facts: Any) -> dict[str, Any]:
        """Write `stage.json`, last of all. `started` is a `time.time()`."""
        record = {"stage": self.name, "hash": self.hash, "seconds": round(time.time() - started, 2), **facts}
        write_json(self.folder / MARKER, record)
        return record


@dataclass(frozen=True)
class RunFolder:
    """`runs/NAME/` (DESIGN, «Files»)."""

    path: Path

    def stage(self, name: str, digest: str) -> Stage:
        """The stage's folder, made if need be."""
        folder = self.path / "stages" / f"{name}-{digest}"
        folder.mkdir(parents=True, exist_ok=True)
        return Stage(name, digest, folder)

    def arm_file(self, arm: str, iteration: int) -> Path:
        return self.path / "arms" / arm / f"iter_{iteration}.json"

    def stages(self) -> Iterator[Path]:
        """Every stage folder, finished or not, by name."""
        yield from sorted(p for p in (self.path / "stages").glob("*-*") if p.is_dir())

    def used(self) -> set[str]:
        """Names of the stage folders that an arm's iteration or the evaluation refers to."""
        names: set[str] = set()
        for file in (*self.path.glob("arms/*/iter_*.json"), *self.path.glob("evaluation.json")):
            names.update(json.loads(file.read_text(encoding="utf-8"))["stages"].values())
        return names

    def clean(self) -> list[Path]:
        """Delete the stage folders that no arm refers to. Returns: what was deleted."""
        used = self.used()
        stray = [p for p in self.stages() if p.name not in used]
        for folder in stray:
            shutil.rmtree(folder)
        return stray


def claim(out: Path, name: str, digest: str) -> Stage:
    """A folder that the user named as one stage's output: new, unfinished by the same settings, or finished by them.

    Raises: InputError when it holds anything else, so that nothing is mixed or overwritten.
    """
    stage, note = Stage(name, digest, out.absolute()), out / ".stage"
    if stage.done:
        if stage.facts()["hash"] != digest:
            raise InputError(f"{out}: finished with other settings or input; give another --out or remove it")
    elif note.is_file():
        if note.read_text(encoding="utf-8") != digest:
            raise InputError(f"{out}: begun with other settings or input; give another --out or remove it")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: stands already and is not an output of `spa {name}`; give another --out")
    else:
        write_text(note, digest)
    return stage


def open_run(path: str | Path) -> RunFolder:
    """An existing run. Raises: InputError when the folder is not one."""
    folder = Path(path)
    if not (folder / "config.yaml").is_file():
        raise InputError(f"{folder}: not a run folder (no config.yaml); give the path that `spa run` printed")
    return RunFolder(folder)
