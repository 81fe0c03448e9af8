"""Judge functions: threads and an event loop of their own, deadlines, and what they return."""

from __future__ import annotations

import asyncio
import time
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from spa_ray.config.judge import judge_section
from spa_ray.errors import InputError
from spa_ray.generation.calls import JudgeTimeoutError, number_of
from spa_ray.generation.function_judge import FunctionJudge, load_judge
from spa_ray.generation.judging import Item, Judgement
from spa_ray.objectives import Objective

OBJECTIVE = Objective(name="harmless", principle="p", rubric="r")


def judge_of(function: Any, *, concurrency: int = 32, timeout_s: float = 30) -> FunctionJudge:
    return FunctionJudge(function, "m:f", (1, 10), concurrency=concurrency, timeout_s=timeout_s)


async def ask(judge: FunctionJudge, times: int = 1) -> list[Judgement]:
    item = Item([], "{}", "answer", [OBJECTIVE], lambda *_: 0)
    return [found for (found,) in await asyncio.gather(*(judge.score(item) for _ in range(times)))]


def asked(function: Any) -> Judgement:
    return asyncio.run(ask(judge_of(function)))[0]


def plain(messages: Any, meta: str, answer: str, objective: str) -> float:
    time.sleep(0.2)
    return 5


async def awaited(messages: Any, meta: str, answer: str, objective: str) -> float:
    await asyncio.sleep(0.2)
    return 5


async def blocking(messages: Any, meta: str, answer: str, objective: str) -> float:
    time.sleep(0.2)  # a coroutine that does not yield
    return 5


@pytest.mark.parametrize("function", [plain, awaited, lambda *a: awaited(*a)])
def test_slow_judges_run_side_by_side_and_hold_no_event_loop(function: Any) -> None:
    longest = 0.0

    async def beat() -> None:
        nonlocal longest
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.01)
            longest = max(longest, time.monotonic() - before)

    async def play() -> list[Judgement]:
        beating = asyncio.ensure_future(beat())
        found = await ask(judge_of(function), 24)
        beating.cancel()
        return found

    started = time.monotonic()
    found = asyncio.run(play())
    assert [j.score for j in found] == [5.0] * 24
    assert time.monotonic() - started < 2.4, "24 calls of 0.2 s, one after the other, take 4.8 s"
    assert longest < 0.15


def test_a_coroutine_that_blocks_holds_up_its_own_kind_alone() -> None:
    async def play() -> float:
        calls = asyncio.ensure_future(ask(judge_of(blocking), 3))
        await asyncio.sleep(0.05)
        before = time.monotonic()
        await asyncio.sleep(0.01)
        held = time.monotonic() - before
        await calls
        return held

    assert asyncio.run(play()) < 0.15


def test_no_more_calls_run_at_a_time_than_allowed() -> None:
    inside, most = [], 0

    def count(*args: Any) -> int:
        nonlocal most
        inside.append(1)
        most = max(most, len(inside))
        time.sleep(0.02)
        inside.pop()
        return 3

    asyncio.run(ask(judge_of(count, concurrency=2), 10))
    assert most == 2


@pytest.mark.parametrize("function", [lambda *a: time.sleep(1.5), lambda *a: asyncio.sleep(1.5)])
def test_a_call_that_does_not_return_is_given_up_and_names_the_key(function: Any) -> None:
    judge = judge_of(function, concurrency=1, timeout_s=0.2)

    async def play() -> None:
        started = time.monotonic()
        for _ in range(2):
            with pytest.raises(JudgeTimeoutError, match=r"m:f.*generation\.judge_timeout_s"):
                await ask(judge)
        assert time.monotonic() - started < 1.2

    asyncio.run(play())


def test_once_every_thread_is_held_by_overdue_calls_further_ones_fail_at_once() -> None:
    judge = judge_of(lambda *a: time.sleep(1.5), concurrency=2, timeout_s=0.2)

    async def play() -> None:
        found = await asyncio.gather(*(ask(judge) for _ in range(8)), return_exceptions=True)
        assert all(isinstance(f, JudgeTimeoutError) for f in found)
        assert any("no further one is started" in str(f) for f in found)

    started = time.monotonic()
    asyncio.run(play())
    assert time.monotonic() - started < 1.2


@pytest.mark.parametrize(
    "value",
    [7, 7.0, np.float32(7), np.int64(7), np.array(7.0), Decimal("7"), Fraction(14, 2)],
)
def test_numbers_count_as_what_they_are(value: Any) -> None:
    judgement = asked(lambda *a: value)
    assert (judgement.score, judgement.draws, judgement.status) == (7.0, [7.0], "ok")


def generated(*args: Any) -> Any:
    yield 7


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (True, "a bool"), (np.bool_(True), "a bool"), ("7", "a str"), ({"score": 7}, "a dict"), (None, "a NoneType"),
        ([7], "a list"), (np.array([7.0]), "a ndarray"), (7 + 0j, "a complex"), (generated(), "a generator"),
        (float("nan"), "nan"), (Decimal("sNaN"), "Decimal"), (float("inf"), "inf"), (11, "11"), (10**400, "1000"),
        ("\ud800" * 200, "a str"),
    ],
)  # fmt: skip
def test_anything_else_is_a_failure_that_says_what_came(value: Any, kind: str) -> None:
    judgement = asked(lambda *a: value)
    assert (judgement.score, judgement.draws) == (None, [None])
    assert judgement.status.startswith("parse_failure: m:f returned ")
    assert kind in judgement.status
    assert "[1, 10]" in judgement.status
    assert len(judgement.status) < 400
    judgement.status.encode()


def test_a_value_whose_text_raises_is_still_a_failure() -> None:
    class Mute:
        def __repr__(self) -> str:
            raise OSError

    assert "a value without text (OSError)" in asked(lambda *a: Mute()).status
    assert number_of(Mute()) is None


@pytest.mark.parametrize("error", [KeyError("k"), StopIteration(), TimeoutError("of the user's client")])
def test_what_it_raises_is_raised(error: Exception) -> None:
    def fails(*args: Any) -> float:
        raise error

    async def play() -> None:
        with pytest.raises((type(error), RuntimeError)):
            await ask(judge_of(fails))

    asyncio.run(play())


def test_a_judge_that_exits_does_not_end_the_process() -> None:
    def leaves(*args: Any) -> float:
        raise SystemExit(3)

    async def play() -> None:
        with pytest.raises(RuntimeError, match="m:f raised SystemExit: 3"):
            await ask(judge_of(leaves))

    asyncio.run(play())


def three(messages: Any, meta: str, answer: str) -> float:
    return 5.0


def test_a_function_of_other_arguments_is_refused_before_anything_starts() -> None:
    with pytest.raises(InputError, match=r"three' cannot be called as judge\(messages, meta, response, objective\)"):
        load_judge(judge_section("tests.test_generation_function_judge:three"), where="scoring.judge")
