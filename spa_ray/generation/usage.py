"""What a stage's calls spent, one JSON file each: a run that was stopped and gone on with counts all of them.

Comes in: the ledger's counts, now and then, and once more at a call's end. Goes out: sums over all calls. A driver that
is killed takes what it did since its last note with it (`NOTE_SECONDS` at most). Never: what a prompt says.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

from spa_ray.generation.ledger import Counts
from spa_ray.storage.files import AnyPath, children, read_json, write_json

NOTE_SECONDS = 30.0


@dataclass(frozen=True)
class Spent:
    """Of one call, or of several. `engines`: the most that one call had."""

    seconds: float = 0.0
    requests: int = 0
    generated_tokens: int = 0
    engines: int = 0
    deaths: int = 0
    busy: float = 0.0  # engines' seconds at work
    alive: float = 0.0  # engines' seconds since their first request

    def __add__(self, other: Spent) -> Spent:
        mine, its = asdict(self), asdict(other)
        return Spent(**{name: (max if name == "engines" else sum)((mine[name], its[name])) for name in mine})

    @property
    def busy_share(self) -> float | None:
        return self.busy / self.alive if self.alive else None


class Usage:
    """A stage's record, from a call's beginning on. `folder` is the record's own."""

    def __init__(self, folder: AnyPath) -> None:
        earlier = [file for file in children(folder) if file.name.endswith(".json")]
        self._before = sum((Spent(**read_json(file)) for file in earlier), Spent())
        self._lives, self._life = Spent(), Spent()  # of the ledger in this call: those that are over, and the present
        self._file = folder / f"{len(earlier):05d}.json"
        self._started = self._noted = time.monotonic()

    def note(self, counts: Counts, *, last: bool = False) -> None:
        """Keep what this call did so far; written if it is the last word, or the last note is old."""
        if counts.requests < self._life.requests:  # the ledger was killed and began from nothing
            self._lives += self._life
        self._life = Spent(
            requests=counts.requests, generated_tokens=counts.generated_tokens, engines=counts.engines,
            deaths=counts.deaths, busy=counts.busy, alive=counts.alive,
        )  # fmt: skip
        now = time.monotonic()
        if last or now - self._noted > NOTE_SECONDS:
            self._noted = now
            write_json(self._file, asdict(self._call()))

    def total(self) -> Spent:
        return self._before + self._call()

    def _call(self) -> Spent:
        return self._lives + self._life + Spent(seconds=time.monotonic() - self._started)
