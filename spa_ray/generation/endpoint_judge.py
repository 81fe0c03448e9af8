"""A judge behind an OpenAI-compatible endpoint: what it is asked, and how its text is read."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from spa_ray.config.endpoint import Endpoint
from spa_ray.config.rollout import Scoring
from spa_ray.engine.openai import Answer, EndpointClient
from spa_ray.generation.endpoint_check import api_key
from spa_ray.generation.judging import (
    Asked,
    Item,
    Judgement,
    Parts,
    Reading,
    Truncated,
    compile_pattern,
    judgement,
    ratings,
    read_choice,
    read_pattern,
    together,
)
from spa_ray.generation.templates import Templates
from spa_ray.objectives import Objective

Ask = Callable[..., Awaitable[Answer]]  # `EndpointClient.ask`


class EndpointJudge:
    """Free text, read by `scoring.pattern`; in mode choice one of the ratings."""

    def __init__(self, ask: Ask, templates: Templates, scoring: Scoring) -> None:
        self._ask, self._templates, self._scoring = ask, templates, scoring
        self._pattern = compile_pattern(scoring.pattern)
        self._choices = ratings(scoring.scale) if scoring.mode == "choice" else None

    @classmethod
    def of(cls, section: Endpoint, parts: Parts) -> EndpointJudge:
        ask = parts.ask or EndpointClient(section, api_key(section)).ask
        return cls(ask, parts.templates, parts.config.scoring)

    @staticmethod
    def check(section: Endpoint, where: str) -> None:
        """It is asked for its models when a pass begins."""

    async def score(self, item: Item) -> list[Judgement]:
        return await together([self._judge(item, objective) for objective in item.objectives])

    async def _judge(self, item: Item, objective: Objective) -> Judgement:
        scoring, asked = self._scoring, (item.messages, item.response, objective)
        system = self._templates.score_system(*asked)
        user = {"role": "user", "content": self._templates.score(*asked)}
        prompt = [user] if system is None else [{"role": "system", "content": system}, user]

        async def ask(draw: int, attempt: int) -> Asked:
            found = await self._ask(
                prompt,
                max_tokens=scoring.max_tokens,
                temperature=scoring.temperature,
                seed=item.seed_of(objective.name, draw, attempt),
                choices=self._choices,
                draw=draw,
                attempt=attempt,
            )
            return Asked(self._read(found), found.text, found.prompt_tokens, found.generated_tokens)

        return await judgement(ask, draws=scoring.draws, tries=1 + scoring.retries)

    def _read(self, found: Answer) -> Reading:
        finished = found.finish_reason == "stop"
        if not found.text and not finished:
            return Truncated()
        if self._choices is not None:
            return read_choice(found.text, self._choices, self._scoring.scale, finished=finished)
        return read_pattern(found.text, self._pattern, self._scoring.scale, finished=finished)
