"""A limit for work of other libraries that know none: it runs on a thread that nobody waits for any longer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from spa_ray.errors import LateError

T = TypeVar("T")


def within(seconds: float, work: Callable[[], T], late: str) -> T:
    """The work's result, or its exception. Raises: LateError with the text `late` when it takes longer."""
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as e:  # noqa: BLE001 it is raised where the result is waited for
            done.set_exception(e)

    threading.Thread(target=run, name="within", daemon=True).start()
    try:
        return done.result(seconds)
    except TimeoutError as e:
        if done.done():  # the work's own
            raise
        raise LateError(f"{late} in {seconds:g} s") from e
