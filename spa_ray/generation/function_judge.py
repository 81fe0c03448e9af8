"""A judge that is a function of the user's: plain functions run in threads, async ones on an event loop of their own.

Takes a function `(messages, meta, response, objective) -> number` and gives a `Judgement`. The event loop that serves
the engine never runs the user's code, so a slow judge holds up nothing but its own calls. Each call has a deadline.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import numbers
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from decimal import Decimal
from functools import partial
from typing import Any

from pydantic import ValidationError

from spa_ray.config.faults import explain
from spa_ray.config.judge import Function
from spa_ray.config.plugs import load_dotted
from spa_ray.config.section import Section
from spa_ray.errors import InputError
from spa_ray.generation.judging import Item, Judgement, Parts, together
from spa_ray.logs import printable
from spa_ray.objectives import Objective

SHOWN = 80  # characters of a returned value that a status quotes
PARAMETERS = 4  # of a judge function
Deliver = Callable[[Any, BaseException | None], None]


class JudgeTimeoutError(RuntimeError):
    """A call of a judge function did not return within its deadline."""


class FunctionJudge:
    """A function `(messages, meta, response, objective) -> number` as the judge.

    At most `concurrency` calls run at a time. What the function raises becomes the error of the prompt's row.
    """

    def __init__(
        self, function: Callable[..., Any], name: str, scale: Sequence[int], *, concurrency: int, timeout_s: float
    ) -> None:
        self._calls = Calls(function, name, concurrency=concurrency, timeout_s=timeout_s)
        self._name, self._scale = name, scale

    @classmethod
    def of(cls, section: Function, parts: Parts) -> FunctionJudge | ClassJudge:
        found, limits = load_judge(section, where="judge"), parts.config.generation
        bounds: Any = {"concurrency": limits.judge_concurrency, "timeout_s": limits.judge_timeout_s}
        kind = ClassJudge if isinstance(found, Judge) else cls
        return kind(found, section.name, parts.config.scoring.scale, **bounds)

    @staticmethod
    def check(section: Function, where: str) -> None:
        """Raises: InputError for a dotted path that leads to no judge."""
        load_judge(section, where=where)

    async def score(self, item: Item) -> list[Judgement]:
        return await together([self._judge(item, objective) for objective in item.objectives])

    async def _judge(self, item: Item, objective: Objective) -> Judgement:
        return self.read(await self._calls.call(item.messages, item.meta, item.response, objective.name))

    def read(self, value: Any) -> Judgement:
        """A returned value as a judgement. Of a `Judgement` the score, the text and a failure's reason are kept."""
        if isinstance(value, Judgement):
            text = printable(str(value.text))
            if value.score is None:
                why = "no reason given" if value.status == "ok" else printable(str(value.status))
                return Judgement(None, f"failed: {why}", text)
            return replace(self.read(value.score), text=text)
        number, (low, high) = number_of(value), self._scale
        if number is None or not low <= number <= high:  # NaN is on no scale
            what = "" if number is not None else f"a {type(value).__name__}, "
            why = f"parse_failure: {self._name} returned {what}{shown(value)}; a number on the scale [{low}, {high}]"
            return Judgement(None, f"{why} is needed", shown(value))
        return Judgement(float(number), text=json.dumps(number))


class Judge:
    """A judge as a class: derive from it and give `judge: my_file:MyJudge`, or `{kind: function, name: my_file:MyJudge,
    config: {..}}` where its `Config` has keys of its own."""

    Config: type[Section] = Section

    def __init__(self, config: Any) -> None:
        """`config` is its `Config`."""
        self.config = config

    async def score(self, item: Item) -> Mapping[str, float | Judgement] | Sequence[float | Judgement]:
        """A number on the scale, or a `Judgement`, for each of the item's objectives: by name, or in their order. May
        be a plain method as well."""
        raise NotImplementedError


class ClassJudge(FunctionJudge):
    """A `Judge` of the user's own, asked once for all objectives of an answer."""

    def __init__(self, judge: Judge, name: str, scale: Sequence[int], *, concurrency: int, timeout_s: float) -> None:
        super().__init__(judge.score, name, scale, concurrency=concurrency, timeout_s=timeout_s)

    async def score(self, item: Item) -> list[Judgement]:
        found, names = await self._calls.call(item), [objective.name for objective in item.objectives]
        if isinstance(found, list | tuple) and len(found) == len(names):
            found = dict(zip(names, found, strict=True))
        if not isinstance(found, Mapping):
            raise TypeError(
                f"{self._name} returned {shown(found)}; a mapping of objective to number, or one number for each of "
                f"{', '.join(names)}, is needed"
            )
        return [self.read(found.get(name)) for name in names]


