"""One engine, several models in turn: a model's rows run together, and the weights change when nothing is in flight."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from spa_ray.engine.protocol import Engine


class ModelGate:
    """Lets rows of the loaded model through; rows of another wait until the engine has changed to theirs."""

    def __init__(self, engine: Engine, model: Path) -> None:
        self._engine, self._model = engine, model
        self._inside = 0
        self._turn: asyncio.Condition | None = None  # made on the loop that uses it

    @asynccontextmanager
    async def using(self, model: Path | None) -> AsyncIterator[None]:
        """Run the block with `model` loaded (None: whichever is, for passes with a single model)."""
        turn = self._turn = self._turn or asyncio.Condition()
        async with turn:
            if model is not None:
                await turn.wait_for(lambda: self._model == model or not self._inside)
                if self._model != model:
                    await self._engine.load_weights(model)
                    self._model = model
                    turn.notify_all()
            self._inside += 1
        try:
            yield
        finally:
            async with turn:
                self._inside -= 1
                if not self._inside:
                    turn.notify_all()
