"""Progress of long work, on stderr: a live bar on a terminal, a line now and then elsewhere, nothing with `quiet`.

Comes in: callbacks from the stages with plain dicts (`done`, `total`, rates). Never on stdout, where results go.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

EVERY = 10.0  # seconds between lines where there is no terminal
Update = Callable[[Mapping[str, Any]], None]


class Progress:
    """Reports stages as they go. One at a time; `close` ends the live bar."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self._told: set[Path] = set()
        self._live: Any = None
        if not quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bars

            self._live = Bars(
                TextColumn("{task.description:<22}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rates]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._live.start()

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, text: str) -> None:
        """One line."""
        if self.quiet:
            return
        if self._live is not None:
            self._live.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def reused(self, stage: str, folder: Path) -> None:
        """Say, once, that a stage stood already."""
        if folder in self._told:
            return
        self._told.add(folder)
        self.say(f"{stage:<10} done before: {folder.name}")

    def finished(self, folder: Path) -> None:
        """The stage was made just now: meeting it again is no news."""
        self._told.add(folder)

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """A stretch of work without a count."""
        started = time.monotonic()
        self.say(f"{what:<10} …")
        yield
        self.say(f"{what:<10} {time.monotonic() - started:.0f} s")

    def counter(self, what: str) -> Update:
        """A callback for counted work: takes `done`, `total`, optionally `name` and any rates."""
        return _Counter(self, what)


class _Counter:
    def __init__(self, owner: Progress, what: str) -> None:
        self.owner, self.what = owner, what
        self.last = time.monotonic()
        self.first: dict[str, tuple[float, int]] = {}  # when each began to move, and where: start-up is no pace
        self.tasks: dict[str, Any] = {}

    def __call__(self, update: Mapping[str, Any]) -> None:
        name = f"{self.what} {update['name']}" if update.get("name") else self.what
        done, total = int(update["done"]), int(update["total"])
        rates = "  ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in update.items()
            if key not in {"name", "done", "total"}
        )
        if self.owner._live is not None:
            bars = self.owner._live
            if name not in self.tasks:
                self.tasks[name] = bars.add_task(name, total=total, rates="")
            bars.update(self.tasks[name], completed=done, total=total, rates=rates)
            return
        now = time.monotonic()
        began, at = self.first.setdefault(name, (now, done)) if done else (now, done)
        if done < total and now - self.last < EVERY:
            return
        self.last = now
        tail = f"  left {(now - began) / (done - at) * (total - done):.0f} s" if at < done < total else ""
        self.owner.say(f"{name:<22} {done}/{total}  {rates}{tail}")
