"""One prompt's episode as a plain coroutine: sample n, score all, refine, score the refined answer.

Comes in: a row of PROMPTS. Goes out: a row of EPISODES. No barrier between the steps: each candidate is scored as soon
as it is there. What goes wrong with one prompt is recorded in its `error`; only the engine's death is raised.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from spa_ray.engine.protocol import Completion, Engine, Request
from spa_ray.generation.chat import Chat
from spa_ray.generation.judging import Judge, Judgement
from spa_ray.generation.seeds import seed_for
from spa_ray.generation.templates import Templates
from spa_ray.objectives import Objective

Row = dict[str, Any]


@dataclass(frozen=True)
class Draw:
    """How answers are sampled."""

    temperature: float
    top_p: float
    max_tokens: int
    role: str  # part of the seed: sample, refine or answer


@dataclass(frozen=True)
class Recipe:
    """What an episode consists of. `refine` None: the candidates are all (an evaluation)."""

    objectives: tuple[Objective, ...]
    n: int
    sample: Draw
    systems: tuple[str | None, ...]
    refine: Draw | None
    refine_system: str | None
    resample_duplicates: bool
    seed: int
    iteration: int


@dataclass
class _Response:
    index: int
    kind: str
    completion: Completion
    system: str | None
    temperature: float
    seed: int
    judgements: list[Judgement] = field(default_factory=list)

    def row(self) -> Row:
        return {
            "index": self.index,
            "kind": self.kind,
            "text": self.completion.text,
            "token_ids": self.completion.token_ids,
            "system": self.system,
            "temperature": self.temperature,
            "seed": self.seed,
            "finish_reason": self.completion.finish_reason,
            "scores": [j.score for j in self.judgements],
            "score_draws": [j.draws for j in self.judgements],
            "score_status": [j.status for j in self.judgements],
            "judge_texts": [j.text for j in self.judgements],
            "off_scale": [j.off_scale for j in self.judgements],
        }


class Episodes:
    """Runs episodes of one recipe on one engine. Holds no state between prompts."""

    def __init__(self, engine: Engine, chat: Chat, templates: Templates, judge: Judge | None, recipe: Recipe) -> None:
        self._engine, self._chat, self._templates = engine, chat, templates
        self._judge, self._recipe = judge, recipe

    async def run(self, prompt: Mapping[str, Any], *, attempt: int = 0, earlier: Completion | None = None) -> Row:
        """One episode. `earlier`, the last iteration's refined answer, joins the candidates (`reuse_refined`).

        Never raises but for EngineDeadError: a prompt too long for the context and the like become the row's `error`.
        """
        episode = _Episode(self, prompt, attempt)
        return episode.row(await _error_of(episode.play(earlier)))

    async def score(self, answered: Mapping[str, Any]) -> Row:
        """The same row with its responses scored anew (by another model than the one that answered)."""
        if answered["error"] is not None:
            return dict(answered)
        episode = _Episode(self, answered, answered["attempt"])
        episode.responses = [_given(response) for response in answered["responses"]]
        episode.prompt_tokens, episode.generated_tokens = answered["prompt_tokens"], answered["generated_tokens"]
        return episode.row(await _error_of(episode.score_all()))


class _Episode:
    """One prompt on its way."""

    def __init__(self, house: Episodes, prompt: Mapping[str, Any], attempt: int) -> None:
        self.house, self.recipe = house, house._recipe
        self.prompt_id, self.messages, self.meta = prompt["prompt_id"], prompt["messages"], prompt["meta"]
        self.attempt = attempt
        self.responses: list[_Response] = []
        self.prompt_tokens = self.generated_tokens = 0

    async def play(self, earlier: Completion | None) -> None:
        recipe = self.recipe
        prompts = [self.house._chat.prompt_ids(self.messages, self._system(i)) for i in range(recipe.n)]
        longest = max(map(len, prompts))
        if longest + recipe.sample.max_tokens > self.house._engine.max_model_len:
            raise ValueError(
                f"prompt too long: {longest} tokens and {recipe.sample.max_tokens} of answer exceed the context of "
                f"{self.house._engine.max_model_len}"
            )
        first = await asyncio.gather(*(self._sample(i, ids) for i, ids in enumerate(prompts)))
        self.responses = await self._without_duplicates(first, prompts)
        if earlier is not None:
            self.responses.append(_Response(recipe.n, "candidate", earlier, None, 0.0, 0))
        await self.score_all()
        if recipe.refine is not None:
            await self._refine(recipe.refine)

    def row(self, error: str | None) -> Row:
        responses = [response.row() for response in self.responses] if error is None else []
        return {
            "prompt_id": self.prompt_id,
            "messages": self.messages,
            "meta": self.meta,
            "responses": responses,
            "scores": [response["scores"] for response in responses],
            "error": error,
            "attempt": self.attempt,
            "prompt_tokens": self.prompt_tokens,
            "generated_tokens": self.generated_tokens,
        }

    # --- sampling ---------------------------------------------------------------------------------------------------

    def _system(self, index: int) -> str | None:
        systems = self.recipe.systems
        return systems[index % len(systems)]

    async def _sample(self, index: int, prompt: list[int], again: int = 0) -> _Response:
        draw = self.recipe.sample
        seed = self._seed(draw.role, response=index, attempt=again)
        completion = await self._ask(prompt, draw, seed)
        return _Response(index, "candidate", completion, self._system(index), draw.temperature, seed)

    async def _without_duplicates(self, responses: Sequence[_Response], prompts: list[list[int]]) -> list[_Response]:
        """Every exact repetition of an earlier candidate is sampled once more; what still repeats stays as it is."""
        if not self.recipe.resample_duplicates:
            return list(responses)
        seen: set[str] = set()
        repeated = []
        for response in responses:
            if response.completion.text in seen:
                repeated.append(response.index)
            seen.add(response.completion.text)
        fresh = await asyncio.gather(*(self._sample(i, prompts[i], again=1) for i in repeated))
        replaced = {response.index: response for response in fresh}
        return [replaced.get(response.index, response) for response in responses]

    async def _ask(self, prompt: list[int], draw: Draw, seed: int) -> Completion:
        request = Request(
            prompt_ids=prompt, max_tokens=draw.max_tokens, temperature=draw.temperature, top_p=draw.top_p, seed=seed
        )
        completion = await self.house._engine.generate(request)
        self.prompt_tokens += len(prompt)
        self.generated_tokens += len(completion.token_ids)
        return completion

    async def score_all(self) -> None:
        await asyncio.gather(*(self._score(response) for response in self.responses))

    # --- scoring ----------------------------------------------------------------------------------------------------

    async def _score(self, response: _Response) -> None:
        judge, text = self.house._judge, response.completion.text
        if judge is None:
            return
        response.judgements = list(
            await asyncio.gather(
                *(
                    judge.judge(self.messages, self.meta, text, o, partial(self._judge_seed, response.index, o.name))
                    for o in self.recipe.objectives
                )
            )
        )
        self.generated_tokens += sum(j.generated_tokens for j in response.judgements)

    def _judge_seed(self, index: int, objective: str, draw: int, again: int) -> int:
        return self._seed("score", response=index, objective=objective, draw=draw, attempt=again)

    def _seed(self, role: str, **where: Any) -> int:
        where["attempt"] = where.get("attempt", 0) + 1000 * self.attempt
        return seed_for(self.recipe.seed, self.recipe.iteration, self.prompt_id, role, **where)

    # --- refinement -------------------------------------------------------------------------------------------------

    async def _refine(self, draw: Draw) -> None:
        """Write one better answer over all scored candidates and score it; there is none without a scored one."""
        candidates = [_listed(r, self.recipe.objectives) for r in self.responses if _scored(r)]
        if not candidates:
            return
        prompt = self._refine_prompt(candidates, draw)
        index = len(self.responses)
        seed = self._seed(draw.role, response=index)
        completion = await self._ask(prompt, draw, seed)
        refined = _Response(index, "refined", completion, self.recipe.refine_system, draw.temperature, seed)
        self.responses.append(refined)
        await self._score(refined)

    def _refine_prompt(self, candidates: list[Row], draw: Draw) -> list[int]:
        """Where the context is too small, the lexicographically lowest candidates are left out of the prompt only."""
        names = [o.name for o in self.recipe.objectives]
        left = list(candidates)
        while True:
            text = self.house._templates.refine(self.messages, left)
            prompt = self.house._chat.prompt_ids([{"role": "user", "content": text}], self.recipe.refine_system)
            if len(prompt) + draw.max_tokens <= self.house._engine.max_model_len:
                return prompt
            if len(left) == 1:
                raise ValueError(f"refinement prompt too long: {len(prompt)} tokens with a single candidate")
            left.remove(min(left, key=lambda c: tuple(c["scores"][name] for name in names)))


async def _error_of(work: Awaitable[None]) -> str | None:
    """What was wrong with this prompt, None when nothing was; what is wrong with the engine is raised."""
    try:
        await work
    except ValueError as e:
        return str(e)
    return None


def _given(response: Mapping[str, Any]) -> _Response:
    completion = Completion(response["text"], list(response["token_ids"]), response["finish_reason"])
    where = (response["index"], response["kind"])
    return _Response(*where, completion, response["system"], response["temperature"], response["seed"])


def _scored(response: _Response) -> bool:
    return all(j.score is not None for j in response.judgements)


def _listed(response: _Response, objectives: Sequence[Objective]) -> Row:
    """A candidate as the refinement template sees it; whole scores are shown as whole numbers."""
    scores = {
        o.name: int(j.score) if j.score is not None and j.score.is_integer() else j.score
        for o, j in zip(objectives, response.judgements, strict=True)
    }
    return {"text": response.completion.text, "scores": scores}
