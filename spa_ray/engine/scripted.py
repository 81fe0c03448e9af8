"""A scripted engine for tests: answers, scores and failures are pure functions of (weights' name, prompt ids, seed).

Named in a config as `model.engine: spa_ray.engine.scripted:ScriptedEngine`; `model.engine_kwargs` are `Script`'s.
Its tokenizer is the UTF-8 bytes plus role marks. Never: a clock or a random state in what is answered.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spa_ray.config.models import Model
from spa_ray.engine.protocol import Completion, EngineDeadError, EngineStats, Request

ROLES = ("system", "user", "assistant")
END = 256 + len(ROLES)  # the end-of-turn token, after the bytes and one mark a role
MAX_MODEL_LEN = 8192
WORDS = ("salt", "river", "lamp", "stone", "bread", "cloud", "rope", "seed", "glass", "moss")
IMPROVED = "improved"  # opens every refined answer; the scripted judge puts such answers into its top quarter


@dataclass(frozen=True)
class Script:
    """How the engine behaves. Shares are of requests, decided by a hash of the request and its seed."""

    answers: int = 1000  # distinct answers a prompt can get; few make duplicates
    answer_words: int = 4
    unreadable: float = 0.0  # share of judgements that hold no score
    refuse: str | None = None  # requests whose prompt holds this text raise ValueError
    die: str | None = None  # the engine dies at the first prompt that holds this text
    die_once: str | None = None  # a file that remembers the death: with it there is only one
    hang: str | None = None  # the engine stalls at the first prompt that holds this text, and answers nothing more
    hang_once: str | None = None  # as die_once
    dead_on_arrival: str | None = None  # a file; while it stands, engines die at their start
    latency: float = 0.0  # seconds before an answer's first token
    token_latency: float = 0.0  # seconds a token, with nothing else in the engine
    batch_latency: float = 0.0  # seconds a token more for every other request in the engine
    jitter: float = 0.0  # seconds: each answer takes a hashed share of this, so that the order of completion varies
    log: str | None = None  # a file that gets one line a request: its prompt's hash and its seed
    judge_mark: str = "Rating: [[k]]"  # prompts that hold it are judgements in free text
    refine_mark: str = "Write one better answer"  # prompts that hold it are refinements


class ScriptedTokenizer:
    """The slice of a Hugging Face tokenizer that the system uses."""

    chat_template = "scripted"
    eos_token_id = END

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, str]],
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        return_dict: bool = False,
        **variables: Any,
    ) -> list[int] | str:
        ids: list[int] = []
        for message in conversation:
            ids += [256 + ROLES.index(message["role"]), *message["content"].encode(), END]
        if add_generation_prompt:
            ids.append(256 + ROLES.index("assistant"))
        return ids if tokenize else self.decode(ids, skip_special_tokens=False)

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        parts = [bytes([i]) if i < 256 else b"" if skip_special_tokens else _mark(i) for i in ids]
        return b"".join(parts).decode(errors="replace")


class ScriptedEngine:
    """See the module. `served` counts the requests that were answered."""

    def __init__(self, model: Model, folder: Path, **script: Any) -> None:
        self.tokenizer = ScriptedTokenizer()
        self.max_model_len = model.max_model_len or MAX_MODEL_LEN
        self.served = self._tokens = 0
        self._script, self._weights = Script(**script), folder.name
        self._dead = self._hung = False
        self._inside = 0
        self._busy = 0.0  # seconds with a request inside, up to the last change of `_inside`
        self._first = self._changed = time.monotonic()
        if self._script.dead_on_arrival is not None and Path(self._script.dead_on_arrival).exists():
            raise RuntimeError("scripted: dead on arrival")

    async def generate(self, request: Request) -> Completion:
        script = self._script
        given = len(request.prompt_ids) + len(request.continuation_ids or ())
        if given + request.max_tokens > self.max_model_len:
            raise ValueError(f"{given} + {request.max_tokens} tokens exceed {self.max_model_len}")
        prompt = self.tokenizer.decode(request.prompt_ids)
        if script.refuse is not None and script.refuse in prompt:
            raise ValueError(f"scripted refusal of a prompt with {script.refuse!r}")
        self._maybe_die(prompt)
        if script.log is not None:
            with open(script.log, "a", encoding="utf-8") as log:
                log.write(f"{_hash(request.prompt_ids):x} {request.seed}\n")
        self._enter(1)
        try:
            await self._wait(request)
        finally:
            self._enter(-1)
        answer = self._answer(prompt, request)
        self._tokens += len(answer.token_ids)
        return answer

    def stats(self) -> EngineStats:
        now = time.monotonic()
        since = now - self._changed
        busy = self._busy + (since if self._inside else 0.0)
        alive = now - self._first if self.served else 0.0
        return EngineStats(self.served, busy, alive, since if self._hung else 0.0, self._tokens)

    def _enter(self, change: int) -> None:
        now = time.monotonic()
        if not self.served and not self._inside:
            self._first = now
        self._busy += now - self._changed if self._inside else 0.0
        self._inside, self._changed = self._inside + change, now
        self.served += change < 0

    async def _wait(self, request: Request) -> None:
        """The time that the script gives this answer: a share of `jitter`, or the measured law of a real engine."""
        script = self._script
        if self._hung:
            await asyncio.Event().wait()
        seconds = script.jitter * self._share("jitter", request) if script.jitter else 0.0
        if script.latency or script.token_latency:
            token = script.token_latency + script.batch_latency * (self._inside - 1)
            seconds += script.latency + token * len(self._answer("", request).token_ids)
        if seconds:
            await asyncio.sleep(seconds)

    async def load_weights(self, model: Path) -> None:
        self._weights = model.name

    def shutdown(self) -> None:
        self._dead = True

    def _maybe_die(self, prompt: str) -> None:
        script = self._script
        self._dead = self._dead or _struck(script.die, script.die_once, prompt)
        self._hung = self._hung or _struck(script.hang, script.hang_once, prompt)
        if self._dead:
            raise EngineDeadError("scripted: the engine is dead")

    def _answer(self, prompt: str, request: Request) -> Completion:
        if request.continuation_ids is not None:
            return self._continuation(request)
        if request.label_ids is not None:
            return self._labels(prompt, request)
        if request.choices is not None:
            return self._completion(self._judgement(prompt, request, request.choices), request)
        if self._script.judge_mark in prompt:
            number = self._judgement(prompt, request, [str(k) for k in _scale(prompt)])
            return self._completion(f"Rating: [[{number}]]", request)
        words = self._words(request)
        return self._completion(f"{IMPROVED} {words}" if self._script.refine_mark in prompt else words, request)

    def _words(self, request: Request) -> str:
        which = int(self._share("answer", request) * self._script.answers)
        spell = hashlib.sha256(f"{self._weights} {which}".encode()).digest()
        return " ".join(WORDS[byte % len(WORDS)] for byte in spell[: self._script.answer_words])

    def _judgement(self, prompt: str, request: Request, choices: Sequence[str]) -> str:
        if self._share("unreadable", request) < self._script.unreadable:
            return "ten"
        return choices[int(self._mark_of(prompt, request) * len(choices))]

    def _mark_of(self, prompt: str, request: Request) -> float:
        """In [0, 1): a fixed quality of this judge prompt with a little noise by seed; refined answers rank high."""
        quality = 0.8 * _hash([self._weights, prompt]) / 2**64 + 0.2 * self._share("judge", request)
        return 0.75 + 0.25 * quality if IMPROVED in prompt else 0.9 * quality

    def _labels(self, prompt: str, request: Request) -> Completion:
        assert request.label_ids is not None
        top = int(self._mark_of(prompt, request) * len(request.label_ids))
        masses = [math.exp(-abs(i - top)) for i in range(len(request.label_ids))]
        on_scale = 0.9 / math.fsum(masses)
        logprobs = tuple(math.log(m * on_scale) for m in masses)
        token = request.label_ids[top]
        return Completion(self.tokenizer.decode([token]), [token], "length", logprobs)

    def _continuation(self, request: Request) -> Completion:
        ids = list(request.continuation_ids or ())
        upto = [self._continuation_logprob([*request.prompt_ids, *ids[: at + 1]]) for at in range(len(ids))]
        return Completion("", [], "stop", continuation_logprobs=tuple(upto))

    def _continuation_logprob(self, ids: list[int]) -> float:
        """Of the last of these tokens."""
        return -3 * _hash([self._weights, ids]) / 2**64

    def _completion(self, text: str, request: Request) -> Completion:
        cuts = [at for at in map(text.find, request.stop) if at >= 0]
        text = text[: min(cuts)] if cuts else text
        ids = [*text.encode(), *([] if cuts else [END])]
        if len(ids) <= request.max_tokens:
            return Completion(text, ids, "stop")
        cut = ids[: request.max_tokens]
        return Completion(self.tokenizer.decode(cut), cut, "length")

    def _share(self, what: str, request: Request) -> float:
        return _hash([what, self._weights, request.prompt_ids, request.seed]) / 2**64


def _struck(text: str | None, once: str | None, prompt: str) -> bool:
    """Whether the prompt holds the text, and, with a file `once`, for the first time."""
    if text is None or text not in prompt:
        return False
    if once is None:
        return True
    known = Path(once).exists()
    Path(once).touch()
    return not known


def _hash(what: Any) -> int:
    return int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:8], "big")


def _mark(token: int) -> bytes:
    return b"<end>" if token == END else f"<{ROLES[token - 256]}>".encode()


def _scale(prompt: str) -> range:
    """The scale that the built-in bracket prompt names."""
    found = re.search(r"from (-?\d+) \(worst\) to\s+(-?\d+)", prompt)
    return range(int(found[1]), int(found[2]) + 1) if found else range(1, 11)
