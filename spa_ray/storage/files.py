"""The one place that knows filesystems: local disks, and whatever fsspec reaches by a URI (`s3://`, `gs://`, …).

Comes in: text that a user gave. Goes out: paths with pathlib's methods, and what Arrow and Ray want for them. Endpoints
and keys come from the environment (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, …), never from a config, so that none lands in
a manifest. Never: what a file means.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from spa_ray.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.dataset as pds
    from pyarrow.fs import FileSystem
    from upath import UPath

AnyPath: TypeAlias = "Path | UPath"

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}  # URI scheme -> our extra that brings its client
CONDITIONAL = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"}  # stores with a put that fails where an object stands
# What of the environment says where a store is, and is no secret: every process of a cluster needs it.
STORAGE_VARIABLES = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "STORAGE_EMULATOR_HOST",
)
CLIENTS = {"aiobotocore", "aiohttp", "botocore", "gcsfs", "google", "azure"}  # packages with errors of their own
ATTEMPTS = 10  # of one request to an object store, with growing pauses


def as_path(text: str | AnyPath) -> AnyPath:
    """The path of a text: an absolute local one, or a `UPath` for a URI. `str()` of it gives it back.

    Raises: InputError for a URI of an unknown scheme, one whose client is not installed, and one that holds secrets.
    """
    uri = str(text)
    scheme, found, rest = uri.partition("://")
    if not found:
        return local_path(uri)
    if scheme in {"file", "local"}:
        return Path(rest).absolute()
    if "@" in rest.partition("/")[0] or "?" in rest:
        raise InputError(f"{scheme}://…: keys and options do not belong in a path; set them in the environment")
    from upath import UPath

    # Other processes write beside us: a listing that is remembered would be wrong.
    options: dict[str, Any] = {"use_listings_cache": False}
    if _is_s3(scheme) and (endpoint := s3_endpoint()):
        options["endpoint_url"] = endpoint
    try:
        path = UPath(uri.rstrip("/"), **options)
        assert path.fs is not None  # reached here, so that a missing client shows now
    except ValueError as e:
        raise InputError(f"{uri}: no filesystem is known for {scheme}://") from e
    except ImportError as e:
        extra = EXTRAS.get(scheme)
        mend = f"pip install 'spa-ray[{extra}]'" if extra else str(e)
        raise InputError(f"{uri}: the client for {scheme}:// is not installed; {mend}") from e
    return path


def out_path(text: str | AnyPath) -> AnyPath:
    """`as_path` of a folder that a command is to write. Raises: InputError, also for one that cannot be written."""
    path = as_path(text)
    if isinstance(path, Path):  # a store is asked when the command begins to write
        check_writable(path)
    return path


def local_path(text: str | Path) -> Path:
    """The absolute path of a text on this machine; `~` is the home folder.

    Raises: InputError for a URI and for what is no path.
    """
    if "://" in str(text):
        raise InputError(f"{text}: a URI; give a path on this machine")
    if not str(text).strip() or "\0" in str(text):
        raise InputError(f"{str(text)!r} is no path; give the path of a file or a folder")
    return Path(os.path.expanduser(text)).absolute()


def is_local(path: AnyPath) -> bool:
    """Whether the path lies in this machine's file tree (a network mount counts as local)."""
    return isinstance(path, Path)


def check_writable(folder: AnyPath) -> None:
    """Raises: InputError where a disk or the store of a URI takes no file, found out by writing one.

    A local folder that is not there yet is looked for above.
    """
    if isinstance(folder, Path):
        try:
            with tempfile.TemporaryFile(dir=next(above for above in (folder, *folder.parents) if above.exists())):
                return
        except OSError as e:
            raise InputError(f"{folder}: cannot be written ({e.strerror}); name a folder that can be") from e
    probe = folder / f".probe-{uuid.uuid4().hex[:12]}"
    try:
        probe.fs.pipe_file(probe.path, b"")
        probe.fs.rm_file(probe.path)
    except Exception as e:  # every client has errors of its own
        raise InputError(
            f"{folder}: cannot be written ({type(e).__name__}: {e}); check that the bucket is there, the endpoint "
            "(AWS_ENDPOINT_URL) and the keys in the environment"
        ) from e


