"""Two answers to one prompt compared: a judge says which is better on one objective, with either answer first.

A row in holds the two answers as its `responses`; the row of EPISODES that comes out has a response per order (kind
"ab" or "ba"), whose `scores` are the verdicts, objective by objective: 1 the first answer of the row, -1 the second, 0
a tie, null where the judge failed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol, get_args

from pydantic import ValidationError

from spa_ray.config.endpoint import Endpoint
from spa_ray.config.faults import explain
from spa_ray.config.judge import Function
from spa_ray.config.models import Config
from spa_ray.config.pairwise import Pairwise
from spa_ray.config.plugs import JUDGES, load_dotted
from spa_ray.config.section import JudgeSection, Section
from spa_ray.engine.openai import EndpointClient
from spa_ray.engine.protocol import Completion, Engine, Request
from spa_ray.errors import InputError
from spa_ray.generation.calls import Calls, shown
from spa_ray.generation.endpoint_check import api_key
from spa_ray.generation.endpoint_judge import Ask
from spa_ray.generation.episode import Row, error_of, error_row
from spa_ray.generation.judging import Item, Parts, Scorer, spoken, together
from spa_ray.generation.seeds import seed_for
from spa_ray.generation.templates import PairTemplate
from spa_ray.logs import printable
from spa_ray.objectives import Objective
from spa_ray.rollout.chat import Chat
from spa_ray.rollout.labels import labels_of

Winner = Literal["a", "b", "tie"]
LETTERS: dict[str, Winner] = {"A": "a", "B": "b", "C": "tie"}
VALUES: dict[str, float] = {"a": 1.0, "tie": 0.0, "b": -1.0}
ORDERS = ("ab", "ba")
CHOICE_TOKENS = 8  # room for one constrained letter
_VERDICT = re.compile(r"\[\[([ABC])\]\]")


@dataclass(frozen=True)
class Verdict:
    """Which of two answers is better: `a` the one shown first, `b` the second, `tie`; None where the judge failed, and
    `status` says why. `text` is what the judge said."""

    winner: Winner | None
    text: str = ""
    status: str = "ok"
    prompt_tokens: int = 0
    generated_tokens: int = 0


@dataclass(frozen=True)
class Question:
    """What two answers are compared on. `meta` is JSON, the prompt's other columns; `seed_of` takes the attempt."""

    messages: Sequence[Mapping[str, str]]
    meta: str
    objective: Objective
    seed_of: Callable[[int], int]


class Comparer(Protocol):
    """A pairwise judge as a comparison asks it. What is raised fails the prompt."""

    async def compare(self, item: Question, a: str, b: str) -> Verdict:
        """`a` is shown first."""
        ...


class PairwiseJudge:
    """A pairwise judge of your own: derive from it and give `evaluation.pairwise.judge: my_file:MyJudge`, or
    `{kind: function, name: my_file:MyJudge, config: {..}}` where its `Config` has keys of its own."""

    Config: type[Section] = Section

    def __init__(self, config: Any) -> None:
        """`config` is its `Config`."""
        self.config = config

    async def compare(self, item: Question, a: str, b: str) -> Verdict | str:
        """`a`, `b` or `tie`, or a `Verdict`. May be a plain method as well."""
        raise NotImplementedError


class _Asking:
    """A model that is asked by a prompt of ours: up to `tries` times, until its text reads."""

    def __init__(self, section: Pairwise, objectives: Sequence[Objective], *, tries: int) -> None:
        self._section, self._template, self._tries = section, PairTemplate(section, objectives), tries

    async def compare(self, item: Question, a: str, b: str) -> Verdict:
        text = self._template.render(item.messages, a, b, item.objective)
        prompt_tokens = generated_tokens = 0
        verdict = Verdict(None, status="failed: not asked")
        for attempt in range(self._tries):
            verdict = await self._ask_once(text, item.seed_of(attempt), attempt)
            prompt_tokens += verdict.prompt_tokens
            generated_tokens += verdict.generated_tokens
            if verdict.winner is not None:
                break
        return Verdict(verdict.winner, verdict.text, verdict.status, prompt_tokens, generated_tokens)

    async def _ask_once(self, text: str, seed: int, attempt: int) -> Verdict:
        raise NotImplementedError


