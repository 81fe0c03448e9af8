"""Files that Git LFS left as pointers: a few lines of text in the place of a tokenizer or of weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from spa_ray.errors import InputError

POINTER = b"version https://git-lfs"
LONGEST = 1024  # bytes; a pointer is shorter


def check_pointers(folder: Path, patterns: Iterable[str] = ("*",)) -> None:
    """Raises: InputError naming the first file of a folder, of those that match, that is a pointer."""
    for file in sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}):
        if file.stat().st_size < LONGEST and file.read_bytes().startswith(POINTER):
            raise InputError(f"{file}: a Git LFS pointer, not the file; run `git lfs pull` in its folder")