def client_error(error: BaseException) -> str | None:
    """One line for an error of an object store's client that is no OSError (no keys, no route); None for any other."""
    origin = type(error).__module__.partition(".")[0]
    return f"{type(error).__name__}: {error}" if origin in CLIENTS else None


def s3_endpoint() -> str | None:
    """The S3 server that the environment names, as boto reads it; None for Amazon's own."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def _is_s3(scheme: str) -> bool:
    return scheme in {"s3", "s3a"}


# --- Arrow and Ray ----------------------------------------------------------------------------------------------------


def arrow_filesystem(path: AnyPath) -> tuple[FileSystem, str]:
    """The Arrow filesystem of a path and the path on it.

    Both go to `pyarrow.dataset`, `pyarrow.parquet`, Ray Data (`filesystem=`), its `CheckpointConfig`
    (`override_filesystem=`) and Ray Train's `RunConfig` (`storage_filesystem=`). S3 is Arrow's own client, the others
    are fsspec's behind Arrow's interface. The object travels to workers with its endpoint, without keys.
    """
    from pyarrow import fs

    if isinstance(path, Path):
        return fs.LocalFileSystem(), str(path.absolute())
    if _is_s3(path.protocol):
        return _arrow_s3(path.path.partition("/")[0], s3_endpoint()), path.path
    return fs.PyFileSystem(fs.FSSpecHandler(path.fs)), path.path


@functools.cache
def _arrow_s3(bucket: str, endpoint: str | None) -> FileSystem:
    from pyarrow import fs

    named = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    region = named or (None if endpoint else fs.resolve_s3_region(bucket))
    return fs.S3FileSystem(
        region=region,
        endpoint_override=endpoint,  # Arrow's client does not read AWS_ENDPOINT_URL
        connect_timeout=10,
        request_timeout=60,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
    )


def parquet_files(folder: AnyPath) -> list[str]:
    """The Parquet files under a folder (or the one file that it is), by name, as paths on `arrow_filesystem`."""
    return list(parquet_sizes(folder))


def parquet_sizes(folder: AnyPath) -> dict[str, int]:
    """The bytes of each of `parquet_files`, in the same order.

    Files and folders whose names begin with a dot or an underscore are left out, as Arrow and Ray do.
    """
    from pyarrow import fs

    filesystem, root = arrow_filesystem(folder)
    about = filesystem.get_file_info(root)
    if about.type == fs.FileType.File:
        return {root: about.size}
    found = filesystem.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
    files = {info.path: info.size for info in found if info.type == fs.FileType.File}
    hidden = {name for name in files if any(part[0] in "._" for part in name[len(root) :].split("/") if part)}
    return {name: files[name] for name in sorted(files.keys() - hidden) if name.endswith(".parquet")}


def parquet_dataset(folder: AnyPath, schema: pa.Schema | None = None) -> pds.Dataset:
    """The Parquet data set of a folder and its subfolders, or of one file. Without any file it has no row.

    Raises: FileNotFoundError when there is no file and no `schema` says what an empty one looks like.
    """
    import pyarrow.dataset as pds

    files = parquet_files(folder)
    if files:
        return pds.dataset(files, schema=schema, format="parquet", filesystem=arrow_filesystem(folder)[0])
    if schema is None:
        raise FileNotFoundError(f"{folder}: no *.parquet in it")
    return pds.dataset(schema.empty_table())


# --- small files ------------------------------------------------------------------------------------------------------


def write_json(path: AnyPath, value: Any) -> None:
    """Write a JSON file as `write_text` does. Raises: ValueError for NaN and infinities."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: AnyPath) -> Any:
    """The value of a JSON file. Raises: OSError, ValueError.

    One request on a store: a file that is opened there and replaced before it is read would be an error.
    """
    data = path.read_bytes() if isinstance(path, Path) else path.fs.cat_file(path.path)
    return json.loads(data)


