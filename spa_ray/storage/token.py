"""A file that says whether two places see the same folder: one leaves it, the others look.

Comes in: a folder. Goes out: a `Token`, which travels to other nodes. Never: a guess from a path's name.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from spa_ray.errors import InputError
from spa_ray.storage.files import AnyPath, delete_file, is_local, write_text


@dataclass(frozen=True)
class Token:
    """`text` as it was written to `path`."""

    path: AnyPath
    text: str

    @classmethod
    def leave(cls, folder: AnyPath) -> Token:
        """Write one into the folder. Whoever leaves it removes it."""
        name = uuid.uuid4().hex
        token = cls(folder / f".token-{name[:12]}", name)
        write_text(token.path, token.text)
        return token

    @classmethod
    @contextmanager
    def left(cls, folder: AnyPath) -> Iterator[Token]:
        """One that lies in the folder while the block runs."""
        token = cls.leave(folder)
        try:
            yield token
        finally:
            token.remove()

    def remove(self) -> None:
        delete_file(self.path)

    def seen(self) -> bool:
        """Whether this process sees it. Raises: what the filesystem's client raises where it cannot be reached."""
        try:
            return self.path.read_text(encoding="utf-8") == self.text
        except FileNotFoundError:
            return False

    def check(self) -> None:
        """Raises: InputError where this process does not see it."""
        if self.seen():
            return
        folder, node = self.path.parent, os.uname().nodename
        mend = "a folder on a disk that all nodes share, or a URI (s3://…)" if is_local(folder) else "the same endpoint"
        raise InputError(f"{folder}: node {node} does not see this folder as the driver does; use {mend}")