class ModelPairwise(_Asking):
    """An engine's model as the judge."""

    def __init__(self, engine: Engine, chat: Chat, section: Pairwise, objectives: Sequence[Objective]) -> None:
        super().__init__(section, objectives, tries=1 if section.temperature == 0 else 1 + section.retries)
        self._engine, self._chat = engine, chat
        self._labels = labels_of(chat, list(LETTERS)) if section.mode == "choice" else None
        self._max_tokens = section.max_tokens if self._labels is None else CHOICE_TOKENS

    @classmethod
    def of(cls, section: JudgeSection, parts: Parts) -> ModelPairwise:
        chat = parts.chat.with_kwargs(parts.config.scoring.chat_template_kwargs)
        return cls(parts.engine, chat, section_of(parts.config), parts.templates.objectives)

    @staticmethod
    def check(section: JudgeSection, where: str) -> None:
        """Its prompt is checked with the section."""

    async def _ask_once(self, text: str, seed: int, attempt: int) -> Verdict:
        section, labels = self._section, self._labels
        prompt = self._chat.prompt_ids([{"role": "user", "content": text}])
        prompt += labels.prefix if labels is not None else ()
        room = self._engine.max_model_len - len(prompt)
        if room < self._max_tokens:
            why = f"{len(prompt)} tokens leave {room} of the context, a verdict needs {self._max_tokens}"
            return Verdict(None, status=f"too_long: {why}")
        request = Request(
            prompt_ids=prompt,
            max_tokens=self._max_tokens,
            temperature=section.temperature,
            seed=seed,
            choices=labels.texts if labels is not None else None,
            choice_ids=labels.single if labels is not None else None,
        )
        completion = await self._engine.generate(request)
        generated = len(completion.token_ids)
        return replace(self._read(completion), prompt_tokens=len(prompt), generated_tokens=generated)

    def _read(self, completion: Completion) -> Verdict:
        if self._labels is not None:
            return read_verdict(f"[[{completion.text.strip()}]]", text=completion.text)
        said = spoken(self._chat, completion)
        finished = completion.finish_reason == "stop" and said is not None
        return read_verdict(said or "", text=completion.text, finished=finished)


class EndpointPairwise(_Asking):
    """A model behind an OpenAI-compatible endpoint."""

    def __init__(self, ask: Ask, section: Pairwise, objectives: Sequence[Objective]) -> None:
        super().__init__(section, objectives, tries=1 + section.retries)
        self._ask = ask

    @classmethod
    def of(cls, section: Endpoint, parts: Parts) -> EndpointPairwise:
        ask = parts.ask or EndpointClient(section, api_key(section)).ask
        return cls(ask, section_of(parts.config), parts.templates.objectives)

    @staticmethod
    def check(section: Endpoint, where: str) -> None:
        """It is asked for its models when a pass begins."""

    async def _ask_once(self, text: str, seed: int, attempt: int) -> Verdict:
        constrained = self._section.mode == "choice"
        found = await self._ask(
            [{"role": "user", "content": text}],
            max_tokens=self._section.max_tokens,
            temperature=self._section.temperature,
            seed=seed,
            choices=tuple(LETTERS) if constrained else None,
            draw=0,
            attempt=attempt,
        )
        said = f"[[{found.text.strip()}]]" if constrained else found.text
        verdict = read_verdict(said, text=found.text, finished=found.finish_reason == "stop")
        return replace(verdict, prompt_tokens=found.prompt_tokens, generated_tokens=found.generated_tokens)


def read_verdict(said: str, *, text: str, finished: bool = True) -> Verdict:
    """The only verdict in what was said; none, or two that differ, are a failure, and so is a text that was cut before
    it."""
    found = set(_VERDICT.findall(said))
    if len(found) == 1:
        return Verdict(LETTERS[found.pop()], text)
    if len(found) > 1:
        return Verdict(None, text, f"parse_failure: several verdicts: {', '.join(sorted(found))}")
    why = f"parse_failure: no verdict in {text[:60]!r}" if finished else "truncated: cut by max_tokens before a verdict"
    return Verdict(None, text, why)


class TwoRatings:
    """A judge of single answers: both are scored, the higher score wins, equal ones tie."""

    def __init__(self, judge: Scorer) -> None:
        self._judge = judge

    @classmethod
    def of(cls, section: JudgeSection, parts: Parts) -> TwoRatings:
        return cls(load_dotted(JUDGES[section.kind], where="judge").of(section, parts))

    @staticmethod
    def check(section: JudgeSection, where: str) -> None:
        load_dotted(JUDGES[section.kind], where=where).check(section, where)

    async def compare(self, item: Question, a: str, b: str) -> Verdict:
        def seed_of(objective: str, draw: int, attempt: int) -> int:
            return item.seed_of(attempt)

        asked = [Item(item.messages, item.meta, text, (item.objective,), seed_of) for text in (a, b)]
        (first,), (second,) = await together([self._judge.score(one) for one in asked])
        if first.score is None or second.score is None:
            return Verdict(None, status=(first if first.score is None else second).status)
        winner: Winner = "tie" if first.score == second.score else "a" if first.score > second.score else "b"
        return Verdict(winner, f"{first.score:g} {second.score:g}")