def write_text(path: AnyPath, text: str) -> None:
    """Write a text file as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_bytes(path: AnyPath, data: bytes) -> None:
    """Write a file so that a reader sees the old one or the new one: by rename on a local disk, by one put on an object
    store, where an object appears whole or not at all."""
    if not isinstance(path, Path):
        path.fs.pipe_file(path.path, data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # a full disk leaves half of it


def create_text(path: AnyPath, text: str, *, settle: float = 2.0) -> None:
    """Write a file that must not stand yet; of several who try at once, one gets through. `text` is the caller's alone.

    This holds by O_EXCL on local disks and NFS, and by a conditional put (`If-None-Match: *` and its like) on the
    stores of `CONDITIONAL`. Elsewhere the file is written if none is there and read back after `settle` seconds: the
    last writer wins, if nobody takes longer than that from looking to writing. Raises: FileExistsError.
    """
    if isinstance(path, Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("x", encoding="utf-8")
        try:
            with file:
                file.write(text)
        except OSError:  # a full disk: an empty file would keep everybody out
            path.unlink(missing_ok=True)
            raise
        return
    data = text.encode()
    with contextlib.suppress(FileExistsError):  # also what a put that was sent twice by its client meets: its own
        path.fs.pipe_file(path.path, data, mode="create")
    if path.protocol not in CONDITIONAL:
        time.sleep(settle)
    if path.fs.cat_file(path.path) != data:
        raise FileExistsError(str(path))


# --- folders ----------------------------------------------------------------------------------------------------------


def make_folder(path: AnyPath) -> None:
    """Make a local folder; on an object store folders come with their files."""
    if isinstance(path, Path):
        path.mkdir(parents=True, exist_ok=True)


def kind(path: AnyPath) -> str | None:
    """`file`, `directory` or None where there is nothing.

    Raises: the client's errors, which fsspec's `is_file` takes for a no: paid work would be done again because a store
    was away for a moment.
    """
    if isinstance(path, Path):
        return "file" if path.is_file() else "directory" if path.is_dir() else None
    try:
        return str(path.fs.info(path.path)["type"])
    except FileNotFoundError:
        return None


def is_file(path: AnyPath) -> bool:
    """Whether there is a file. Raises: as `kind`."""
    return kind(path) == "file"


def children(folder: AnyPath) -> list[AnyPath]:
    """What lies in a folder, by name; nothing when there is no such folder. Object stores' folder markers are left out
    (Arrow's client writes them, `iterdir` of fsspec's shows them as children of themselves)."""
    if isinstance(folder, Path):
        return sorted(folder.iterdir()) if folder.is_dir() else []
    try:
        found = folder.fs.ls(folder.path, detail=False)
    except (FileNotFoundError, NotADirectoryError):
        return []
    own = folder.path.rstrip("/")
    names = {name.rstrip("/").rpartition("/")[2] for name in found if name.rstrip("/") != own}
    return [folder / name for name in sorted(names)]


def delete_file(path: AnyPath) -> None:
    """Delete a file if it is there."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()


def delete_tree(folder: AnyPath) -> None:
    """Delete a folder and all in it, if it is there."""
    if isinstance(folder, Path):
        if folder.exists():
            shutil.rmtree(folder)
        return
    with contextlib.suppress(FileNotFoundError):
        folder.fs.rm(folder.path, recursive=True)


def copy_file(source: AnyPath, target: AnyPath) -> None:
    """Copy one file; it appears whole under its new name: by rename on local disks, by the last request of an upload on
    object stores."""
    if not isinstance(target, Path):
        if isinstance(source, Path):
            target.fs.put_file(str(source), target.path)
            return
        with source.open("rb") as data, target.open("wb") as out:
            shutil.copyfileobj(data, out, 1 << 24)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.part")
    try:
        if isinstance(source, Path):
            shutil.copyfile(source, partial)
        else:
            source.fs.get_file(source.path, str(partial))
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def copy_files(source: AnyPath, target: AnyPath, names: Iterable[str]) -> None:
    """Copy the named files (relative paths) of one folder into another, one by one.

    Raises: InputError for a name that leads out of the folder, as an object store's keys can.
    """
    for name in names:
        if ".." in name.split("/"):
            raise InputError(f"{source}: the name {name!r} leaves the folder")
        copy_file(source / name, target / name)


def files_under(folder: AnyPath) -> list[str]:
    """Every file under a folder, as sorted paths relative to it; nothing when there is no such folder."""
    if isinstance(folder, Path):
        return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    root = folder.path.rstrip("/") + "/"
    return sorted(name[len(root) :] for name in folder.fs.find(folder.path) if not name.endswith("/"))
