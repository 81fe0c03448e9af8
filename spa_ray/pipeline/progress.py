"""Progress of long work, on stderr: a live bar on a terminal, a line now and then elsewhere, nothing with `quiet`.

Comes in: callbacks from the stages with plain dicts (`done`, `total`, rates, the live funnel's counts). Never on
stdout, where results go.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from spa_ray.data.left_out import error_lines
from spa_ray.logs import printable, redact
from spa_ray.preferences.live import LIVE_CLASSES, PASSED
from spa_ray.storage.files import AnyPath

LOG = logging.getLogger(__name__)
EVERY = 10.0  # seconds between lines where there is no terminal
Update = Callable[[Mapping[str, Any]], None]


class Progress:
    """Reports stages as they go. One at a time; `close` ends the live bar."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self._told: set[AnyPath | str] = set()
        self.live: Any = None  # rich's bars, on a terminal only
        if not quiet and sys.stderr.isatty():
            self.live = _bars()
            self.live.start()

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None

    def say(self, text: str) -> None:
        """One line, to the log as well."""
        text = printable(redact(text))
        LOG.info(text)
        if self.quiet:
            return
        if self.live is not None:
            self.live.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def reused(self, stage: str, folder: AnyPath) -> None:
        """Say, once, that a stage stood already."""
        if folder in self._told:
            return
        self._told.add(folder)
        self.say(f"{stage:<10} done before: {folder.name}")

    def say_errors(self, where: str, stage: Mapping[str, Any], episodes: AnyPath) -> None:
        """One line for each kind of error that a stage's record counts."""
        for line in error_lines(stage.get("error_kinds", {}), stage["rows"], where=where, episodes=episodes):
            self.say_once(f"warning: {line}")

    def say_once(self, text: str) -> None:
        """One line, the first time only."""
        if text not in self._told:
            self._told.add(text)
            self.say(text)

    def finished(self, folder: AnyPath) -> None:
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
        """A callback for counted work: takes `done`, `total`, optionally `name`, any rates, and the live funnel's
        counts under the names of `preferences.LIVE_CLASSES`."""
        return _Counter(self, what)


def _bars() -> Any:
    """Rich's progress bars, and a line below them for each live funnel, which does not fit beside its bar."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars
    from rich.text import Text

    class BarsWithFunnels(Bars):
        def get_renderables(self) -> Iterator[Any]:
            yield self.make_tasks_table(self.tasks)
            for task in self.tasks:
                if task.fields.get("funnel"):
                    yield Text(f"{task.description:<22} {task.fields['funnel']}", overflow="ellipsis", no_wrap=True)

    return BarsWithFunnels(
        TextColumn("{task.description:<22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rates]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def funnel_text(update: Mapping[str, Any], *, passed: str = "") -> str:
    """`passed 123  inconsistent 456`: the classes that occur, in the order of testing; empty without a funnel."""
    if not any(name in update for name in LIVE_CLASSES):
        return ""
    shown = [f"{name} {update.get(name, 0)}" for name in LIVE_CLASSES if update.get(name) or name == PASSED]
    return "  ".join([shown[0] + passed, *shown[1:]])


def train_counter(progress: Progress) -> Update:
    """A callback for rows of train logs: steps done, the loss and the pace; and what the guards say, at once."""
    count = progress.counter("train")

    def row(logged: Mapping[str, Any]) -> None:
        for warning in logged.get("warnings", ()):
            progress.say(f"warning: train {logged['job']}: {warning}")
        shown = {key: logged[key] for key in ("loss", "rewards/accuracies", "pairs/s") if key in logged}
        count({"name": logged["job"], "done": logged["step"], "total": logged["steps"], **shown})

    return row


class _Counter:
    def __init__(self, owner: Progress, what: str) -> None:
        self.owner, self.what = owner, what
        self.last = time.monotonic()
        self.first: dict[str, tuple[float, int]] = {}  # when each began to move, and where: start-up is no pace
        self.tasks: dict[str, Any] = {}

    def __call__(self, update: Mapping[str, Any]) -> None:
        name = f"{self.what} {update['name']}" if update.get("name") else self.what
        done, total = int(update["done"]), int(update["total"])
        now = time.monotonic()
        rates = "  ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in update.items()
            if key not in {"name", "done", "total", *LIVE_CLASSES} and not (key == "errors" and "error" in update)
        )
        rates = printable(redact(rates))  # the last error may quote what a model wrote
        if self.owner.live is not None:
            bars = self.owner.live
            if name not in self.tasks:
                self.tasks[name] = bars.add_task(name, total=total, rates="", funnel="")
            funnel = funnel_text(update, passed=" (before τ)")
            bars.update(self.tasks[name], completed=done, total=total, rates=rates, funnel=funnel)
            if now - self.last >= EVERY:
                self.last = now
                LOG.info("  ".join(filter(None, [f"{name} {done}/{total}", rates, funnel])))
            return
        began, at = self.first.setdefault(name, (now, done)) if done else (now, done)
        if done < total and now - self.last < EVERY:
            return
        self.last = now
        tail = f"  left {(now - began) / (done - at) * (total - done):.0f} s" if at < done < total else ""
        funnel = funnel_text(update)
        self.owner.say("  ".join(filter(None, [f"{name:<22} {done}/{total}", rates, funnel])) + tail)
        if funnel:
            self.owner.say_once(f"{name:<22} passed: so far; the upper bound τ of det Σ is known at the end")
