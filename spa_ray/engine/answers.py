"""Answers of an endpoint, kept as they come, so that nothing that was paid for is asked again.

On a disk one SQLite file, written by one process; on an object store one small object per answer.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
from pathlib import Path
from typing import Any, Protocol

from spa_ray.storage.files import AnyPath, is_file, make_folder, read_json, write_json


class Answers(Protocol):
    async def get(self, key: str) -> dict[str, Any] | None: ...

    async def put(self, key: str, answer: dict[str, Any]) -> None: ...


def open_answers(folder: AnyPath) -> Answers:
    """The answers that are kept in a folder, which is made if need be."""
    make_folder(folder)
    return DiskAnswers(folder / "answers.sqlite") if isinstance(folder, Path) else StoredAnswers(folder)


class DiskAnswers:
    """Each answer is committed before `put` returns; a process that is killed loses none."""

    def __init__(self, file: Path) -> None:
        self._base = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
        self._base.execute("PRAGMA synchronous=OFF")  # safe against a kill, not against a power cut
        self._base.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)")

    async def get(self, key: str) -> dict[str, Any] | None:
        row = self._base.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    async def put(self, key: str, answer: dict[str, Any]) -> None:
        self._base.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, json.dumps(answer)))


class StoredAnswers:
    """One object per answer, read and written in threads: a store takes its time."""

    def __init__(self, folder: AnyPath) -> None:
        self._folder = folder

    async def get(self, key: str) -> dict[str, Any] | None:
        path = self._folder / key[:2] / f"{key}.json"
        return await asyncio.to_thread(lambda: read_json(path) if is_file(path) else None)

    async def put(self, key: str, answer: dict[str, Any]) -> None:
        await asyncio.to_thread(write_json, self._folder / key[:2] / f"{key}.json", answer)
