"""Judging: one response and one objective a call, and reading what the judge says.

Goes out: a `Judgement`, which is a `Score`, or a `ParseFailure` or `Truncated` that never becomes a number.
Never: several answers in one judge prompt, a default score.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from spa_ray.config.models import Scoring
from spa_ray.engine.protocol import Completion, Engine, Request
from spa_ray.errors import InputError
from spa_ray.generation.chat import Chat
from spa_ray.generation.templates import Templates
from spa_ray.objectives import Objective

Message = Mapping[str, str]
SeedOf = Callable[[int, int], int]  # (draw, attempt) -> seed


@dataclass(frozen=True)
class Score:
    value: float
    off_scale: float | None = None


@dataclass(frozen=True)
class ParseFailure:
    """The judge's text holds no score on the scale."""

    why: str


@dataclass(frozen=True)
class Truncated:
    """The judge's text was cut before it held a score."""

    why: str = "the judgement was cut by scoring.max_tokens"


Reading = Score | ParseFailure | Truncated


@dataclass(frozen=True)
class Judgement:
    """All draws of one objective. `score` is their mean, None when any draw failed; `status` is "ok" or the failure."""

    score: float | None
    draws: list[float | None]
    status: str
    text: str
    off_scale: float | None
    generated_tokens: int


def read_number(text: str, scale: Sequence[int]) -> Reading:
    """A text that is one whole number on the scale (modes choice and expected)."""
    stripped = text.strip()
    if not re.fullmatch(r"[+-]?\d{1,9}", stripped, flags=re.ASCII):
        return ParseFailure(f"not a whole number: {text[:60]!r}")
    return _on_scale(int(stripped), scale)


def read_pattern(text: str, pattern: re.Pattern[str], scale: Sequence[int], *, finished: bool) -> Reading:
    """The first group of the pattern's only match (mode regex); two different scores are a failure."""
    found = {match.group(1) for match in pattern.finditer(text)}
    if not found:
        return ParseFailure(f"no score in {text[:60]!r}") if finished else Truncated()
    if len(found) > 1:
        return ParseFailure(f"several scores: {', '.join(sorted(map(str, found)))}")
    return read_number(found.pop() or "", scale)


def _on_scale(value: int, scale: Sequence[int]) -> Reading:
    low, high = scale
    return Score(float(value)) if low <= value <= high else ParseFailure(f"{value} is off the scale {low}..{high}")


def expected_score(logprobs: Sequence[float], scale: Sequence[int]) -> Reading:
    """The mean over the label tokens' probabilities, and the mass that fell off the scale (mode expected).

    `logprobs`: of the labels low..high, over the whole vocabulary.
    """
    masses = [math.exp(value) for value in logprobs]
    total = math.fsum(masses)
    if not math.isfinite(total) or total <= 0 or total > 1 + 1e-3:
        return ParseFailure(f"label probabilities sum to {total:g}")
    labels = range(scale[0], scale[1] + 1)
    mean = math.fsum(m * k for m, k in zip(masses, labels, strict=True)) / total
    return Score(mean, off_scale=max(0.0, 1 - total))


class Judge(Protocol):
    async def judge(
        self, messages: Sequence[Message], meta: str, answer: str, objective: Objective, seed_of: SeedOf
    ) -> Judgement: ...


class ModelJudge:
    """An engine's model as the judge."""

    def __init__(self, engine: Engine, chat: Chat, templates: Templates, scoring: Scoring) -> None:
        """Raises: InputError when the scoring mode does not fit the tokenizer, or the pattern is not a regex."""
        self._engine, self._chat, self._templates, self._scoring = engine, chat, templates, scoring
        self._choices = tuple(str(k) for k in range(scoring.scale[0], scoring.scale[1] + 1))
        self._labels = label_ids(engine.tokenizer, self._choices) if scoring.mode == "expected" else None
        self._pattern = compile_pattern(scoring.pattern)

    async def judge(
        self, messages: Sequence[Message], meta: str, answer: str, objective: Objective, seed_of: SeedOf
    ) -> Judgement:
        rendered = self._templates.score(messages, answer, objective)
        prompt = self._chat.prompt_ids([{"role": "user", "content": rendered}], self._scoring.system)
        draws: list[float | None] = []
        tokens, text, off_scale = 0, "", None
        for draw in range(self._scoring.draws):
            reading: Reading = ParseFailure("not asked")
            for attempt in range(1 + self._scoring.retries):
                completion = await self._engine.generate(self._request(prompt, seed_of(draw, attempt)))
                reading = self._read(completion)
                tokens, text = tokens + len(completion.token_ids), completion.text
                if isinstance(reading, Score) or self._labels is not None:  # asking again gives the same probabilities
                    break
            if not isinstance(reading, Score):
                kind = "truncated" if isinstance(reading, Truncated) else "parse_failure"
                return Judgement(None, [*draws, None], f"{kind}: {reading.why}", text, None, tokens)
            draws.append(reading.value)
            off_scale = reading.off_scale
        mean = math.fsum(d for d in draws if d is not None) / len(draws)
        return Judgement(mean, draws, "ok", text, off_scale, tokens)

    def _request(self, prompt: list[int], seed: int) -> Request:
        mode = self._scoring.mode
        return Request(
            prompt_ids=prompt,
            max_tokens=1 if mode == "expected" else self._scoring.max_tokens,
            temperature=self._scoring.temperature,
            seed=seed,
            choices=self._choices if mode == "choice" else None,
            label_ids=self._labels,
        )

    def _read(self, completion: Completion) -> Reading:
        if self._scoring.mode == "choice":
            return read_number(completion.text, self._scoring.scale)
        if self._scoring.mode == "expected":
            assert completion.label_logprobs is not None
            return expected_score(completion.label_logprobs, self._scoring.scale)
        finished = completion.finish_reason == "stop"
        return read_pattern(completion.text, self._pattern, self._scoring.scale, finished=finished)


def label_ids(tokenizer: Any, labels: Sequence[str]) -> tuple[int, ...]:
    """The single token of each label. Raises: InputError when a label is several tokens."""
    found = []
    for label in labels:
        ids = tokenizer.encode(label, add_special_tokens=False)
        pieces = [i for i in ids if tokenizer.decode([i]).strip()]  # a word-start mark alone is no part of the label
        if len(pieces) != 1 or tokenizer.decode(pieces).strip() != label:
            raise InputError(
                f"scoring.mode expected needs one-token labels, and this tokenizer makes {len(pieces)} tokens of "
                f"{label!r}; use scoring.scale=[1, 9]"
            )
        found.append(pieces[0])
    return tuple(found)


def compile_pattern(pattern: str) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as e:
        raise InputError(f"scoring.pattern: not a regular expression ({e})") from e
    if compiled.groups < 1:
        raise InputError(r"scoring.pattern: needs a group around the score, for example \[\[(\d+)\]\]")
    return compiled


class FunctionJudge:
    """A plain function `(messages, meta, response, objective) -> number` as the judge."""

    def __init__(self, function: Callable[[Sequence[Message], str, str, str], float], name: str) -> None:
        self._function, self._name = function, name

    async def judge(
        self, messages: Sequence[Message], meta: str, answer: str, objective: Objective, seed_of: SeedOf
    ) -> Judgement:
        value = self._function(messages, meta, answer, objective.name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value):
            return Judgement(None, [None], f"parse_failure: {self._name} returned {value!r}", repr(value), None, 0)
        return Judgement(float(value), [float(value)], "ok", json.dumps(value), None, 0)