class FunctionPairwise:
    """A `PairwiseJudge` of the user's own, in threads or on a loop of its own as all of the user's judges are."""

    def __init__(self, judge: PairwiseJudge, name: str, *, concurrency: int, timeout_s: float) -> None:
        self._calls, self._name = Calls(judge.compare, name, concurrency=concurrency, timeout_s=timeout_s), name

    @classmethod
    def of(cls, section: Function, parts: Parts) -> FunctionPairwise | TwoRatings:
        judge, limits = load_pairwise(section, where="judge"), parts.config.generation
        if judge is None:
            return TwoRatings.of(section, parts)
        bounds: Any = {"concurrency": limits.judge_concurrency, "timeout_s": limits.judge_timeout_s}
        return cls(judge, section.name, **bounds)

    @staticmethod
    def check(section: Function, where: str) -> None:
        if load_pairwise(section, where=where) is None:
            TwoRatings.check(section, where)

    async def compare(self, item: Question, a: str, b: str) -> Verdict:
        found = await self._calls.call(item, a, b)
        if isinstance(found, str) and found in get_args(Winner):
            found = Verdict(found)  # type: ignore[arg-type]
        if not isinstance(found, Verdict) or found.winner not in (None, *get_args(Winner)):
            why = f"parse_failure: {self._name} returned {shown(found)}; 'a', 'b', 'tie' or a Verdict is needed"
            return Verdict(None, status=why)
        status = "failed: no reason given" if found.winner is None and found.status == "ok" else found.status
        return Verdict(found.winner, printable(str(found.text)), printable(str(status)))


def load_pairwise(section: Function, *, where: str) -> PairwiseJudge | None:
    """An instance of the class that a section names; None where it names a judge of single answers.

    Raises: InputError where its keys are wrong or it cannot be made.
    """
    found = load_dotted(section.name, where=where)
    if not (isinstance(found, type) and issubclass(found, PairwiseJudge)):
        return None
    try:
        return found(found.Config.model_validate(section.config))
    except ValidationError as e:
        raise InputError(f"{where}.config: {explain(e, found.Config)}") from e
    except Exception as e:  # whatever a constructor of the user's raises is about that file
        raise InputError(f"{where}: {section.name} cannot be made ({type(e).__name__}: {e})") from e


def section_of(config: Config) -> Pairwise:
    assert config.evaluation.pairwise is not None
    return config.evaluation.pairwise


class Comparisons:
    """Compares the two answers of a row on every objective, as `Episodes` runs episodes."""

    def __init__(self, judge: Comparer, objectives: Sequence[Objective], *, both_orders: bool, seed: int) -> None:
        self._judge, self._objectives, self._seed = judge, tuple(objectives), seed
        self._orders = ORDERS if both_orders else ORDERS[:1]

    async def run(self, prompt: Mapping[str, Any], *, attempt: int = 0, earlier: Completion | None = None) -> Row:
        """One prompt's verdicts. What goes wrong becomes the row's `error`, as an episode's."""
        found: list[list[Verdict]] = []

        async def play() -> None:
            works = [self._ordered(prompt, order, attempt) for order in self._orders]
            found.extend(await together(works))

        if (error := await error_of(play())) is not None:
            return error_row(prompt, error, attempt)
        rows = [_row(k, order, verdicts) for k, (order, verdicts) in enumerate(zip(self._orders, found, strict=True))]
        every = [verdict for verdicts in found for verdict in verdicts]
        return {
            **error_row(prompt, None, attempt),
            "responses": rows,
            "scores": [row["scores"] for row in rows],
            "prompt_tokens": sum(verdict.prompt_tokens for verdict in every),
            "generated_tokens": sum(verdict.generated_tokens for verdict in every),
        }

    async def score(self, answered: Mapping[str, Any], *, part: int = 0) -> Row:
        raise NotImplementedError("a comparison is no score")

    async def _ordered(self, prompt: Mapping[str, Any], order: str, attempt: int) -> list[Verdict]:
        """Objective by objective; the verdicts of the order "ba" are turned round."""
        a, b = (response["text"] for response in prompt["responses"])
        seed_id = prompt.get("seed_id") or prompt["prompt_id"]

        def seed_of(objective: str, again: int) -> int:
            place, again = ORDERS.index(order), again + 1000 * attempt
            return seed_for(self._seed, 0, seed_id, "compare", response=place, objective=objective, attempt=again)

        works = []
        for objective in self._objectives:
            item = Question(prompt["messages"], prompt["meta"], objective, partial(seed_of, objective.name))
            works.append(self._judge.compare(item, *((a, b) if order == "ab" else (b, a))))
        return await together(works)


def _row(index: int, order: str, verdicts: Sequence[Verdict]) -> Row:
    sign = 1.0 if order == "ab" else -1.0
    scores = [None if v.winner is None else sign * VALUES[v.winner] for v in verdicts]
    return {
        "index": index, "kind": order, "text": "", "token_ids": [], "system": None, "temperature": 0.0, "seed": 0,
        "finish_reason": "stop", "scores": scores, "score_draws": [[score] for score in scores],
        "score_status": [v.status for v in verdicts], "judge_texts": [v.text for v in verdicts],
        "off_scale": [None] * len(verdicts), "think_text": None,
    }  # fmt: skip
