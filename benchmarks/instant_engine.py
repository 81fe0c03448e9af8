"""An engine that costs next to nothing, so that a benchmark measures what stands around an engine.

Named in a config as `model.engine: instant_engine:InstantEngine`. An answer is one of a few texts, by its seed. It
comes at once, or after the law `latency + tokens · (token_latency + batch_latency · others in the engine)`. Never: a
model.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spa_ray.config.models import Model
from spa_ray.engine.protocol import Completion, EngineStats, Request

TEXTS = 997
BYTES_PER_TOKEN = 4
JUDGEMENT_TOKENS = 2  # a number and the end


class CountingTokenizer:
    """A token for every four characters; which one says nothing."""

    chat_template = "instant"
    eos_token_id = 2

    def apply_chat_template(self, conversation: Sequence[Mapping[str, str]], *, tokenize: bool = True, **_: Any) -> Any:
        characters = sum(len(message["content"]) for message in conversation)
        return [5] * (1 + characters // BYTES_PER_TOKEN) if tokenize else "".join(m["content"] for m in conversation)

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        return [5] * (1 + len(text) // BYTES_PER_TOKEN)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return "word" * len(ids)


class InstantEngine:
    """See the module. `tokens`: of an answer."""

    def __init__(
        self,
        model: Model,
        folder: Path,
        *,
        tokens: int = 35,
        latency: float = 0.0,
        token_latency: float = 0.0,
        batch_latency: float = 0.0,
    ) -> None:
        self.tokenizer, self.max_model_len = CountingTokenizer(), model.max_model_len or 1 << 20
        filler = "word" * (tokens - 3)
        self._answers = [
            Completion(f"{number:04d}{filler}", [3, 4 + number, *[5] * (tokens - 3), 2], "stop")
            for number in range(TEXTS)
        ]
        self._law = (latency, token_latency, batch_latency)
        self._served = self._inside = 0
        self._busy = 0.0
        self._first = self._changed = time.monotonic()

    async def generate(self, request: Request) -> Completion:
        if request.choices is not None:
            choice = request.choices[request.seed % len(request.choices)]
            completion = Completion(choice, [7] * (JUDGEMENT_TOKENS - 1) + [2], "stop")
        else:
            completion = self._answers[request.seed % TEXTS]
        latency, token, batch = self._law
        if latency or token:
            tokens = len(completion.token_ids)
            self._enter(1)
            try:
                await asyncio.sleep(latency + tokens * (token + batch * (self._inside - 1)))
            finally:
                self._enter(-1)
        self._served += 1
        return completion

    def _enter(self, change: int) -> None:
        now = time.monotonic()
        self._busy += now - self._changed if self._inside else 0.0
        self._inside, self._changed = self._inside + change, now

    def stats(self) -> EngineStats:
        alive = time.monotonic() - self._first if self._served else 0.0
        return EngineStats(self._served, min(self._busy, alive), alive, 0.0)

    async def load_weights(self, model: Path) -> None:
        return None

    def shutdown(self) -> None:
        return None
