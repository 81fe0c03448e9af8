"""The check of a model's weights beside a plan, in a process of its own: importing torch takes longer than planning.

Takes a model folder; gives the notes of `training.folder.check_weights`, or its InputError, when the plan is made. A
folder that passed is known from then on, in this node's cache, until one of its files or transformers changes.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

from spa_ray.errors import InputError, RunError
from spa_ray.storage.model_folder import stamp
from spa_ray.storage.node_cache import cache_root

CHECK = 1  # raise it when `training.folder` finds more
SECONDS = 600  # for headers and two imports
Notes = Callable[[], list[str]]


@contextmanager
def weights_checked(folder: Path | None, *, trust_remote_code: bool) -> Iterator[Notes]:
    """Start the check; calling what is yielded waits for it. A process that has torch already checks by itself."""
    if folder is None:
        yield list
        return
    if "torch" in sys.modules:
        from spa_ray.training.folder import check_weights

        yield lambda: check_weights(folder, trust_remote_code=trust_remote_code)
        return
    passed = _place(folder)
    if passed.is_file() and not trust_remote_code:  # a folder's own code may come from elsewhere
        yield lambda: list(json.loads(passed.read_text(encoding="utf-8")))
        return
    command = [sys.executable, "-m", "spa_ray.pipeline.plan_folder", str(folder), str(int(trust_remote_code))]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            yield lambda: _kept(answer(process, folder), passed)
        finally:
            process.kill()


def _place(folder: Path) -> Path:
    """The file that says that this folder, as it is, has passed."""
    known = [CHECK, version("transformers"), str(folder.resolve()), stamp(folder)]
    return cache_root() / "checked" / f"{hashlib.sha256(json.dumps(known).encode()).hexdigest()[:32]}.json"


def _kept(notes: list[str], place: Path) -> list[str]:
    with suppress(OSError):  # without a cache the next plan asks again
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = place.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(notes), encoding="utf-8")
        partial.replace(place)
    return notes


def answer(process: subprocess.Popen[bytes], folder: Path) -> list[str]:
    """The notes that the process printed. Raises: its InputError; RunError when it gave no verdict in time."""
    try:
        out, err = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired as e:
        raise RunError(
            f"{folder}: the check of its weights took more than {SECONDS} s; is the folder's disk answering?"
        ) from e
    if process.returncode:
        last = (err.decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
        raise RunError(f"{folder}: the check of its weights ended with status {process.returncode}: {last}")
    said = json.loads(out.decode().splitlines()[-1])
    if said["error"] is not None:
        raise InputError(said["error"])
    return list(said["notes"])


def main(folder: str, trust_remote_code: str) -> None:
    """Print the verdict as one line of JSON."""
    from spa_ray.training.folder import check_weights

    notes, error = list[str](), None
    try:
        notes = check_weights(Path(folder), trust_remote_code=trust_remote_code == "1")
    except InputError as e:
        error = str(e)
    print(json.dumps({"notes": notes, "error": error}))


if __name__ == "__main__":
    main(*sys.argv[1:])
