"""Judging: one response and one objective a call, and reading what the judge says.

Goes out: a `Judgement`, which is a `Score`, or a `ParseFailure` or `Truncated` that never becomes a number.
Never: several answers in one judge prompt, a default score.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Protocol, TypeVar

from spa_ray.config.models import Config
from spa_ray.config.rollout import Scoring
from spa_ray.config.section import JudgeSection
from spa_ray.engine.protocol import Completion, Engine, Request
from spa_ray.errors import InputError
from spa_ray.generation.templates import Templates
from spa_ray.objectives import Objective
from spa_ray.rollout.chat import Chat
from spa_ray.rollout.labels import Labels, labels_of

Message = Mapping[str, str]
OFF_SCALE_LIMIT = 0.5  # median mass off the scale above which a judge's expected scores mean little
SLACK = 1e-3  # by which rounding may leave a probability, or its logarithm, above its bound
SeedOf = Callable[[str, int, int], int]  # (objective, draw, attempt) -> seed
T = TypeVar("T")


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
    """One objective's score, or None and why there is none.

    `status` is "ok" or the failure: `parse_failure`, `truncated`, `too_long` (for the context) or `failed` (a judge of
    one's own says so), a colon, and why. `text` is what the judge said. `draws` are the scores that `score` is the mean
    of, itself where there is one.
    """

    score: float | None
    status: str = "ok"
    text: str = ""
    draws: list[float | None] = field(default_factory=list)
    off_scale: float | None = None
    prompt_tokens: int = 0
    generated_tokens: int = 0

    def __post_init__(self) -> None:
        if not self.draws:
            object.__setattr__(self, "draws", [self.score])


def read_number(text: str, scale: Sequence[int]) -> Reading:
    """A text that is one whole number on the scale (modes choice and expected)."""
    stripped = text.strip()
    if not re.fullmatch(r"[+-]?\d{1,9}", stripped, flags=re.ASCII):
        return ParseFailure(f"not a whole number: {text[:60]!r}")
    return _on_scale(int(stripped), scale)


def read_choice(text: str, choices: Sequence[str], scale: Sequence[int], *, finished: bool) -> Reading:
    """A constrained judgement; a "1" that was cut may have been on its way to "10"."""
    if not finished and any(choice.startswith(text.strip()) and choice != text.strip() for choice in choices):
        return Truncated()
    return read_number(text, scale)


def read_pattern(text: str, pattern: re.Pattern[str], scale: Sequence[int], *, finished: bool) -> Reading:
    """The first group of the pattern's only match (mode regex); two different scores are a failure.

    A match that touches the end of a text that was cut counts as cut: "(\\d+)" would read 1 in half of a 10.
    """
    matches = list(pattern.finditer(text))
    if not finished and matches and matches[-1].end(1) == len(text):
        return Truncated()
    found = {match.group(1) for match in matches}
    if not found:
        return ParseFailure(f"no score in {text[:60]!r}") if finished else Truncated()
    if len(found) > 1:
        return ParseFailure(f"several scores: {', '.join(sorted(map(str, found)))}")
    return read_number(found.pop() or "", scale)


def ratings(scale: Sequence[int]) -> tuple[str, ...]:
    """The scale's whole numbers as a judge writes them."""
    return tuple(str(k) for k in range(scale[0], scale[1] + 1))


def _on_scale(value: int, scale: Sequence[int]) -> Reading:
    low, high = scale
    return Score(float(value)) if low <= value <= high else ParseFailure(f"{value} is off the scale {low}..{high}")


def expected_score(logprobs: Sequence[float], scale: Sequence[int]) -> Reading:
    """The mean over the label tokens' probabilities, and the mass that fell off the scale (mode expected).

    `logprobs`: of the labels low..high, over the whole vocabulary.
    """
    for value in logprobs:
        if not value <= SLACK:  # NaN as well
            return ParseFailure(f"a label's log-probability is {value:g}")
    masses = [math.exp(value) for value in logprobs]
    total = math.fsum(masses)
    if not math.isfinite(total) or total <= 0 or total > 1 + SLACK:
        return ParseFailure(f"label probabilities sum to {total:g}")
    labels = range(scale[0], scale[1] + 1)
    mean = math.fsum(m * k for m, k in zip(masses, labels, strict=True)) / total
    # Rounding alone can leave the mean a last digit outside.
    return Score(min(max(mean, float(scale[0])), float(scale[1])), off_scale=max(0.0, 1 - total))


@dataclass(frozen=True)
class Asked:
    """One call of a judge: how its text reads, and what it took."""

    reading: Reading
    text: str
    prompt_tokens: int
    generated_tokens: int


async def judgement(ask: Callable[[int, int], Awaitable[Asked]], *, draws: int, tries: int) -> Judgement:
    """The mean of `draws` scores, each asked for up to `tries` times; `ask` takes the draw and the attempt."""
    values: list[float | None] = []
    prompt_tokens = generated_tokens = 0
    text, off_scale = "", None
    for draw in range(draws):
        reading: Reading = ParseFailure("not asked")
        for attempt in range(tries):
            asked = await ask(draw, attempt)
            reading, text = asked.reading, asked.text
            prompt_tokens, generated_tokens = (
                prompt_tokens + asked.prompt_tokens,
                generated_tokens + asked.generated_tokens,
            )
            if isinstance(reading, Score):
                break
        if not isinstance(reading, Score):
            kind = "truncated" if isinstance(reading, Truncated) else "parse_failure"
            why = f"{kind}: {reading.why}"
            return Judgement(None, why, text, [*values, None], None, prompt_tokens, generated_tokens)
        values.append(reading.value)
        off_scale = reading.off_scale
    mean = math.fsum(value for value in values if value is not None) / len(values)
    return Judgement(mean, "ok", text, values, off_scale, prompt_tokens, generated_tokens)


@dataclass(frozen=True)
class Item:
    """What is judged: a response to `messages`, on each objective. `meta` is JSON, the prompt's other columns."""

    messages: Sequence[Message]
    meta: str
    response: str
    objectives: Sequence[Objective]
    seed_of: SeedOf


@dataclass(frozen=True)
class Compared:
    """A prompt whose answers are compared. `seed_of` takes an answer's index, an objective, a draw and an attempt."""

    messages: Sequence[Message]
    meta: str
    seed_of: Callable[[int, str, int, int], int]


class Scorer(Protocol):
    """A judge as an episode asks it. A judgement that failed says so in its status; what is raised fails the prompt."""

    async def score(self, item: Item) -> list[Judgement]:
        """One judgement for each of the item's objectives."""
        ...


@dataclass(frozen=True)
class Parts:
    """What a judge may be made of. `ask` reaches an endpoint through the process that asks for all engines."""

    config: Config
    engine: Engine
    chat: Chat
    templates: Templates
    ask: Callable[..., Awaitable[Any]] | None = None


async def together(works: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order; at the first failure the others are cancelled, so that none outlives its episode."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class ModelJudge:
    """An engine's model as the judge."""

    def __init__(self, engine: Engine, chat: Chat, templates: Templates, scoring: Scoring) -> None:
        """`chat` renders the judge's prompts. Raises: InputError when the scoring mode does not fit the tokenizer, or
        the pattern is not a regex."""
        self._engine, self._chat, self._templates, self._scoring = engine, chat, templates, scoring
        self._labels = judge_labels(chat, scoring)
        self._pattern = compile_pattern(scoring.pattern)
        expected = scoring.mode == "expected"  # probabilities, not a draw: asking again gives the same
        self._draws = 1 if expected else scoring.draws
        self._tries = 1 if expected or scoring.temperature == 0 else 1 + scoring.retries
        self._max_tokens = 1 if expected else scoring.max_tokens

    @classmethod
    def of(cls, section: JudgeSection, parts: Parts) -> ModelJudge:
        scoring = parts.config.scoring
        return cls(parts.engine, parts.chat.with_kwargs(scoring.chat_template_kwargs), parts.templates, scoring)

    @staticmethod
    def check(section: JudgeSection, where: str) -> None:
        """What its prompts need is checked with the config's templates."""

    async def score(self, item: Item) -> list[Judgement]:
        return await together([self._judge(item, objective) for objective in item.objectives])

    async def _judge(self, item: Item, objective: Objective) -> Judgement:
        asked = item.messages, item.response, objective
        prompt = self._chat.prompt_ids(
            [{"role": "user", "content": self._templates.score(*asked)}], self._templates.score_system(*asked)
        )
        prompt += self._labels.prefix if self._labels is not None else ()
        room = self._engine.max_model_len - len(prompt)
        if room < self._max_tokens:
            why = f"too_long: {len(prompt)} tokens leave {room} of the context, a judgement needs {self._max_tokens}"
            return Judgement(None, why)

        async def ask(draw: int, attempt: int) -> Asked:
            completion = await self._engine.generate(self._request(prompt, item.seed_of(objective.name, draw, attempt)))
            return Asked(self._read(completion), completion.text, len(prompt), len(completion.token_ids))

        return await judgement(ask, draws=self._draws, tries=self._tries)

    def _request(self, prompt: list[int], seed: int) -> Request:
        labels, constrained = self._labels, self._scoring.mode == "choice"
        return Request(
            prompt_ids=prompt,
            max_tokens=self._max_tokens,
            temperature=self._scoring.temperature,
            seed=seed,
            choices=labels.texts if labels is not None and constrained else None,
            choice_ids=labels.single if labels is not None and constrained else None,
            label_ids=labels.single if labels is not None and not constrained else None,
        )

    def _read(self, completion: Completion) -> Reading:
        finished = completion.finish_reason == "stop"
        if self._scoring.mode == "choice":
            assert self._labels is not None
            return read_choice(completion.text, self._labels.texts, self._scoring.scale, finished=finished)
        if self._scoring.mode == "expected":
            assert completion.label_logprobs is not None
            return expected_score(completion.label_logprobs, self._scoring.scale)
        text = spoken(self._chat, completion)
        if text is None:
            return Truncated("the judge was cut within its thinking by scoring.max_tokens")
        return read_pattern(text, self._pattern, self._scoring.scale, finished=finished)


def spoken(chat: Chat, completion: Completion) -> str | None:
    """A judge's text without its thinking; None where it was cut within that."""
    if not chat.thinks:
        return completion.text
    parts = chat.divide(completion.token_ids)
    if not parts.closed:
        return None
    return completion.text if parts.thinking is None else parts.text


def judge_labels(chat: Chat, scoring: Scoring) -> Labels | None:
    """The scale's labels as they follow a judge's prompt; None in mode regex, which reads free text.

    Raises: InputError when mode expected would need several tokens for one.
    """
    if scoring.mode == "regex":
        return None
    labels = labels_of(chat, ratings(scoring.scale))
    if scoring.mode == "expected":
        labels.require_single()
    return labels


def slow_labels(chat: Chat, scoring: Scoring) -> str | None:
    """A line where a judgement of mode choice takes several steps and a grammar on this scale, and one on [1, 9]."""
    if scoring.mode != "choice":
        return None
    labels = judge_labels(chat, scoring)
    if labels is None or labels.single is not None or labels_of(chat, [str(k) for k in range(1, 10)]).single is None:
        return None
    long = next(text for text, ids in zip(labels.texts, labels.tokens, strict=True) if len(ids) > 1)
    return (
        f"scoring: {long} is several tokens of this tokenizer, so that a judgement takes several steps and a grammar; "
        "with scoring.scale=[1, 9] it takes one step"
    )


def off_scale_warning(off_scale: Sequence[float | None]) -> str | None:
    """A line when the judge mostly wants to write something else than a label (mode expected), else None.

    `off_scale`: the mass off the scale, one a judgement; nulls are left out.
    """
    known = sorted(value for value in off_scale if value is not None)
    if not known or (middle := median(known)) <= OFF_SCALE_LIMIT:
        return None
    return (
        f"the judge does not want to write a label of the scale: the median of its probability off the scale is "
        f"{middle:.2f}; use scoring.mode=regex, or a scoring.prompt that asks for the number alone"
    )


def compile_pattern(pattern: str) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as e:
        raise InputError(f"scoring.pattern: not a regular expression ({e})") from e
    if compiled.groups < 1:
        raise InputError(r"scoring.pattern: needs a group around the score, for example \[\[(\d+)\]\]")
    return compiled
