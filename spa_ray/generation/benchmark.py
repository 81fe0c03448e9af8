"""Benchmarks: what a class of one's own gives, and how it plays on an engine, in the place of an episode.

A prompt's play becomes a row of EPISODES: each question that it asked is a response of the kind "turn", and what `play`
returned is in `meta` as `result`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar

from spa_ray.config.benchmark import BenchmarkConfig, benchmark_class
from spa_ray.config.rollout import EvalSampling
from spa_ray.data.forms import BadRowError
from spa_ray.data.prompts import Prompt, to_prompt
from spa_ray.data.readers import Row as SourceRow
from spa_ray.engine.protocol import Completion, Engine, Request
from spa_ray.errors import InputError
from spa_ray.generation.endpoint_judge import Ask as Endpoint
from spa_ray.generation.episode import Draw, PromptTooLongError, Response, Row, as_read, error_of, error_row, thought
from spa_ray.generation.judging import Item, Judgement
from spa_ray.generation.pairwise import Question, Verdict
from spa_ray.generation.seeds import seed_for
from spa_ray.objectives import Objective
from spa_ray.rollout.chat import Chat

Asked = Sequence[Mapping[str, str]] | str  # messages; a text is given to the model as it is, without its chat template
C = TypeVar("C", bound=BenchmarkConfig)
ROLE = "answer"
QUALITY = Objective(name="quality", principle="how well the response answers the prompt")  # of judges without a text


class Ask(Protocol):
    """Asks the model under test."""

    async def __call__(self, prompt: Asked, /, **changes: Any) -> Completion:
        """Its answer. `changes` are keys of `sampling` (`max_tokens=8`)."""
        ...

    async def logprobs(self, prompt: Asked, continuation: str) -> float:
        """The log-probability of a text right behind the prompt, summed over its tokens."""
        ...

    async def judge(self, messages: Sequence[Mapping[str, str]], *, attempt: int = 0, **changes: Any) -> Completion:
        """What the section's `judge` says, at temperature 0 unless `changes` say otherwise. Another `attempt` asks
        again."""
        ...

    async def rate(self, messages: Sequence[Mapping[str, str]], response: str) -> Judgement:
        """What the section's `judge` scores a response with, where it is no text that answers (`judged`)."""
        ...

    async def compare(self, messages: Sequence[Mapping[str, str]], a: str, b: str) -> Verdict:
        """Which of two responses that `judge` finds better; `a` is shown first."""
        ...


class Benchmark(Generic[C]):
    """A benchmark. Derive from it and give `evaluation.benchmarks.NAME.benchmark: my_file:MyBenchmark`."""

    Config: ClassVar[type[BenchmarkConfig]] = BenchmarkConfig  # its keys, with their defaults
    version: ClassVar[int] = 1  # of its protocol: prompts, asking, measures
    questions: ClassVar[int] = 1  # that a prompt asks, for plans
    judgements: ClassVar[int] = 0  # that a prompt asks of the judge, for plans
    judged: ClassVar[Literal["rate", "compare"] | None] = None  # what it asks of a judge that writes no text
    needs: ClassVar[tuple[str, ...]] = ()  # of an engine's capabilities: `continuations` for `ask.logprobs`

    def __init__(self, config: C) -> None:
        self.config = config

    def prompts(self) -> Iterable[Mapping[str, Any]]:
        """Rows with a `prompt` or `messages`; all else in them (the right answer, say) is kept in `meta`."""
        raise NotImplementedError

    async def play(self, row: Row, ask: Ask) -> Mapping[str, Any]:
        """One prompt: ask the model, and say what `metrics` needs as JSON values. `row` has `prompt_id`, `messages` and
        `meta`, a dict."""
        raise NotImplementedError

    def metrics(self, rows: Sequence[Row]) -> Mapping[str, Any]:
        """The benchmark's measures over the rows of all prompts that were played; each has its `result` beside what
        `play` got."""
        raise NotImplementedError


def make_benchmark(section: BenchmarkConfig) -> Benchmark[BenchmarkConfig]:
    """The benchmark that a section names."""
    found: Callable[[BenchmarkConfig], Benchmark[BenchmarkConfig]] = benchmark_class(section.benchmark)
    return found(section)


def benchmark_prompts(section: BenchmarkConfig, *, where: str) -> Iterator[Prompt]:
    """The benchmark's prompts, at most `limit`. Raises: InputError for a row that is none, and where there are none."""
    count = 0
    for count, values in enumerate(islice(make_benchmark(section).prompts(), section.limit), 1):
        place = f"{where}: prompt {count}"
        try:
            yield to_prompt(SourceRow(place, values), {})
        except BadRowError as e:
            raise InputError(f"{place}: {e}") from e
    if not count:
        raise InputError(f"{where}: {section.benchmark}: no prompt in it")


