"""What the driver and every engine of a pass know of each other: rows in flight, deaths, counts, last words.

Comes in: short messages from engine actors, one or two a block. Goes out: counts for the display, why an engine died,
and which prompts were in an engine when it did. Lives in one Ray actor; holds a few bytes a prompt in flight and a
prompt that saw a death, nothing else. Never: what a prompt says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

FRUITLESS_STARTS = 5  # of one engine, one after the other, without a prompt answered between: it gives up
SUSPECT_TRIES = 3  # deaths that a prompt may see, in smaller and smaller company, before it is left out


@dataclass
class EngineRecord:
    """One engine actor, over all its lives."""

    node: str
    log: str
    starts: int = 1
    fruitless: int = 1
    holds: set[str] = field(default_factory=set)  # prompt ids of its blocks that are not finished
    busy: float = 0.0  # seconds at work, of its present life
    alive: float = 0.0  # seconds since its first request
    inside: int = 0  # prompts in flight
    ahead: int = 0  # episodes that are finished, in blocks that are not
    tokens: int = 0  # generated, of its present life
    prompted: int = 0  # asked of it, of its present life


@dataclass(frozen=True)
class Counts:
    """What engines finished since the ledger was made; a death repeats rows."""

    rows: int
    errors: int
    requests: int
    prompt_tokens: int
    generated_tokens: int
    engines: int
    deaths: int
    busy: float  # seconds at work, over all engines' present lives
    alive: float  # seconds since the first request, likewise
    inside: int  # prompts in flight
    ahead: int  # episodes that are finished, in blocks that are not; `rows` does not hold them
    tokens: int  # generated so far, those of unfinished requests included; a death repeats some
    prompted: int  # tokens of the prompts that engines were asked so far; a death repeats some
    reasons: dict[str, int]  # the live funnel: what `observe` said of finished rows, `passed` for None


class Ledger:
    """See the module. Every method is one message."""

    def __init__(self) -> None:
        self._engines: dict[str, EngineRecord] = {}
        self._deaths: Counter[str] = Counter()
        self._totals: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._words: list[tuple[str, str]] = []
        self._died = 0
        self._tokens = self._prompted = 0  # in lives of engines that are over
        self._stopped: str | None = None

    def born(self, engine: str, node: str, log: str) -> int:
        """An engine's actor starts, or starts again. Returns: its starts in a row that led to no answered prompt."""
        old = self._engines.get(engine)
        if old is None:
            self._engines[engine] = EngineRecord(node, log)
            return 1
        self._tokens += old.tokens
        self._prompted += old.prompted
        if old.node == node:  # on another node: the old one is gone, which says nothing about the prompts
            self._suspect(old.holds)
        self._engines[engine] = EngineRecord(node, log, old.starts + 1, old.fruitless + 1)
        return old.fruitless + 1

    def died(self, engine: str, inside: Sequence[str], why: str) -> None:
        """The engine under an actor is dead; exactly these prompts were in it."""
        self._suspect(inside)
        self._died += 1
        if engine in self._engines:
            self._engines[engine].holds.clear()
        self._words.append(("death", why))

    def word(self, kind: str, why: str) -> None:
        """Why an actor refuses to work: `input` for the user's mistake, `death` for anything else."""
        self._words.append((kind, why))

    def last_word(self) -> tuple[str, str] | None:
        return self._words[-1] if self._words else None

    def stop(self, why: str) -> None:
        """No further block is to begin; those in engines end as they will."""
        self._stopped = self._stopped or why

    def stopped(self) -> str | None:
        return self._stopped

    def begin(self, engine: str, prompt_ids: Sequence[str]) -> dict[str, int] | None:
        """A block reaches an engine. Returns: how many deaths each of its prompts has seen, where any; None where it
        is not to begin."""
        if self._stopped:
            return None
        if engine in self._engines:
            self._engines[engine].holds.update(prompt_ids)
        return {name: self._deaths[name] for name in prompt_ids if name in self._deaths}

    def finished(
        self,
        engine: str,
        prompt_ids: Sequence[str],
        totals: Mapping[str, int],
        reasons: Mapping[str, int],
        fruit: bool,
    ) -> None:
        """A block that an engine finished, with sums over its rows: `rows`, `errors`, `requests` and tokens, and what
        the live funnel says of them.

        `fruit`: at least one was answered by the engine.
        """
        record = self._engines.get(engine)
        if record is not None:
            record.holds.difference_update(prompt_ids)
            record.fruitless = 0 if fruit else record.fruitless
            record.ahead = max(0, record.ahead - len(prompt_ids))
        self._totals.update(totals)
        self._reasons.update(reasons)

    def work(
        self,
        engine: str,
        busy: float,
        alive: float,
        inside: int = 0,
        ahead: int = 0,
        tokens: int = 0,
        prompted: int = 0,
    ) -> None:
        """An engine's present life, once a second: seconds at work of the seconds since its first request, prompts in
        flight, finished episodes of unfinished blocks, tokens generated and asked so far."""
        record = self._engines.get(engine)
        if record is not None:
            record.busy, record.alive = busy, alive
            record.inside, record.ahead, record.tokens, record.prompted = inside, ahead, tokens, prompted

    def counts(self) -> Counts:
        names = ("rows", "errors", "requests", "prompt_tokens", "generated_tokens")
        return Counts(
            **{name: self._totals[name] for name in names},
            engines=len(self._engines),
            deaths=self._died,
            busy=sum(record.busy for record in self._engines.values()),
            alive=sum(record.alive for record in self._engines.values()),
            # An engine that is gone holds nothing, whatever it said last.
            inside=sum(min(record.inside, len(record.holds)) for record in self._engines.values()),
            ahead=sum(min(record.ahead, len(record.holds)) for record in self._engines.values()),
            tokens=self._tokens + sum(record.tokens for record in self._engines.values()),
            prompted=self._prompted + sum(record.prompted for record in self._engines.values()),
            reasons=dict(self._reasons),
        )

    def _suspect(self, prompt_ids: Sequence[str] | set[str]) -> None:
        self._deaths.update(prompt_ids)


def crowd(deaths: int, room: int) -> int:
    """How many prompts may share an engine with one that was in it at so many deaths: all, an eighth, none."""
    return room if deaths == 0 else max(1, room // 8) if deaths == 1 else 1
