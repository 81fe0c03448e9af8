"""One prompt's episode as a plain coroutine: sample n, score all, refine, score the refined answer.

Comes in: a row of PROMPTS. Goes out: a row of EPISODES. Each candidate is scored as soon as it is settled (its text
and those of the candidates before it are known). What goes wrong with one prompt is recorded in its `error` as
`KIND: what`: `prompt_too_long`, `refused` (by engine or template), and, worth another try, `internal` (anything else),
`timeout` and `engine_died` (recorded by the actor). Only the death of the engine or
of the judge's endpoint is raised.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from spa_ray.config.rollout import Decoding
from spa_ray.data.schemas import STEERED
from spa_ray.engine.openai import BudgetSpentError, EndpointDeadError
from spa_ray.engine.protocol import Completion, Engine, EngineDeadError, Request
from spa_ray.generation.judging import Compared, Item, Judgement, Scorer, together
from spa_ray.generation.seeds import seed_for
from spa_ray.generation.templates import Templates
from spa_ray.logs import printable
from spa_ray.objectives import Objective
from spa_ray.rollout.chat import Chat

if TYPE_CHECKING:
    from spa_ray.generation.ranking import Ranker

Row = dict[str, Any]


RENDER = "render"  # a row's function from messages to what its model reads, where that is something else
UNFINISHED = "truncated: the answer was cut within its thinking, before it began"
RETRYABLE = ("internal", "timeout", "engine_died")  # kinds of error that another try may not meet


class PromptTooLongError(ValueError):
    """The prompt and the answer's room exceed the context."""


@dataclass(frozen=True)
class Draw:
    """How answers are sampled. `role` is part of the seed: sample, refine or answer."""

    decoding: Decoding
    role: str
    attempts: int = 1

    @property
    def temperature(self) -> float:
        return self.decoding.temperature

    @property
    def max_tokens(self) -> int:
        return self.decoding.max_tokens

    def request(self, prompt_ids: list[int], seed: int) -> Request:
        settings = {name: getattr(self.decoding, name) for name in Decoding.model_fields}
        return Request(prompt_ids=prompt_ids, seed=seed, **settings)


@dataclass(frozen=True)
class Recipe:
    """What an episode consists of. `refine` None: the candidates are all (an evaluation)."""

    objectives: tuple[Objective, ...]
    n: int
    sample: Draw
    systems: tuple[str | None, ...]
    refine: Draw | None
    resample_duplicates: bool
    seed: int
    iteration: int


@dataclass
class Response:
    """One answer on its way to a row."""

    index: int
    kind: str
    completion: Completion
    system: str | None
    temperature: float
    seed: int
    think_text: str | None = None
    unfinished: bool = False  # cut within its thinking: there is no answer
    uncut: bool = False  # an answer that a data set brought, as text: its tokens are training's to cut
    judgements: list[Judgement] = field(default_factory=list)

    def row(self) -> Row:
        return {
            "index": self.index,
            "kind": self.kind,
            "text": self.completion.text,
            "token_ids": None if self.uncut else self.completion.token_ids,
            "system": self.system,
            "temperature": self.temperature,
            "seed": self.seed,
            "finish_reason": self.completion.finish_reason,
            "scores": [j.score for j in self.judgements],
            "score_draws": [j.draws for j in self.judgements],
            "score_status": [j.status for j in self.judgements],
            "judge_texts": [j.text for j in self.judgements],
            "off_scale": [j.off_scale for j in self.judgements],
            "think_text": self.think_text,
        }


