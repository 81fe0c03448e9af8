"""Upload a folder to a repository of the Hugging Face hub. The token is the environment's (HF_TOKEN) or the one that
`hf auth login` kept; it is in no config and no message."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from spa_ray.errors import InputError, RunError


def push(
    folder: Path,
    repo: str,
    *,
    private: bool = True,
    kind: Literal["model", "dataset"] = "model",
    only: Sequence[str] | None = None,
) -> str:
    """Upload a folder, or the files of it that match `only`, to the hub's `repo`, which is made if it is not there.
    Returns: its address.

    Raises: InputError for a name that cannot be; RunError when the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    check_repo(repo)
    api, message = HfApi(), f"{kind.capitalize()} by spa export"
    patterns = None if only is None else list(only)
    try:
        url = str(api.create_repo(repo, private=private, exist_ok=True, repo_type=kind))
        api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message=message, repo_type=kind, allow_patterns=patterns
        )
    except _refusals() as e:
        raise RunError(f"{repo}: the hub did not take it ({_first_line(e)}); {folder} stands, push it again") from e
    return url


def check_repo(repo: str) -> None:
    """Raises: InputError for what is no name of a repository."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as e:
        raise InputError(f"--push-to-hub {repo}: {_first_line(e)}; write owner/name") from e


def _refusals() -> tuple[type[Exception], ...]:
    """The hub's own errors are OSErrors, ValueErrors are about the card; and those of the HTTP library under the hub's
    client, which has changed its name."""
    found: list[type[Exception]] = [OSError, ValueError]
    for name in ("httpx", "httpx2"):
        with suppress(ImportError):
            found.append(import_module(name).HTTPError)
    return tuple(found)


def _first_line(error: Exception) -> Any:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
