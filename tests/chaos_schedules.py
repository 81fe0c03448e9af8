"""What happens in a schedule of the chaos suite, and when: drawn from a seed, so that any schedule can be played again.

Moments are counted in prompts that engines have begun or in rows that are committed, never in seconds.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from spa_ray.generation.pool import blocks_in_engine

START_S, STALL_S, PROMPT_S = 45.0, 4.0, 30.0  # the run's deadlines (vLLM: LOAD_S to start)
LOAD_S = 120.0
COME_UP_S = 90.0  # for a driver and Ray's processes to come up on a machine that does other things too

When = Literal["begun", "committed"]

# What a schedule does to a run that goes on, and how often it is drawn.
ACTS = {
    "kill engine": 6,
    "kill worker": 5,
    "kill node": 4,
    "kill driver": 4,
    "second driver": 1,
    "fill disk": 2,
    "cut rows": 2,  # kill the driver, and cut a committed file of rows
    "cut checkpoint": 1,
    "freeze engine": 1,  # SIGSTOP: its own watch cannot see it
}
# What is wrong from the beginning.
FAULTS = {
    None: 12,
    "dies once": 3,  # at one prompt
    "always dies": 2,  # at one prompt, whichever engine has it
    "stalls once": 3,
    "dead on arrival": 2,  # for the first few starts
    "dead for long": 1,  # until the run gives up and its user mends it
    "cut input": 1,  # the user's file of prompts
}
VLLM_ACTS = {"kill engine": 3, "kill worker": 1, "kill node": 2, "kill driver": 2}


@dataclass(frozen=True)
class Event:
    act: str
    when: When
    count: int  # of prompts begun or rows committed
    choice: float  # in [0, 1): which process, node or file

    def __str__(self) -> str:
        return f"{self.act} at {self.count} {self.when}"


@dataclass(frozen=True)
class Schedule:
    name: str
    rows: int
    rows_per_block: int
    concurrency: int
    engines: int
    jitter: float
    fault: str | None
    events: tuple[Event, ...]
    engine: str = "scripted"

    @property
    def calls(self) -> int:
        """Blocks that are in one engine at once."""
        return blocks_in_engine(self.concurrency, self.rows_per_block)

    @property
    def engine_bound(self) -> int:
        """Rows of blocks that one engine may have begun and not given back: what its death repeats at most."""
        return self.calls * self.rows_per_block

    @property
    def patience(self) -> float:
        """Seconds without any sign of life after which a schedule counts as hung: the sum of the run's deadlines, and
        what Ray and a driver need to come up on this machine."""
        return (START_S if self.engine == "scripted" else LOAD_S) + STALL_S + PROMPT_S + COME_UP_S


def draw(number: int, seed: int, *, engine: str = "scripted", disks: bool = True) -> Schedule:
    """Schedule `number` of the suite with this seed. `disks`: whether a small disk can be had."""
    rng = random.Random(f"{seed}-{engine}-{number}")
    acts = dict(VLLM_ACTS if engine == "vllm" else ACTS)
    if not disks:
        acts.pop("fill disk", None)
    faults = {None: 1} if engine == "vllm" else FAULTS
    fault = rng.choices(list(faults), list(faults.values()))[0]
    rows = rng.randint(24, 60) if engine == "scripted" else rng.randint(24, 32)
    least = 1 if fault is None else 0
    chosen = rng.choices(list(acts), list(acts.values()), k=rng.choice([least, 1, 1, 2, 2, 3]))
    return Schedule(
        name=f"{engine}-{seed}-{number}",
        rows=rows,
        rows_per_block=rng.randint(1, 5),
        concurrency=rng.choice([2, 4, 6, 9]),
        engines=rng.choice([1, 2, 2, 3]) if engine == "scripted" else 1,
        jitter=rng.choice([0.1, 0.2, 0.3]),
        fault=fault,
        events=tuple(sorted((_event(act, rows, rng) for act in chosen), key=lambda e: e.count)),
        engine=engine,
    )


def _event(act: str, rows: int, rng: random.Random) -> Event:
    when: When = "committed" if act.startswith("cut") or rng.random() < 0.5 else "begun"
    return Event(act, when, rng.randint(1, round(0.85 * rows)), rng.random())
