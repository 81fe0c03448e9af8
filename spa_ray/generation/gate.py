"""Who may be in an engine at the same time: so many prompts, those of one model, and suspects in small crowds.

Comes in: rows that want to run. Goes out: each, once there is room. The weights change when nothing is in flight.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from spa_ray.engine.protocol import Engine


@dataclass(frozen=True)
class _Waiter:
    model: Path | None
    crowd: int
    turn: asyncio.Future[None]


class Gate:
    """Lets at most `room` rows in. A row's `crowd` bounds how many may be inside with it, itself included.

    Rows of the loaded model go first, in their order; rows of another wait until the engine has changed to theirs.
    """

    def __init__(self, engine: Engine, model: Path, room: int) -> None:
        self._engine, self._model, self._room = engine, model, room
        self._inside: Counter[int] = Counter()  # crowd -> rows inside that asked for it
        self._waiting: list[_Waiter] = []
        self._swap: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def using(self, model: Path | None = None, crowd: int | None = None) -> AsyncIterator[None]:
        """Run the block with `model` loaded (None: whichever is, for passes with a single model).

        Raises: what the engine raises when it cannot load the weights.
        """
        crowd = min(crowd or self._room, self._room)
        waiter = _Waiter(model, crowd, asyncio.get_running_loop().create_future())
        self._waiting.append(waiter)
        self._admit()
        try:
            await waiter.turn
        except BaseException:
            self._withdraw(waiter)
            raise
        try:
            yield
        finally:
            self._leave(crowd)

    def _fits(self, waiter: _Waiter) -> bool:
        least = min([waiter.crowd, *(crowd for crowd, rows in self._inside.items() if rows)])
        return waiter.model in (None, self._model) and self._inside.total() < least

    def _admit(self) -> None:
        if self._swap is not None:
            return
        left = []
        for waiter in self._waiting:
            if waiter.turn.done():
                continue
            if self._fits(waiter):
                self._inside[waiter.crowd] += 1
                waiter.turn.set_result(None)
            else:
                left.append(waiter)
        self._waiting = left
        if left and not self._inside.total():  # nobody fits an empty room but for the model
            assert left[0].model is not None
            self._swap = asyncio.ensure_future(self._change(left[0].model))

    async def _change(self, model: Path) -> None:
        try:
            await self._engine.load_weights(model)
            self._model = model
        except Exception as e:  # noqa: BLE001 whoever waits for these weights hears why they do not come
            for waiter in self._waiting:
                if waiter.model == model and not waiter.turn.done():
                    waiter.turn.set_exception(e)
        finally:
            self._swap = None
        self._admit()

    def _withdraw(self, waiter: _Waiter) -> None:
        """A row that was cancelled while it waited."""
        if waiter.turn.done() and not waiter.turn.cancelled() and waiter.turn.exception() is None:
            self._leave(waiter.crowd)  # it had just been let in
        else:
            waiter.turn.cancel()
            self._admit()

    def _leave(self, crowd: int) -> None:
        self._inside[crowd] -= 1
        self._admit()