class Calls:
    """Calls of one function from one event loop, a bounded number at a time, each with a deadline.

    A call that is overdue is given up: a thread cannot be ended, so it goes on and its answer is ignored. Once as many
    calls as may run at a time are overdue, further ones fail at once.
    """

    def __init__(self, function: Callable[..., Any], name: str, *, concurrency: int, timeout_s: float) -> None:
        self._function, self._name, self._limit, self._timeout = function, name, concurrency, timeout_s
        self._slots = asyncio.Semaphore(concurrency)
        self._overdue = 0  # calls that were given up and have not returned
        self._loop: asyncio.AbstractEventLoop | None = None  # where coroutines of the user's run

    async def call(self, *args: Any) -> Any:
        """What the function returns. Raises: what it raises; JudgeTimeoutError."""
        value = await self._slot(partial(self._in_thread, args))
        while inspect.isawaitable(value):
            value = await self._slot(partial(self._on_loop, value))
        return value

    async def _slot(self, start: Callable[[Deliver], Callable[[], None] | None]) -> Any:
        """Start work that delivers `(value, error)` from its thread, once there is room, and wait for it."""
        async with self._slots:
            if self._overdue >= self._limit:
                raise JudgeTimeoutError(
                    f"judge {self._name}: {self._overdue} calls have not returned within {self._timeout:g} s "
                    "(generation.judge_timeout_s); no further one is started"
                )
            loop = asyncio.get_running_loop()
            answer: asyncio.Future[tuple[Any, BaseException | None]] = loop.create_future()

            def arrived(value: Any, error: BaseException | None) -> None:
                if answer.done():  # given up
                    self._overdue -= 1
                else:
                    answer.set_result((value, error))

            def deliver(value: Any, error: BaseException | None) -> None:
                with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                    loop.call_soon_threadsafe(arrived, value, error)

            cancel = start(deliver)
            try:
                value, error = await asyncio.wait_for(answer, self._timeout)
            except (TimeoutError, asyncio.CancelledError) as e:
                self._overdue += 1
                if cancel is not None:
                    cancel()
                if isinstance(e, asyncio.CancelledError):
                    raise
                raise JudgeTimeoutError(
                    f"judge {self._name} did not return within {self._timeout:g} s (generation.judge_timeout_s)"
                ) from None
        if error is None:
            return value
        if isinstance(error, Exception):
            raise error
        raise RuntimeError(f"judge {self._name} raised {type(error).__name__}: {error}")  # SystemExit and its like

    def _in_thread(self, args: tuple[Any, ...], deliver: Deliver) -> None:
        """A daemon thread, so that a call that never returns does not keep the process."""

        def run() -> None:
            try:
                deliver(self._function(*args), None)
            except BaseException as e:  # noqa: BLE001 whatever the user's code raises is told to whoever waits
                deliver(None, e)

        threading.Thread(target=run, name="judge", daemon=True).start()

    def _on_loop(self, work: Any, deliver: Deliver) -> Callable[[], None]:
        async def run() -> None:
            try:
                deliver(await work, None)
            except BaseException as e:  # noqa: BLE001 as above; cancelled when it was overdue
                deliver(None, e)

        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="judge-loop", daemon=True).start()
        future = asyncio.run_coroutine_threadsafe(run(), self._loop)

        def cancel() -> None:
            future.cancel()

        return cancel


def number_of(value: Any) -> int | float | None:
    """The number that a judge function returned: Python's, NumPy's and 0-dimensional arrays' alike; else None.

    A truth value is no score, and neither is a number written as text.
    """
    if getattr(value, "shape", None) == () and hasattr(value, "item"):  # NumPy's scalars, 0-dimensional arrays
        value = value.item()
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if not isinstance(value, numbers.Real | Decimal):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):  # a signalling NaN; a fraction beyond float's range
        return math.nan


def shown(value: Any) -> str:
    """The value's beginning, as text that Arrow can hold."""
    try:
        text = repr(value)
    except Exception as e:  # noqa: BLE001 a class of the user's
        text = f"a value without text ({type(e).__name__})"
    return printable(text if len(text) <= SHOWN else f"{text[:SHOWN]}…")


def load_judge(section: Function, *, where: str) -> Any:
    """The function, or an instance of the class, that a section names.

    Raises: InputError when there is none, it is neither, or it does not take a judge's arguments.
    """
    found = load_dotted(section.name, where=where)
    if isinstance(found, type) and issubclass(found, Judge):
        try:
            return found(found.Config.model_validate(section.config))
        except ValidationError as e:
            raise InputError(f"{where}.config: {explain(e, found.Config)}") from e
        except Exception as e:  # whatever a constructor of the user's raises is about that file
            raise InputError(f"{where}: {section.name} cannot be made ({type(e).__name__}: {e})") from e
    if not callable(found) or section.config:
        what = "takes no config" if section.config else "a judge is a function, or a class derived from spa_ray.Judge"
        raise InputError(f"{where}: {section.name!r} is a {type(found).__name__}; {what}")
    check_signature(found, where=f"{where}: {section.name!r}")
    return found


def check_signature(function: Any, *, where: str) -> None:
    """Raises: InputError for what cannot be called with a judge's four arguments."""
    try:
        inspect.signature(function).bind(*[None] * PARAMETERS)
    except TypeError as e:
        raise InputError(f"{where} cannot be called as judge(messages, meta, response, objective): {e}") from e
    except ValueError:  # it tells no signature, as some built-in functions
        return
