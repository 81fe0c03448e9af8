"""An engine whose answers are looked at before anything believes them.

Comes in: any engine (a config may name its own). Goes out: the same completions, or `RuntimeError` for one that cannot
stand in an episode: it becomes that prompt's error, and neither a wrong number nor the end of the actor.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spa_ray.engine.protocol import Completion, Engine, EngineStats, Request

MAX_TOKEN_ID = 2**31 - 1  # as the schema holds them


class CheckedEngine:
    """Another engine, and what it answers is sound."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.tokenizer, self.max_model_len = engine.tokenizer, engine.max_model_len
        self.prompted = 0  # tokens of all prompts that it was asked

    async def generate(self, request: Request) -> Completion:
        """As the engine's. Raises: RuntimeError besides."""
        self.prompted += len(request.prompt_ids) + len(request.continuation_ids or ())
        completion = await self._engine.generate(request)
        wrong = defect(completion, request)
        if wrong is not None:
            raise RuntimeError(f"the engine's answer {wrong}")
        return completion

    def stats(self) -> EngineStats:
        return self._engine.stats()

    async def load_weights(self, model: Path) -> None:
        await self._engine.load_weights(model)

    def shutdown(self) -> None:
        self._engine.shutdown()


def defect(completion: Completion, request: Request) -> str | None:
    """Why this is no answer to the request, None where it is one."""
    text: Any = completion.text
    ids: Any = completion.token_ids
    labels: Any = completion.label_logprobs
    if not isinstance(text, str):
        return f"has a {type(text).__name__} for a text"
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        return "is not valid Unicode"
    if not isinstance(ids, list) or not set(map(type, ids)) <= {int}:
        return "has token ids that are not a list of whole numbers"
    if ids and not 0 <= min(ids) <= max(ids) <= MAX_TOKEN_ID:
        return f"has the token id {min(ids) if min(ids) < 0 else max(ids)}"
    if completion.finish_reason not in ("stop", "length"):
        return f"has the finish reason {str(completion.finish_reason)[:60]!r}"
    behind: Any = completion.continuation_logprobs
    for asked, given, what in (
        (request.label_ids, labels, "label log-probabilities"),
        (request.continuation_ids, behind, "log-probabilities of the continuation"),
    ):
        if asked is not None and (given is None or len(given) != len(asked)):
            return f"has {0 if given is None else len(given)} of {len(asked)} {what}"
        if asked is not None and not all(isinstance(value, float) for value in given):
            return f"has {what} of no number"
    return None
