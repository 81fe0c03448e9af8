"""A few episodes with every call on record: what was sent to the engine, what it answered. No Ray, nothing written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spa_ray.config.models import Config
from spa_ray.engine import Completion, Engine, EngineStats, Request, create_engine
from spa_ray.generation.setup import Task, check_generation, make_episodes


class Recorder:
    """An engine that notes its calls."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.tokenizer, self.max_model_len = engine.tokenizer, engine.max_model_len
        self.calls: list[dict[str, Any]] = []

    async def generate(self, request: Request) -> Completion:
        completion = await self._engine.generate(request)
        prompt = self.tokenizer.decode(request.prompt_ids)
        self.calls.append({"prompt": prompt, "prompt_ids": request.prompt_ids, "text": completion.text})
        return completion

    async def load_weights(self, model: Path) -> None:
        await self._engine.load_weights(model)

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def shutdown(self) -> None:
        self._engine.shutdown()


async def preview(
    config: Config, model: Path, prompts: Sequence[Mapping[str, Any]], *, verbose: bool = False
) -> list[dict[str, Any]]:
    """The prompts' episodes one after the other: `{"episode": row, "calls": [{prompt, prompt_ids, text}]}` each.

    Raises: InputError as the generation stage does, before the engine starts.
    """
    check_generation(config, model)
    engine = Recorder(create_engine(config.model, model, config.generation, verbose=verbose))
    try:
        episodes = make_episodes(config, Task(), engine, model)
        shown = []
        for prompt in prompts:
            engine.calls = []
            row = await episodes.run(prompt)
            shown.append({"episode": row, "calls": engine.calls})
        return shown
    finally:
        engine.shutdown()
