"""What the rest of the system knows of an engine: requests in, completions out, asynchronously.

Never: objectives, pairs, which library answers. Token ids go in and come out; no text is templated here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from spa_ray.errors import RunError


class EngineDeadError(RunError):
    """The engine cannot answer any more: it died, stalled, or was shut down."""


@dataclass(frozen=True)
class Request:
    """One completion to be sampled.

    `choices` constrains the text to one of these strings, `choice_ids` being their tokens where each is one token.
    `label_ids` asks for the log-probabilities of these tokens at the first generated position, over the whole
    vocabulary (no constraint is applied to them). `stop` ends the answer before any of these strings.
    `continuation_ids` asks for the log-probabilities of these tokens behind the prompt and for no answer: the
    completion is empty.
    """

    prompt_ids: list[int]
    max_tokens: int
    temperature: float
    seed: int
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int | None = None
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    choices: tuple[str, ...] | None = None
    choice_ids: tuple[int, ...] | None = None
    label_ids: tuple[int, ...] | None = None
    continuation_ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Completion:
    """`token_ids` are as generated, the end token included when it was generated; `text` is without it.

    An answer that a stop string ended holds the tokens before that string, no end token, and the finish reason "stop".

    `label_logprobs` are in the order of the request's `label_ids`, `continuation_logprobs` of its `continuation_ids`.
    """

    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    label_logprobs: tuple[float, ...] | None = None
    continuation_logprobs: tuple[float, ...] | None = None


@dataclass(frozen=True)
class EngineStats:
    """Since the engine was loaded. `stalled` is how many seconds it has had work and finished no step of it."""

    requests: int
    busy: float  # seconds at work
    alive: float  # seconds since the first request
    stalled: float
    tokens: int = 0  # generated, those of requests that are not answered yet included


CAPABILITIES = frozenset({"choices", "logprobs", "continuations", "stop", "load_weights"})


class Engine(Protocol):
    """One model, loaded once. A class may name what it is able to do in `capabilities`: `choices` and `logprobs` at the
    first position, log-probabilities of given `continuations`, `stop` strings, `load_weights`; without the attribute it
    is all of them. A config that needs another is refused before anything starts."""

    tokenizer: Any
    max_model_len: int

    def stats(self) -> EngineStats:
        """Cheap, and from any thread."""
        ...

    async def generate(self, request: Request) -> Completion:
        """Answer a request. Raises: EngineDeadError; ValueError when prompt and max_tokens exceed `max_model_len`."""
        ...

    async def load_weights(self, model: Path) -> None:
        """Exchange the weights for another model folder's of the same architecture, once nothing is in flight."""
        ...

    def shutdown(self) -> None: ...