class Episodes:
    """Runs episodes of one recipe on one engine. Holds no state between prompts."""

    def __init__(
        self,
        engine: Engine,
        chat: Chat,
        templates: Templates,
        judge: Scorer | None,
        recipe: Recipe,
        *,
        refine_chat: Chat | None = None,
        ranker: Ranker | None = None,
    ) -> None:
        """`refine_chat` renders the refinement's prompt, where that has settings of its own. `ranker` scores answers by
        comparing them, in the judge's place."""
        self._engine, self._chat, self._templates = engine, chat, templates
        self._judge, self._recipe, self._refine_chat = judge, recipe, refine_chat or chat
        self._ranker = ranker

    async def run(self, prompt: Mapping[str, Any], *, attempt: int = 0, earlier: Completion | None = None) -> Row:
        """One episode. `earlier`, the last iteration's refined answer, joins the candidates (`reuse_refined`).

        Never raises but for EngineDeadError: a prompt too long for the context and the like become the row's `error`.
        """
        episode = _Episode(self, prompt, attempt)
        return episode.row(await error_of(episode.play(earlier)))

    async def score(self, answered: Mapping[str, Any], *, part: int = 0) -> Row:
        """The same row with its responses scored anew (by another model than the one that answered); `part` counts the
        tries of that."""
        if answered["error"] is not None:
            return dict(answered)
        episode = _Episode(self, answered, answered["attempt"] + part)
        episode.responses = [_given(response) for response in answered["responses"]]
        episode.prompt_tokens, episode.generated_tokens = answered["prompt_tokens"], answered["generated_tokens"]
        return episode.row(await error_of(episode.score_all()))


