"""One stage in a folder that the user named, under a lock while it is worked on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from spa_ray.storage.files import AnyPath, as_path
from spa_ray.storage.folder import StageFolder, check_claim, claim
from spa_ray.storage.lock import RunLock


@contextmanager
def claimed(out: AnyPath, name: str, digest: str) -> Iterator[StageFolder]:
    """The stage that the folder `out` is to become, under a lock unless it is finished.

    Raises: InputError for a folder that is something else, or in use.
    """
    stage, _ = check_claim(as_path(out), name, digest)
    if stage.done:
        yield stage
        return
    with RunLock(stage.folder):
        yield claim(stage.folder, name, digest)
