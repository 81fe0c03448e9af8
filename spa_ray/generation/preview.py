"""A few episodes with every call on record: what the engine and the judge's endpoint were sent and what they answered.
No Ray, nothing written."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

from spa_ray.config.endpoint import Endpoint
from spa_ray.config.models import Config
from spa_ray.config.section import JudgeSection
from spa_ray.engine import Completion, Engine, EngineStats, Request, create_engine
from spa_ray.engine.openai import Answer, EndpointClient
from spa_ray.generation.endpoint_check import api_key, check_endpoint
from spa_ray.generation.endpoint_judge import Ask
from spa_ray.generation.episode import error_row
from spa_ray.generation.setup import Task, check_generation, make_episodes
from spa_ray.storage.deadline import within

FIRST = 4  # prompts after which there are first figures
Shown = dict[str, Any]
_CALLS: ContextVar[list[dict[str, Any]]] = ContextVar("calls")


class Recorder:
    """An engine that notes its calls, by the prompt whose episode makes them; `tokens` counts what was generated."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.tokenizer, self.max_model_len = engine.tokenizer, engine.max_model_len
        self.tokens = 0

    async def generate(self, request: Request) -> Completion:
        completion = await self._engine.generate(request)
        self.tokens += len(completion.token_ids)
        prompt = self.tokenizer.decode(request.prompt_ids)
        _note(prompt, completion.text, len(request.prompt_ids), prompt_ids=request.prompt_ids)
        return completion

    async def load_weights(self, model: Path) -> None:
        await self._engine.load_weights(model)

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def shutdown(self) -> None:
        self._engine.shutdown()


def _note(prompt: str, text: str, tokens: int, **more: Any) -> None:
    _CALLS.get().append({"prompt": prompt, **more, "prompt_tokens": tokens, "text": text})


def _recorded(judge: JudgeSection) -> Ask | None:
    """What asks the judge's endpoint, where it is one. Raises: as `check_endpoint`."""
    if not isinstance(judge, Endpoint):
        return None
    key = api_key(judge)
    check_endpoint(judge, key)
    client = EndpointClient(judge, key)

    async def ask(messages: Sequence[Mapping[str, str]], **options: Any) -> Answer:
        answer = await client.ask(messages, **options)
        _note("\n\n".join(turn["content"] for turn in messages), answer.text, answer.prompt_tokens)
        return answer

    return ask


async def preview(
    config: Config,
    model: Path,
    prompts: Sequence[Mapping[str, Any]],
    *,
    verbose: bool = False,
    on_progress: Callable[[Mapping[str, Any]], None] | None = None,
    on_first: Callable[[list[Shown]], None] | None = None,
) -> list[Shown]:
    """The prompts' episodes: `{"episode": row, "calls": [{prompt, prompt_ids, prompt_tokens, text}]}` each, in the
    prompts' order; calls of an endpoint have no `prompt_ids`.

    The first FIRST prompts run together and go to `on_first` where more follow, which then run together too.
    `on_progress` hears `done`, `total` and `tokens` once a second. Raises: InputError as the generation stage does,
    before the engine starts; RunError when it does not start in time.
    """
    check_generation(config, model)
    ask = _recorded(config.scoring.judged_by)
    start = partial(create_engine, config.model, model, config.generation, verbose=verbose)
    late = "preview: the engine did not start (generation.start_timeout_s)"
    engine = Recorder(within(config.generation.start_timeout_s, start, late))
    done, limit = 0, config.generation.prompt_timeout_s

    async def one(prompt: Mapping[str, Any]) -> Shown:
        nonlocal done
        calls: list[dict[str, Any]] = []
        _CALLS.set(calls)
        async with seats:
            try:
                row = await asyncio.wait_for(episodes.run(prompt), limit)
            except TimeoutError:
                row = error_row(prompt, f"timeout: no episode within generation.prompt_timeout_s {limit:g}", 0)
        done += 1
        return {"episode": row, "calls": calls}

    async def tell() -> None:
        while on_progress is not None:
            on_progress({"done": done, "total": len(prompts), "tokens": engine.tokens})
            await asyncio.sleep(1.0)

    try:
        episodes = make_episodes(config, Task(), engine, model, ask)
        seats = asyncio.Semaphore(config.resources.concurrency)
        telling = asyncio.create_task(tell())
        try:
            shown = list(await asyncio.gather(*map(one, prompts[:FIRST])))
            if on_first is not None and len(prompts) > FIRST:
                on_first(shown)
            shown += await asyncio.gather(*map(one, prompts[FIRST:]))
        finally:
            telling.cancel()
        return shown
    finally:
        engine.shutdown()
