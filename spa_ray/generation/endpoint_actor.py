"""The one Ray actor that asks a judge's endpoint for all engines of a pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from spa_ray.config.endpoint import Endpoint
from spa_ray.engine.answers import open_answers
from spa_ray.engine.openai import Answer, EndpointClient, EndpointDeadError, EndpointError
from spa_ray.generation.endpoint_judge import api_key, check_endpoint
from spa_ray.storage.files import AnyPath

ACCOUNT_SECONDS = 60.0
ERRORS: dict[str, type[Exception]] = {e.__name__: e for e in (EndpointDeadError, EndpointError, ValueError)}


class EndpointActor:
    """All requests of a pass to its endpoint: one limiter, one store of answers, one account."""

    def __init__(self, endpoint: Endpoint, key: str | None, folder: AnyPath | None) -> None:
        self._client = EndpointClient(endpoint, key, None if folder is None else open_answers(folder))

    async def ask(self, messages: list[dict[str, str]], options: dict[str, Any]) -> tuple[str, Any]:
        """("answer", it), or the name of an error and its words: an error that Ray carries brings its traceback."""
        try:
            return "answer", await self._client.ask(messages, **options)
        except (EndpointDeadError, EndpointError, ValueError) as e:
            name = next(name for name, kind in ERRORS.items() if isinstance(e, kind))
            return name, str(e)

    async def account(self) -> dict[str, float]:
        return self._client.account()


@dataclass(frozen=True)
class EndpointLine:
    """To the actor, from the driver and from engine actors."""

    handle: Any

    async def ask(self, messages: Sequence[Mapping[str, str]], **options: Any) -> Answer:
        """As `EndpointClient.ask`."""
        kind, found = await self.handle.ask.remote([dict(m) for m in messages], options)
        if kind != "answer":
            raise ERRORS[kind](found)
        answer: Answer = found
        return answer

    def account(self) -> dict[str, float]:
        account: dict[str, float] = ray.get(self.handle.account.remote(), timeout=ACCOUNT_SECONDS)
        return account


@contextmanager
def served(endpoint: Endpoint | None, folder: AnyPath) -> Iterator[EndpointLine | None]:
    """The pass's line to its endpoint, None where it has none. Answers are kept in `folder`.

    Raises: InputError where the endpoint is not there, or does not know the model or the key.
    """
    if endpoint is None:
        yield None
        return
    key = api_key(endpoint)
    check_endpoint(endpoint, key)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here,
               "max_concurrency": 10_000}  # fmt: skip
    line = EndpointLine(
        ray.remote(EndpointActor).options(**options).remote(endpoint, key, folder if endpoint.cache else None)
    )
    try:
        yield line
    finally:
        ray.kill(line.handle)
