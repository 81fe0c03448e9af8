"""Model folders on this node's own disk: what lies on an object store or a hub is fetched once a node.

Comes in: a folder as the driver named it. Goes out: a local folder with the same last name. A file lock lets one
process of a node fetch while the others wait; the copy appears by rename, and an interrupted fetch goes on with the
files that it lacks. Never: deletes a copy, or looks into a file.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from spa_ray.errors import InputError, RunError
from spa_ray.storage.files import AnyPath

if TYPE_CHECKING:
    from upath import UPath

CACHE = "SPA_RAY_CACHE"  # environment variable: this node's folder for copies and for training's scratch
FETCH_SECONDS = 24 * 3600.0  # for a fetch, and for a process that waits for another one's
FETCH_THREADS = 8  # files at a time from a store
# What of a hub's repository is fetched, and what of that is not: the same weights once more in another library's names.
# A model's own code is fetched as well; it is run only with `model.trust_remote_code`.
HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model*", "*.txt", "*.py")
HUB_UNREAD = ("consolidated*", "original/*", "*/*.safetensors", "onnx/*", "metal/*")
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
    if _is_hubs(folder):
        owner_and_name = folder.parent.parent.name.removeprefix("models--").replace("--", "/")
        return hub_folder(owner_and_name, folder.name)
    raise InputError(
        f"{folder}: no such folder on node {os.uname().nodename}; put the model where every node sees it: "
        "a shared disk, a URI (s3://…) or a hub id"
    )


def may_be_fetched(folder: AnyPath) -> bool:
    """Whether `local_folder` may fetch this folder on some node: it is on a store, or in the hub's cache here."""
    return not isinstance(folder, Path) or _is_hubs(folder)


def _is_hubs(folder: Path) -> bool:
    return folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")


def hub_folder(name: str, revision: str | None) -> Path:
    """The files of a hub's model that an engine or training reads, in the hub's cache. Raises: as huggingface_hub."""
    from huggingface_hub import snapshot_download

    found = snapshot_download(name, revision=revision, allow_patterns=list(HUB_FILES), ignore_patterns=list(HUB_UNREAD))
    return Path(found)


def _stored(folder: UPath) -> Path:
    from filelock import FileLock, Timeout

    found = {name: info for name, info in folder.fs.find(folder.path, detail=True).items() if not name.endswith("/")}
    if not found:
        raise InputError(f"{folder}: no file in it")
    versions = [[name, *(str(info[key]) for key in VERSIONS if key in info)] for name, info in sorted(found.items())]
    key = hashlib.sha256(json.dumps([str(folder), versions]).encode()).hexdigest()[:16]
    copies = cache_root() / "folders"
    target = copies / key / folder.name
    try:
        copies.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(
            f"{copies}: cannot be made ({e.strerror}); set {CACHE} to a folder for copies of models"
        ) from e
    try:
        with FileLock(copies / f"{key}.lock", timeout=FETCH_SECONDS):
            if not target.is_dir():
                _fetch(folder, {name: int(info.get("size") or 0) for name, info in found.items()}, target)
    except Timeout as e:
        raise RunError(f"{folder}: another process has been fetching it to {target} for {FETCH_SECONDS:g} s") from e
    return target


def _fetch(folder: UPath, sizes: dict[str, int], target: Path) -> None:
    """Fetch the files, several at a time. Files that an earlier, interrupted call completed are kept."""
    partial = target.with_name(f".{target.name}.partial")
    root = folder.path.rstrip("/") + "/"
    wanted: dict[str, Path] = {}
    for name in sizes:
        inside = name.removeprefix(root)
        if ".." in inside.split("/"):  # a key may hold anything
            raise InputError(f"{folder}: the name {inside!r} leaves the folder")
        wanted[name] = partial / inside

    def get(name: str) -> None:
        file = wanted[name]
        if file.is_file() and file.stat().st_size == sizes[name]:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        begun = file.with_name(f".{file.name}.begun")
        folder.fs.get_file(name, str(begun))
        begun.rename(file)

    with ThreadPoolExecutor(FETCH_THREADS) as threads:
        list(threads.map(get, wanted))
    for begun in partial.rglob(".*.begun"):
        begun.unlink()
    partial.rename(target)