class _Episode:
    """One prompt on its way."""

    def __init__(self, house: Episodes, prompt: Mapping[str, Any], attempt: int) -> None:
        self.house, self.recipe = house, house._recipe
        self.prompt, self.messages, self.meta = prompt, prompt["messages"], prompt["meta"]
        self.seed_id = prompt.get("seed_id") or prompt["prompt_id"]  # the same for a prompt that several models answer
        self.attempt = attempt
        self.responses: list[Response] = []
        self.prompt_tokens = self.generated_tokens = 0

    async def play(self, earlier: Completion | None) -> None:
        recipe = self.recipe
        read = as_read(self.prompt, self.messages)
        prompts = [self.house._chat.prompt_ids(read, self._system(i)) for i in range(recipe.n)]
        longest = max(map(len, prompts))
        if longest + recipe.sample.max_tokens > self.house._engine.max_model_len:
            raise PromptTooLongError(
                f"{longest} tokens and {recipe.sample.max_tokens} of answer exceed the context of "
                f"{self.house._engine.max_model_len}"
            )
        drawn: list[asyncio.Future[str]] = [asyncio.get_running_loop().create_future() for _ in prompts]
        settled: list[Coroutine[Any, Any, Response]] = [self._candidate(i, ids, drawn) for i, ids in enumerate(prompts)]
        if earlier is not None:
            settled.append(self._scored(Response(recipe.n, "candidate", earlier, None, 0.0, 0)))
        self.responses = await together(settled)
        await self._rank()
        if recipe.refine is not None:
            await self._refine(recipe.refine)

    def row(self, error: str | None) -> Row:
        spent = {"prompt_tokens": self.prompt_tokens, "generated_tokens": self.generated_tokens}
        if error is not None:
            return {**error_row(self.prompt, error, self.attempt), **spent}
        responses = [response.row() for response in self.responses]
        scores = [response["scores"] for response in responses]
        return {**error_row(self.prompt, None, self.attempt), "responses": responses, "scores": scores, **spent}

    # --- sampling ---------------------------------------------------------------------------------------------------

    def _system(self, index: int) -> str | None:
        systems = self.recipe.systems
        return systems[index % len(systems)]

    async def _sample(self, index: int, prompt: list[int], again: int = 0) -> Response:
        draw = self.recipe.sample
        seed = self._seed(draw.role, response=index, attempt=again)
        completion = await self._ask(prompt, draw, seed)
        response = Response(index, "candidate", completion, self._system(index), draw.temperature, seed)
        return thought(response, self.house._chat)

    async def _candidate(self, index: int, prompt: list[int], drawn: list[asyncio.Future[str]]) -> Response:
        """A candidate, sampled and scored. The exact repetition of an earlier one is sampled once more; what still
        repeats stays as it is. Only first draws are compared, so the outcome is the same in any order of completion.
        """
        response = await self._sample(index, prompt)
        drawn[index].set_result(response.completion.text)
        if self.recipe.resample_duplicates:
            for other in drawn[:index]:
                if await other == response.completion.text:
                    response = await self._sample(index, prompt, again=1)
                    break
        return await self._scored(response)

    async def _ask(self, prompt: list[int], draw: Draw, seed: int) -> Completion:
        completion = await self.house._engine.generate(draw.request(prompt, seed))
        self.prompt_tokens += len(prompt)
        self.generated_tokens += len(completion.token_ids)
        return completion

    async def score_all(self) -> None:
        await together([self._scored(response) for response in self.responses])

    # --- scoring ----------------------------------------------------------------------------------------------------

    async def _scored(self, response: Response) -> Response:
        judge, text = self.house._judge, response.completion.text
        if judge is None:
            return response
        if response.unfinished:
            response.judgements = [Judgement(None, UNFINISHED) for _ in self.recipe.objectives]
            return response
        if self.house._ranker is not None:  # all are ranked together
            return response
        seed_of = partial(self._judge_seed, response.index)
        item = Item(self.messages, self.meta, text, self.recipe.objectives, seed_of)
        return self._judged(response, await judge.score(item))

    def _judged(self, response: Response, judgements: list[Judgement]) -> Response:
        response.judgements = judgements
        self.prompt_tokens += sum(j.prompt_tokens for j in judgements)
        self.generated_tokens += sum(j.generated_tokens for j in judgements)
        return response

    async def _rank(self) -> None:
        """Score all candidates by comparing them, where that is asked for."""
        if (ranker := self.house._ranker) is not None:
            ranked = {r.index: r for r in self.responses if not r.unfinished}
            answers = {index: r.completion.text for index, r in ranked.items()}
            for index, judgements in (await ranker.rank(self._compared(), answers)).items():
                self._judged(ranked[index], judgements)

    async def _refined(self, response: Response, scored: list[Response]) -> Response:
        """The refined answer scored: by itself, or by comparing it with the best of the candidates."""
        ranker = self.house._ranker
        if ranker is None or response.unfinished:
            return await self._scored(response)
        best = max(scored, key=lambda r: math.fsum(_scores(r)))
        texts, n = (response.completion.text, best.completion.text), sum(not r.unfinished for r in self.responses)
        places = await ranker.place(self._compared(), response.index, texts[0], best.index, texts[1], _scores(best), n)
        return self._judged(response, places)

    def _compared(self) -> Compared:
        def seed_of(index: int, objective: str, draw: int, again: int) -> int:
            return self._seed("compare", response=index, objective=objective, draw=draw, attempt=again)

        return Compared(self.messages, self.meta, seed_of)

    def _judge_seed(self, index: int, objective: str, draw: int, again: int) -> int:
        return self._seed("score", response=index, objective=objective, draw=draw, attempt=again)

    def _seed(self, role: str, **where: Any) -> int:
        where["attempt"] = where.get("attempt", 0) + 1000 * self.attempt
        return seed_for(self.recipe.seed, self.recipe.iteration, self.seed_id, role, **where)

    # --- refinement -------------------------------------------------------------------------------------------------

    async def _refine(self, draw: Draw) -> None:
        """Write one better answer over all scored candidates and score it; there is none without a scored one. A
        further attempt has the seeds of a further answer."""
        scored = [r for r in self.responses if _has_scores(r)]
        if not scored:
            return
        prompt, system = self._refine_prompt([_listed(r, self.recipe.objectives) for r in scored], draw)
        best = [max(found) for found in zip(*map(_scores, scored), strict=True)]
        index, tried = len(self.responses), []
        for again in range(draw.attempts):
            seed = self._seed(draw.role, response=index + again)
            completion = await self._ask(prompt, draw, seed)
            refined = Response(index + again, "refined", completion, system, draw.temperature, seed)
            tried.append(await self._refined(thought(refined, self.house._refine_chat), scored))
            if all(a > b for a, b in zip(_scores(tried[-1]), best, strict=True)):
                break
        # Of equal ones the first, and one without all its scores only where no other is.
        kept = max(tried, key=lambda r: (_has_scores(r), _scores(r)))
        kept.index = index
        self.responses.append(kept)

    def _refine_prompt(self, candidates: list[Row], draw: Draw) -> tuple[list[int], str | None]:
        """Where the context is too small, the lexicographically lowest candidates are left out of the prompt only."""
        names = [o.name for o in self.recipe.objectives]
        left = list(candidates)
        while True:
            text = self.house._templates.refine(self.messages, left)
            system = self.house._templates.refine_system(self.messages, left)
            prompt = self.house._refine_chat.prompt_ids([{"role": "user", "content": text}], system)
            if len(prompt) + draw.max_tokens <= self.house._engine.max_model_len:
                return prompt, system
            if len(left) == 1:
                raise PromptTooLongError(
                    f"refinement: {len(prompt)} tokens with a single candidate and {draw.max_tokens} of answer exceed "
                    f"the context of {self.house._engine.max_model_len}"
                )
            left.remove(min(left, key=lambda c: tuple(c["scores"][name] for name in names)))


