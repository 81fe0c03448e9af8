"""Calls of a user's own function: plain functions run in threads, async ones on an event loop of their own.

The event loop that serves the engine never runs the user's code, so a slow function holds up nothing but its own calls.
Each call has a deadline. Also here: how what such a function returned is read and shown.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import numbers
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from decimal import Decimal
from functools import partial
from typing import Any

from spa_ray.errors import InputError
from spa_ray.logs import printable

SHOWN = 80  # characters of a returned value that a status quotes
Deliver = Callable[[Any, BaseException | None], None]


class JudgeTimeoutError(RuntimeError):
    """A call of a judge function did not return within its deadline."""


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


def check_signature(function: Any, names: Sequence[str], *, where: str) -> None:
    """Raises: InputError for what cannot be called with arguments of these names, by place."""
    try:
        inspect.signature(function).bind(*names)
    except TypeError as e:
        raise InputError(f"{where} cannot be called as judge({', '.join(names)}): {e}") from e
    except ValueError:  # it tells no signature, as some built-in functions
        return
