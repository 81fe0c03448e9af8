"""What the calls of one run spent, kept in its folder, against what it may spend.

One JSON file per call, written while a stage works; a driver that is killed takes at most `NOTE_SECONDS` with it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from spa_ray.config.budget import Budget
from spa_ray.engine.openai import Allowance, BudgetSpentError
from spa_ray.storage.files import AnyPath, children, read_json, write_json

NOTE_SECONDS = 5.0


@dataclass(frozen=True)
class Spending:
    usd: float = 0.0
    tokens: int = 0
    hours: float = 0.0

    def __add__(self, other: Spending) -> Spending:
        return Spending(self.usd + other.usd, self.tokens + other.tokens, self.hours + other.hours)

    def __str__(self) -> str:
        return f"{self.tokens:,} tokens, {self.hours:.2f} h and ${self.usd:.4f}"


class Meter:
    """The spending of a run, over all its calls; `folder` holds the record. Used under the run's lock."""

    def __init__(self, folder: AnyPath, budget: Budget | None, price_per_gpu_hour: float | None = None) -> None:
        self._folder, self._budget, self._price = folder, budget or Budget(), price_per_gpu_hour or 0.0
        self._file: AnyPath | None = None
        self._past = Spending()  # other calls, and this call's stages that are over
        self._others = Spending()  # other calls alone
        self._stage = Spending()
        self._started: float | None = None
        self._gpus = self._noted = 0.0

    @contextmanager
    def stage(self, name: str, *, gpus: float) -> Iterator[None]:
        """A stage works on so many GPUs within this block. Raises: BudgetSpentError where nothing is left for it."""
        self._open()
        if (why := self.used_up()) is not None:
            raise BudgetSpentError(self.line(name, why))
        self._started, self._gpus = time.monotonic(), gpus
        try:
            yield
        finally:
            self._past, self._stage, self._started = self.total(), Spending(), None
            self._note()

    def spend(self, *, usd: float, tokens: int) -> None:
        """Count what the stage spent since it was last told."""
        self._stage += Spending(usd, tokens)
        if time.monotonic() - self._noted > NOTE_SECONDS:
            self._note()

    def total(self) -> Spending:
        """What all calls spent, up to now."""
        self._open()
        hours = 0.0 if self._started is None else (time.monotonic() - self._started) / 3600
        return self._past + self._stage + Spending(usd=hours * self._gpus * self._price, hours=hours)

    def used_up(self) -> str | None:
        """Which key of the budget is, if one is."""
        spent = asdict(self.total())
        found = (key for key, most in self._budget if most is not None and spent[key] >= most)
        return next((f"budget.{key} {getattr(self._budget, key):g} is used up" for key in found), None)

    def left(self) -> Allowance:
        """What may still be spent."""
        spent, most = self.total(), self._budget
        return Allowance(
            None if most.usd is None else most.usd - spent.usd,
            None if most.tokens is None else most.tokens - spent.tokens,
        )

    def line(self, name: str, why: str) -> str:
        return (
            f"{name}: {why}; all calls of this run spent {self.total()}; raise it and run the same command again to "
            "go on from here"
        )

    def _open(self) -> None:
        """Read what other calls left, once the lock is held."""
        if self._file is None:
            files = [file for file in children(self._folder) if file.name.endswith(".json")]
            self._others = sum((Spending(**read_json(file)) for file in files), Spending())
            self._past, self._file = self._others, self._folder / f"{len(files):05d}.json"

    def _note(self) -> None:
        assert self._file is not None
        self._noted, total, others = time.monotonic(), self.total(), self._others
        mine = Spending(total.usd - others.usd, total.tokens - others.tokens, total.hours - others.hours)
        write_json(self._file, asdict(mine))
