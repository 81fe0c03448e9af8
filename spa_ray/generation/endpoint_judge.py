"""A judge behind an OpenAI-compatible endpoint: what it is asked, how its text is read, and a look at it beforehand."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import Any

from spa_ray.config.endpoint import Endpoint
from spa_ray.config.rollout import Scoring
from spa_ray.engine.openai import RETRIED, Answer, EndpointClient, constrained
from spa_ray.errors import InputError, RunError
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
from spa_ray.logs import printable
from spa_ray.objectives import Objective

Ask = Callable[..., Awaitable[Answer]]  # `EndpointClient.ask`
CHECK_SECONDS = 10.0
CHECK_CHOICES = ("moss", "flint")  # what no model would answer by itself


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


def api_key(endpoint: Endpoint) -> str | None:
    """Raises: InputError where the variable that holds the key is not set."""
    if endpoint.api_key_env is None:
        return None
    key = os.environ.get(endpoint.api_key_env)
    if not key:
        raise InputError(f"the environment has no {endpoint.api_key_env}, which api_key_env of a judge names")
    return key


def check_endpoint(endpoint: Endpoint, key: str | None) -> None:
    """One look at the endpoint's list of models, where it has one, and with `choices` one constrained answer.

    Raises: InputError where the model, the key or `choices` does not fit; RunError while nobody answers.
    """
    where = f"the endpoint {endpoint.base_url}"
    found = _look(endpoint, key, "GET", "models")
    if found.status_code in (401, 403):
        raise InputError(f"{where} refuses the key (status {found.status_code}); see api_key_env")
    try:
        names = [model["id"] for model in found.json()["data"]] if found.status_code == 200 else []
    except (ValueError, KeyError, TypeError):  # no list of models: the first request will tell
        names = []
    if names and endpoint.model not in names:
        raise InputError(f"{where} serves no model {endpoint.model!r}; it serves {', '.join(map(str, names[:10]))}")
    if endpoint.choices:
        _check_choices(endpoint, key, where)


def _check_choices(endpoint: Endpoint, key: str | None, where: str) -> None:
    asked = [{"role": "user", "content": "Count from one to three."}]
    body = {"model": endpoint.model, "messages": asked, "max_tokens": 16, "temperature": 0.0, "seed": 0}
    found = _look(endpoint, key, "POST", "chat/completions", json={**body, **constrained(CHECK_CHOICES)})
    if found.status_code in RETRIED or found.status_code >= 500:
        raise RunError(f"{where} gives no answer (status {found.status_code}); run the same command again later")
    try:
        said = found.json()["choices"][0]["message"]["content"] if found.status_code == 200 else found.text
    except (ValueError, LookupError, TypeError):
        said = found.text
    if said not in CHECK_CHOICES:
        told = f"status {found.status_code}, {printable(str(said))[:60]!r}"
        raise InputError(
            f"{where} does not hold its answers to given texts ({told}); set choices: false and scoring.mode=regex, "
            "which reads free text by scoring.pattern"
        )


def _look(endpoint: Endpoint, key: str | None, method: str, path: str, **body: Any) -> Any:
    """Raises: RunError where nobody answers."""
    import httpx

    url, headers = f"{endpoint.base_url}/{path}", {} if key is None else {"Authorization": f"Bearer {key}"}
    try:
        return httpx.request(
            method, url, headers=headers, timeout=endpoint.timeout_s if body else CHECK_SECONDS, **body
        )
    except httpx.HTTPError as e:
        told = f"{endpoint.base_url} gives no answer ({type(e).__name__}: {e})"
        raise RunError(f"the endpoint {told}; start it, or change base_url") from e
