"""Data sets that Hugging Face `datasets` reads: those of a hub, folders of `save_to_disk`, Parquet behind a URI.

A source becomes Arrow tables of one split, streamed: nothing grows with the data set. No code of a repository is run.
Every wait ends. What the library raises becomes one line that says what to do.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from spa_ray.data.containers import looks_like_file
from spa_ray.data.folders import choose_split
from spa_ray.errors import InputError, LateError
from spa_ray.storage.deadline import within
from spa_ray.storage.files import AnyPath, as_path

HUB = "hf://"
_HUB_SET = re.compile(r"hf://(?:datasets/)?([\w.-]+/[\w.-]+)(?:@([^/]+))?(?:/([\w.-]+))?")
_OWNER_AND_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
SAVED = ("state.json", "dataset_dict.json")  # in a folder that `save_to_disk` of one split or of several wrote
BATCH = 1024  # rows in memory
WAIT_SECONDS = 300.0  # for the list of splits, and for each batch of rows
LONGEST_REASON = 300  # characters of the library's own words

T = TypeVar("T")


class UnreachableError(InputError):
    """The hub does not answer, or may not be asked (HF_HUB_OFFLINE)."""


def address_of(source: str) -> str | None:
    """What `datasets` is to read: `hf://…`, `SCHEME://….parquet`, or the path of a folder of `save_to_disk`.

    `owner/name` is a hub's where no file or folder here has this name. None for everything else.
    """
    path = Path(os.path.expanduser(source))
    if _is_remote(source):
        return source if source.startswith(HUB) or source.endswith(".parquet") else None
    if os.path.exists(path):
        return str(path) if any((path / name).is_file() for name in SAVED) else None
    return HUB + source if _OWNER_AND_NAME.fullmatch(source) and not looks_like_file(source) else None


def _is_remote(source: str) -> bool:
    return "://" in source and not source.startswith(("file://", "local://"))


def source_path(text: str | AnyPath) -> str | AnyPath:
    """A path, but a hub's address (`hf://…`) as it is."""
    return str(text) if str(text).startswith(HUB) else as_path(text)


def read_tables(address: str, split: str | None, where: str, notes: dict[str, None]) -> Iterator[tuple[str, Any]]:
    """Tables of the split, in its order, each with the place that messages name. `notes` is told what is left out.

    Raises: InputError where the data cannot be had, and for a split that is not there.
    """
    splits = _asked(address, where, lambda: _splits(address))
    name = choose_split(list(splits), split, address, where)
    others = [other for other in splits if other != name]
    if split is None and others:
        notes[f"{where}: {address}: the split {name} is read ({where}.split); left out: {', '.join(others)}"] = None
    batches = iter(splits[name].with_format("arrow").iter(batch_size=BATCH))
    while (table := _asked(address, where, lambda: next(batches, None))) is not None:
        yield f"{address}, split {name}, ", table


def version_of(address: str, where: str) -> str:
    """A hub's commit, or a hash of what else stands behind the address. Raises: InputError."""
    return str(_asked(address, where, lambda: _builder(address)).hash)


def _splits(address: str) -> Mapping[str, Any]:
    if _is_remote(address):
        return dict(_builder(address).as_streaming_dataset())
    from datasets import DatasetDict, load_from_disk

    found = load_from_disk(address)
    return found if isinstance(found, DatasetDict) else {str(found.split or "train"): found}


def _builder(address: str) -> Any:
    from datasets import load_dataset_builder

    if not address.startswith(HUB):
        return load_dataset_builder("parquet", data_files=address)
    named = _HUB_SET.fullmatch(address)
    if named is None:
        raise InputError(f"{address}: no data set's name; write hf://owner/name, hf://owner/name@REVISION/CONFIG")
    name, revision, config = named.groups()
    builder = load_dataset_builder(name, config, revision=revision)
    if revision and "cache" in type(builder).__module__ and builder.hash != revision:  # whatever was fetched last
        raise ConnectionError(f"the hub cannot be asked for {revision}, and its copy in the cache is {builder.hash}")
    return builder


def _asked(address: str, where: str, work: Callable[[], T]) -> T:
    try:
        return within(WAIT_SECONDS, work, "no answer")
    except InputError:
        raise
    except Exception as e:  # the library's, those of its builders, and each store's client's
        reason = " ".join((str(e) or type(e).__name__).split())[:LONGEST_REASON]
        error = UnreachableError if isinstance(e, ConnectionError | LateError) else InputError
        raise error(f"{where}.source: {address}: cannot be read ({reason}); {_advice(address, reason)}") from e


def _advice(address: str, reason: str) -> str:
    if not address.startswith(HUB):
        return "check the path, the network and the credentials in the environment"
    if "onfig" in reason and "available" in reason.lower():
        return "name one of them: hf://owner/name/CONFIG"
    own = "or give a local file in its place"
    if "gated" in reason:
        return f"accept its conditions on its page and set HF_TOKEN, {own}"
    return f"check the name, the network (HF_ENDPOINT, HF_HUB_OFFLINE) and HF_TOKEN, {own}"
