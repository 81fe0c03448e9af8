"""Model folders on this node's own disk: what lies on an object store or a hub is fetched once a node.

Comes in: a folder as the driver named it. Goes out: a local folder with the same last name. A file lock lets one
process of a node fetch while the others wait; the copy appears by rename. Never: deletes a copy, or looks into a file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from spa_ray.data.files import AnyPath
from spa_ray.errors import InputError, RunError

if TYPE_CHECKING:
    from upath import UPath

CACHE = "SPA_RAY_CACHE"  # environment variable: this node's folder for copies and for training's scratch
FETCH_SECONDS = 3600.0  # a process waits this long for another one's fetch
VERSIONS = ("size", "ETag", "etag", "md5Hash", "generation", "mtime", "LastModified", "created")  # of a stored file


def cache_root() -> Path:
    """This node's folder for copies: $SPA_RAY_CACHE, else `spa_ray` in the user's cache folder."""
    named = os.environ.get(CACHE)
    if named:
        return Path(named).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "spa_ray"


def local_folder(folder: AnyPath) -> Path:
    """The folder on this node: itself where it is local, else a copy, which is fetched if there is none yet.

    The copy's place covers the names and versions of the stored files, so a folder that changed is fetched anew. A
    folder of the hub's cache that only the driver has is fetched from the hub again, at the same revision.
    Raises: InputError when this node does not see it; RunError when another process's fetch does not end.
    """
    if not isinstance(folder, Path):
        return _stored(folder)
    if folder.is_dir():
        return folder
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        from huggingface_hub import snapshot_download

        owner_and_name = folder.parent.parent.name.removeprefix("models--").replace("--", "/")
        return Path(snapshot_download(owner_and_name, revision=folder.name))
    raise InputError(
        f"{folder}: no such folder on node {os.uname().nodename}; put the model where every node sees it: "
        "a shared disk, a URI (s3://…) or a hub id"
    )


def _stored(folder: UPath) -> Path:
    from filelock import FileLock, Timeout

    found = {name: info for name, info in folder.fs.find(folder.path, detail=True).items() if not name.endswith("/")}
    if not found:
        raise InputError(f"{folder}: no file in it")
    versions = [[name, *(str(info[key]) for key in VERSIONS if key in info)] for name, info in sorted(found.items())]
    key = hashlib.sha256(json.dumps([str(folder), versions]).encode()).hexdigest()[:16]
    copies = cache_root() / "folders"
    target = copies / key / folder.name
    copies.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(copies / f"{key}.lock", timeout=FETCH_SECONDS):
            if not target.is_dir():
                _fetch(folder, list(found), target)
    except Timeout as e:
        raise RunError(f"{folder}: another process has been fetching it to {target} for {FETCH_SECONDS:g} s") from e
    return target


def _fetch(folder: UPath, names: list[str], target: Path) -> None:
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    root = folder.path.rstrip("/") + "/"
    for name in names:
        inside = name.removeprefix(root)
        if ".." in inside.split("/"):  # a key may hold anything
            raise InputError(f"{folder}: the name {inside!r} leaves the folder")
        (partial / inside).parent.mkdir(parents=True, exist_ok=True)
        folder.fs.get_file(name, str(partial / inside))
    partial.rename(target)
