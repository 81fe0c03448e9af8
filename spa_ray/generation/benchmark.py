"""Benchmarks: what a class of one's own gives, and how it plays on an engine, in the place of an episode.

A prompt's play becomes a row of EPISODES: each question that it asked is a response of the kind "turn", and what `play`
returned is in `meta` as `result`.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, ClassVar, Generic, TypeVar

from spa_ray.config.benchmark import BenchmarkConfig, benchmark_class
from spa_ray.config.rollout import EvalSampling
from spa_ray.data.forms import BadRowError
from spa_ray.data.prompts import Prompt, to_prompt
from spa_ray.data.readers import Row as SourceRow
from spa_ray.engine.protocol import Completion, Engine
from spa_ray.errors import InputError
from spa_ray.generation.episode import Draw, PromptTooLongError, Response, Row, error_of, error_row, thought
from spa_ray.generation.seeds import seed_for
from spa_ray.rollout.chat import Chat

# Asks the model under test: messages, and changes of `sampling` (`max_tokens=8`).
Ask = Callable[..., Awaitable[Completion]]
C = TypeVar("C", bound=BenchmarkConfig)
ROLE = "answer"


class Benchmark(Generic[C]):
    """A benchmark. Derive from it and give `evaluation.benchmarks.NAME.benchmark: my_file:MyBenchmark`."""

    Config: ClassVar[type[BenchmarkConfig]] = BenchmarkConfig  # its keys, with their defaults
    version: ClassVar[int] = 1  # of its protocol: prompts, asking, measures
    questions: ClassVar[int] = 1  # that a prompt asks, for plans

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

    def __init__(self, section: BenchmarkConfig, engine: Engine, chat: Chat, seed: int) -> None:
        self._benchmark, self._sampling = make_benchmark(section), section.sampling
        self._engine, self._chat, self._seed = engine, chat, seed

    async def run(self, prompt: Mapping[str, Any], *, attempt: int = 0, earlier: Completion | None = None) -> Row:
        """One prompt's play. What goes wrong becomes the row's `error`, as an episode's."""
        turns: list[Response] = []
        spent = {"prompt_tokens": 0, "generated_tokens": 0}
        meta = json.loads(prompt["meta"])
        seed_id = prompt.get("seed_id") or prompt["prompt_id"]  # the same for a prompt that several models answer

        async def ask(messages: Sequence[Mapping[str, str]], **changes: Any) -> Completion:
            sampling = EvalSampling.model_validate({**self._sampling.model_dump(), **changes})
            at = len(turns)
            seed = seed_for(self._seed, 0, seed_id, ROLE, response=at, attempt=1000 * attempt)
            ids = self._chat.prompt_ids(messages)
            if len(ids) + sampling.max_tokens > self._engine.max_model_len:
                raise PromptTooLongError(
                    f"{len(ids)} tokens and {sampling.max_tokens} of answer exceed the context of "
                    f"{self._engine.max_model_len}"
                )
            turn = Response(at, "turn", Completion("", [], "stop"), None, sampling.temperature, seed)
            turns.append(turn)
            turn.completion = await self._engine.generate(Draw(sampling, ROLE).request(ids, seed))
            spent["prompt_tokens"] += len(ids)
            spent["generated_tokens"] += len(turn.completion.token_ids)
            return thought(turn, self._chat).completion

        async def play() -> None:
            row = {"prompt_id": seed_id, "messages": prompt["messages"], "meta": dict(meta)}
            result = await self._benchmark.play(row, ask)
            meta["result"] = json.loads(json.dumps(dict(result), allow_nan=False))

        if (error := await error_of(play())) is not None:
            return {**error_row(prompt, error, attempt), **spent}
        rows = [turn.row() for turn in turns]
        played = {"meta": json.dumps(meta, ensure_ascii=False), "responses": rows, "scores": [[] for _ in rows]}
        return {**error_row(prompt, None, attempt), **played, **spent}

    async def score(self, answered: Mapping[str, Any], *, part: int = 0) -> Row:
        raise NotImplementedError("a benchmark measures its own answers")