class Plays:
    """Plays a benchmark's prompts on one engine, as `Episodes` runs episodes."""

    def __init__(
        self,
        section: BenchmarkConfig,
        engine: Engine,
        chat: Chat,
        seed: int,
        endpoint: Endpoint | None = None,
        judge: Any = None,
    ) -> None:
        """`endpoint` reaches the benchmark's judge, where that is one; `judge` is a `Scorer` or `Comparer`, by its
        `judged`."""
        self._benchmark, self._sampling = make_benchmark(section), section.sampling
        self._engine, self._chat, self._seed, self._endpoint = engine, chat, seed, endpoint
        self._judge = judge

    async def run(self, prompt: Mapping[str, Any], *, attempt: int = 0, earlier: Completion | None = None) -> Row:
        """One prompt's play. What goes wrong becomes the row's `error`, as an episode's."""
        meta = json.loads(prompt["meta"])
        seed_id = prompt.get("seed_id") or prompt["prompt_id"]  # the same for a prompt that several models answer
        seed_of = partial(self._draw_seed, seed_id, attempt)
        ask = _Asking(self._engine, self._chat, self._sampling, seed_of, self._endpoint, self._judge, prompt)

        async def play() -> None:
            row = {"prompt_id": seed_id, "messages": prompt["messages"], "meta": dict(meta)}
            result = await self._benchmark.play(row, ask)
            meta["result"] = json.loads(json.dumps(dict(result), allow_nan=False))

        if (error := await error_of(play())) is not None:
            return {**error_row(prompt, error, attempt), **ask.spent}
        rows = [turn.row() for turn in ask.turns]
        played = {"meta": json.dumps(meta, ensure_ascii=False), "responses": rows, "scores": [[] for _ in rows]}
        return {**error_row(prompt, None, attempt), **played, **ask.spent}

    def _draw_seed(self, seed_id: str, attempt: int, at: int) -> int:
        return seed_for(self._seed, 0, seed_id, ROLE, response=at, attempt=1000 * attempt)

    async def score(self, answered: Mapping[str, Any], *, part: int = 0) -> Row:
        raise NotImplementedError("a benchmark measures its own answers")


class _Asking:
    """`Ask` of one play: `turns` has what was asked, `spent` its tokens."""

    def __init__(
        self,
        engine: Engine,
        chat: Chat,
        sampling: EvalSampling,
        seed_of: Callable[[int], int],
        endpoint: Endpoint | None,
        judge: Any,
        row: Mapping[str, Any],
    ) -> None:
        self._engine, self._chat, self._sampling = engine, chat, sampling
        self._seed_of, self._endpoint, self._judge, self._row = seed_of, endpoint, judge, row
        self.turns: list[Response] = []
        self.spent = {"prompt_tokens": 0, "generated_tokens": 0}

    async def __call__(self, prompt: Asked, /, **changes: Any) -> Completion:
        return await self._answer("turn", self._read(prompt), {**self._sampling.model_dump(), **changes})

    def _read(self, prompt: Asked) -> Asked:
        """A conversation as the model reads it: each of its turns is asked for the scores of the benchmark's prompt."""
        return prompt if isinstance(prompt, str) else as_read(self._row, prompt)

    async def judge(self, messages: Sequence[Mapping[str, str]], *, attempt: int = 0, **changes: Any) -> Completion:
        if self._endpoint is None:
            return await self._answer("judge", messages, changes)
        sampling = EvalSampling.model_validate(changes)
        turn = self._turn("judge", sampling.temperature)
        asked = {"max_tokens": sampling.max_tokens, "temperature": sampling.temperature, "seed": turn.seed}
        found = await self._endpoint([dict(m) for m in messages], **asked, attempt=attempt)
        turn.completion = Completion(found.text, [], "stop" if found.finish_reason == "stop" else "length")
        self.spent["prompt_tokens"] += found.prompt_tokens
        self.spent["generated_tokens"] += found.generated_tokens
        return turn.completion

    async def rate(self, messages: Sequence[Mapping[str, str]], response: str) -> Judgement:
        item = Item(messages, self._row["meta"], response, (QUALITY,), lambda _, draw, attempt: self._seed_of(attempt))
        (found,) = await self._judge.score(item)
        return found

    async def compare(self, messages: Sequence[Mapping[str, str]], a: str, b: str) -> Verdict:
        return await self._judge.compare(Question(messages, self._row["meta"], QUALITY, self._seed_of), a, b)

    async def _answer(self, kind: str, prompt: Asked, settings: Mapping[str, Any]) -> Completion:
        sampling = EvalSampling.model_validate(settings)
        ids = self._chat.text_ids(prompt) if isinstance(prompt, str) else self._chat.prompt_ids(prompt)
        turn = self._turn(kind, sampling.temperature)
        turn.completion = await self._generate(Draw(sampling, ROLE).request(ids, turn.seed))
        return thought(turn, self._chat).completion

    async def logprobs(self, prompt: Asked, continuation: str) -> float:
        before, behind = self._chat.continuation_ids(self._read(prompt), continuation)
        turn = self._turn("continuation", 0.0)
        turn.completion = Completion(continuation, behind, "stop")
        asked = Request(before, max_tokens=1, temperature=0.0, seed=turn.seed, continuation_ids=tuple(behind))
        return math.fsum((await self._generate(asked)).continuation_logprobs or ())

    def _turn(self, kind: str, temperature: float) -> Response:
        at = len(self.turns)
        self.turns.append(Response(at, kind, Completion("", [], "stop"), None, temperature, self._seed_of(at)))
        return self.turns[at]

    async def _generate(self, request: Request) -> Completion:
        given = len(request.prompt_ids) + len(request.continuation_ids or ())
        if given + request.max_tokens > self._engine.max_model_len:
            raise PromptTooLongError(
                f"{given} tokens and {request.max_tokens} of answer exceed the context of {self._engine.max_model_len}"
            )
        completion = await self._engine.generate(request)
        self.spent["prompt_tokens"] += given
        self.spent["generated_tokens"] += len(completion.token_ids)
        return completion
