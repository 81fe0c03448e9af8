"""The Ray actor of a stage's ledger, the line to it, and a thread that tells display and record what is in it.

Once a second the display gets `done`, `total`, rates and the live funnel; the record keeps what was spent, and ends the
pass where the run's budget is used up.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from spa_ray.engine.openai import Allowance, EndpointDeadError
from spa_ray.generation.budget import Meter
from spa_ray.generation.endpoint_actor import EndpointLine
from spa_ray.generation.ledger import Counts, Ledger
from spa_ray.generation.usage import Spent, Usage

OnProgress = Callable[[Mapping[str, Any]], None]
ANSWER_SECONDS = 60.0


@dataclass(frozen=True)
class Line:
    """To the ledger, from the driver and from engine actors. Every wait has a deadline."""

    handle: Any

    def ask(self, method: str, *args: Any) -> Any:
        return ray.get(getattr(self.handle, method).remote(*args), timeout=ANSWER_SECONDS)

    async def asked(self, method: str, *args: Any) -> Any:
        return await asyncio.wait_for(getattr(self.handle, method).remote(*args), ANSWER_SECONDS)

    def tell(self, method: str, *args: Any) -> None:
        getattr(self.handle, method).remote(*args)


class Record:
    """What a pass spends: in the stage's `usage`, in the run's `meter`."""

    def __init__(self, usage: Usage, meter: Meter | None, judge: EndpointLine | None) -> None:
        self._usage, self._meter, self._judge = usage, meter, judge
        self._told = Spent()

    def note(self, counts: Counts, *, last: bool = False) -> str | None:
        """Returns: why the pass is to end, if it is."""
        account: dict[str, float] = {}
        with suppress(EndpointDeadError):  # those who ask say so
            account = self._judge.account() if self._judge else {}
        self._usage.note(counts, account, last=last)
        now, told = self._usage.call(), self._told
        self._told = now
        if self._meter:
            self._meter.spend(usd=now.judge_usd - told.judge_usd, tokens=now.tokens - told.tokens)
        if self._judge:
            self._judge.allow(self._meter.left().beside(account) if self._meter else Allowance())
        return self._meter.used_up() if self._meter else None


@contextmanager
def followed(before: Callable[[], int], total: int, on_progress: OnProgress | None, record: Record) -> Iterator[Line]:
    """A ledger on the driver's node. `on_progress` hears of it from `before()` rows on up to `total`; `record` too."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
    ledger = Line(ray.remote(Ledger).options(**options).remote())
    ended = threading.Event()
    tell = on_progress or (lambda counts: None)
    thread = threading.Thread(target=_follow, args=(ledger, before(), total, tell, record, ended), daemon=True)
    thread.start()
    try:
        yield ledger
        ended.set()
        thread.join()  # or its older counts could come after the last ones
        record.note(ledger.ask("counts"), last=True)
    finally:
        ended.set()
        thread.join()
        ray.kill(ledger.handle)


def _follow(ledger: Line, before: int, total: int, tell: OnProgress, record: Record, ended: threading.Event) -> None:
    started, done = time.monotonic(), 0
    while True:
        last = ended.wait(1.0)
        counts: Counts = ledger.ask("counts")
        if not counts.tokens and not last:
            started = time.monotonic()  # engines that start are no pace
        done = max(done, min(before + counts.rows + counts.ahead, total))
        why = record.note(counts, last=last)  # the last one here is for a pass that failed
        if why:
            ledger.tell("stop", why)
        extra = {"errors": counts.errors, "engine deaths": counts.deaths}
        tell(
            {
                "done": done,  # a death repeats rows, a further part asks some again
                "total": total,
                "tokens": counts.tokens,
                "tokens/s": counts.tokens / max(1.0, time.monotonic() - started),
                **({"in flight": counts.inside} if counts.inside else {}),
                **{name: value for name, value in extra.items() if value},
                **counts.reasons,
            }
        )
        if last:
            return
