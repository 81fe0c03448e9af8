"""From `model.path` to a local model folder: a folder, one inside an installed package, a URI, or a hub id.

Raises InputError for a folder that is not a model or a model that cannot be fetched. Never loads weights.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from importlib import resources
from pathlib import Path

from spa_ray.config.models import Model
from spa_ray.errors import InputError, RunError
from spa_ray.logs import printable, redact
from spa_ray.rollout.tokenizer import why
from spa_ray.storage.deadline import within
from spa_ray.storage.files import AnyPath, as_path
from spa_ray.storage.model_folder import check_model_folder
from spa_ray.storage.node_cache import FETCH_SECONDS, hub_folder, local_folder

PACKAGE = "package://"
HUB_ADDRESSES = ("https://huggingface.co/", "http://huggingface.co/", "https://hf.co/", "hf://")


def local_model(model: Model) -> Path | None:
    """The model's folder if it is on this machine already, else None (a URI or hub id that `fetch_model` can bring).

    Raises: InputError for a path that exists and is not a model folder, or names a package that is not there.
    """
    if model.path.startswith(PACKAGE):
        package, _, inside = model.path.removeprefix(PACKAGE).partition("/")
        try:
            folder = Path(str(resources.files(package))) / inside
        except ModuleNotFoundError as e:
            raise InputError(f"model.path: no package {package!r} is installed (from {model.path!r})") from e
    elif "://" in model.path:
        _check_address(model.path)
        stored = as_path(model.path)
        if not isinstance(stored, Path):
            return None
        folder = stored  # file://
    else:
        folder = Path(os.path.expanduser(model.path))  # a user that is not known stays as it is
        if not os.path.exists(folder) and is_hub_id(model.path):
            return None
    if not os.path.exists(folder):  # Path.exists raises for a name that is too long
        raise InputError(f"model.path: {folder}: no such folder; give a model folder or a hub id (owner/name)")
    check_model_folder(folder)
    return folder.resolve()


def _check_address(path: str) -> None:
    """Raises: InputError for a hub's address in the place of the model's name."""
    for start in HUB_ADDRESSES:
        if path.startswith(start):
            name = "/".join(path.removeprefix(start).split("/")[:2])
            raise InputError(
                f"model.path: {path!r} is an address on the hub; give the model's name: {name or 'owner/name'}"
            )


def is_hub_id(text: str) -> bool:
    """Whether a hub could have a model of this name: `owner/name`, as huggingface_hub writes it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return text.count("/") == 1 and not text.startswith((".", "~"))


def fetch_model(model: Model) -> Path:
    """The model's folder, downloaded from the hub if need be. Raises: InputError when it cannot be had; RunError when
    that takes longer than `node_cache.FETCH_SECONDS`."""
    found = local_model(model)
    if found:
        return found
    print(printable(redact(f"model      fetching {model.path}")), file=sys.stderr, flush=True)
    late = f"model.path: {model.path} was not fetched"
    if "://" in model.path:
        try:
            copy = within(FETCH_SECONDS, partial(local_folder, as_path(model.path)), late)
        except (InputError, RunError):
            raise
        except Exception as e:  # each store's client has its own errors
            raise InputError(
                f"model.path: {model.path!r} could not be fetched ({why(e)}); look at the address, the credentials and "
                "the network"
            ) from e
        check_model_folder(copy)
        return copy
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        folder = within(FETCH_SECONDS, partial(hub_folder, model.path, model.revision), late)
    except RepositoryNotFoundError as e:  # also what a gated model answers without a token
        raise InputError(
            f"model.path: {model.path!r} is no folder here and no model on the hub that you may read"
        ) from e
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as e:
        raise InputError(
            f"model.path: {model.path!r} could not be fetched ({type(e).__name__}); give a local folder"
        ) from e
    check_model_folder(folder)
    return folder


def shared_model(model: Model, folder: Path) -> AnyPath:
    """What every node of a cluster is told of the model that `fetch_model` brought to `folder` on this one: a URI stays
    one, so that each node fetches it itself (`data.node_cache.local_folder`)."""
    if "://" in model.path and not model.path.startswith(PACKAGE):
        return as_path(model.path)
    return folder
