"""Engines for the chaos suite: the scripted one and vLLM, each with a trace of its lives and of all that it was asked.

Named in a config as `model.engine: tests.chaos_engine:scripted` (or `:vllm`); `engine_kwargs` are `trace`, a file, and
the engine's own. The trace gets one line a birth (`born LIFE PID`) and one a request (`LIFE SEED`), in one write each.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

from spa_ray.config.models import Model
from spa_ray.engine.protocol import Completion, Engine, EngineStats, Request
from spa_ray.engine.scripted import ScriptedEngine


class Traced:
    """Another engine, which it passes everything on to."""

    def __init__(self, engine: Engine, life: str, trace: str) -> None:
        self._engine, self._life, self._trace = engine, life, trace
        self.tokenizer, self.max_model_len = engine.tokenizer, engine.max_model_len

    def stats(self) -> EngineStats:
        return self._engine.stats()

    async def generate(self, request: Request) -> Completion:
        write_line(self._trace, f"{self._life} {request.seed}")
        return await self._engine.generate(request)

    async def load_weights(self, model: Path) -> None:
        await self._engine.load_weights(model)

    def shutdown(self) -> None:
        self._engine.shutdown()


def born(trace: str) -> str:
    life = uuid.uuid4().hex[:12]
    write_line(trace, f"born {life} {os.getpid()}")
    return life


def scripted(model: Model, folder: Path, *, trace: str, **script: Any) -> Engine:
    life = born(trace)  # before the engine: it may be dead on arrival
    return Traced(ScriptedEngine(model, folder, **script), life, trace)


def vllm(model: Model, folder: Path, *, trace: str, **arguments: Any) -> Engine:
    from spa_ray.engine.vllm_engine import VLLMEngine

    life = born(trace)
    return Traced(VLLMEngine(model.model_copy(update={"engine_kwargs": arguments}), folder), life, trace)


def write_line(path: str, line: str) -> None:
    """Append a line so that those of several processes do not mix."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, f"{line}\n".encode())
    finally:
        os.close(file)