def error_row(prompt: Mapping[str, Any], error: str | None, attempt: int) -> Row:
    """A row of EPISODES without responses."""
    return {
        "prompt_id": prompt["prompt_id"],
        "messages": prompt["messages"],
        "meta": prompt["meta"],
        "responses": [],
        "scores": [],
        "error": None if error is None else printable(error),  # a user's exception may hold what Arrow cannot
        "attempt": attempt,
        "prompt_tokens": 0,
        "generated_tokens": 0,
        **{name: prompt[name] for name in STEERED.names if name in prompt},
    }


def as_read(prompt: Mapping[str, Any], messages: Sequence[Mapping[str, str]]) -> Sequence[Mapping[str, str]]:
    """Messages as the model that answers reads them. Judges see them as they are."""
    render = prompt.get(RENDER)
    return messages if render is None else render(messages)


async def error_of(work: Awaitable[None]) -> str | None:
    """What was wrong with this prompt, None when nothing was; the engine's death is raised."""
    try:
        await work
    except (EngineDeadError, EndpointDeadError, BudgetSpentError):
        raise
    except PromptTooLongError as e:
        return f"prompt_too_long: {e}"
    except ValueError as e:
        return f"refused: {e}"
    except Exception as e:  # noqa: BLE001 one row's failure (a user's judge or template, say) must not end the pass
        return f"internal: {type(e).__name__}: {e}"
    return None


def _given(response: Mapping[str, Any]) -> Response:
    ids = response["token_ids"]
    completion = Completion(response["text"], list(ids or ()), response["finish_reason"])
    where = (response["index"], response["kind"])
    thought = response.get("think_text")
    unfinished = thought is not None and not response["text"]
    how = (response["system"], response["temperature"], response["seed"])
    return Response(*where, completion, *how, think_text=thought, unfinished=unfinished, uncut=ids is None)


def thought(response: Response, chat: Chat) -> Response:
    """The response without its thinking, which is kept as `think_text`. Its ids lose it as well, unless `model.think`
    is mask: then they stay, and training gives them no weight."""
    completion = response.completion
    if not chat.thinks:
        return response
    parts = chat.divide(completion.token_ids)
    if parts.thinking is None:
        return response
    ids = completion.token_ids if chat.settings.think == "mask" else parts.ids
    reason = completion.finish_reason if parts.closed else "length"
    response.completion = Completion(parts.text, ids, reason)
    response.think_text, response.unfinished = parts.thinking, not parts.closed
    return response


def _has_scores(response: Response) -> bool:
    return all(j.score is not None for j in response.judgements)


def _scores(response: Response) -> list[float]:
    """In objective order, a failed judgement below every score."""
    return [-math.inf if j.score is None else j.score for j in response.judgements]


def _listed(response: Response, objectives: Sequence[Objective]) -> Row:
    """A candidate as the refinement template sees it, with the sum of its scores; whole scores are shown as whole
    numbers."""
    scores = {
        o.name: int(j.score) if j.score is not None and j.score.is_integer() else j.score
        for o, j in zip(objectives, response.judgements, strict=True)
    }
    return {"text": response.completion.text, "scores": scores, "total": math.fsum(_scores(response))}
