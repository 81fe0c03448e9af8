"""The one Ray actor that asks a judge's endpoint for all engines of a pass."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from spa_ray.config.endpoint import Endpoint
from spa_ray.config.section import JudgeSection
from spa_ray.engine.answers import open_answers
from spa_ray.engine.openai import (
    Allowance,
    Answer,
    BudgetSpentError,
    EndpointClient,
    EndpointDeadError,
    EndpointError,
)
from spa_ray.generation.endpoint_check import api_key, check_endpoint
from spa_ray.storage.files import AnyPath

SIGN_OF_LIFE = 60.0  # seconds: an actor that is asked whether it is alive says so within them
ERRORS: dict[str, type[Exception]] = {
    e.__name__: e for e in (BudgetSpentError, EndpointDeadError, EndpointError, ValueError)
}


class EndpointActor:
    """All requests of a pass to its endpoint: one limiter, one store of answers, one account.

    It asks once the driver has sent the key: Ray keeps what an actor is made of in its own records, and a call's
    arguments not.
    """

    def __init__(self, endpoint: Endpoint, folder: AnyPath | None) -> None:
        self._endpoint, self._folder = endpoint, folder
        self._client: EndpointClient | None = None
        self._opened = asyncio.Event()

    async def ask(self, messages: list[dict[str, str]], options: dict[str, Any]) -> tuple[str, Any]:
        """("answer", it), or the name of an error and its words: an error that Ray carries brings its traceback."""
        await self._opened.wait()
        assert self._client is not None
        try:
            return "answer", await self._client.ask(messages, **options)
        except tuple(ERRORS.values()) as e:
            name = next(name for name, kind in ERRORS.items() if isinstance(e, kind))
            return name, str(e)

    async def account(self) -> dict[str, float]:
        return self._client.account() if self._client else {}

    async def allow(self, allowance: Allowance, key: str | None) -> None:
        if self._client is None:
            answers = None if self._folder is None else open_answers(self._folder)
            self._client = EndpointClient(self._endpoint, key, answers)
        self._client.allowance = allowance
        self._opened.set()


@dataclass(frozen=True)
class EndpointLine:
    """To the actor, from the driver and from engine actors. No wait goes on while the actor gives no sign of life.

    `key` stays with the driver.
    """

    handle: Any
    name: str
    patience: float
    key: str | None = field(default=None, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return EndpointLine, (self.handle, self.name, self.patience)

    async def ask(self, messages: Sequence[Mapping[str, str]], **options: Any) -> Answer:
        """As `EndpointClient.ask`."""
        kind, found = await self._patiently(self.handle.ask.remote([dict(m) for m in messages], options))
        if kind != "answer":
            raise ERRORS[kind](found)
        answer: Answer = found
        return answer

    async def _patiently(self, asked: ray.ObjectRef) -> Any:
        """A request may wait long for its turn, as long as the actor is there. Raises: EndpointDeadError."""
        answer = asyncio.wrap_future(asked.future())
        try:
            while not (await asyncio.wait({answer}, timeout=self.patience))[0]:
                await asyncio.wait_for(asyncio.wrap_future(self.handle.account.remote().future()), self.patience)
            return await answer
        except ray.exceptions.RayTaskError:
            raise  # the actor lives, and this is a defect of its code
        except (TimeoutError, ray.exceptions.RayError) as e:
            raise self._lost(e) from e
        finally:
            answer.cancel()

    def account(self) -> dict[str, float]:
        """`EndpointClient.account`, of the actor's present life. Raises: EndpointDeadError."""
        try:
            account: dict[str, float] = ray.get(self.handle.account.remote(), timeout=self.patience)
        except ray.exceptions.RayError as e:  # a timeout is one
            raise self._lost(e) from e
        return account

    def allow(self, allowance: Allowance) -> None:
        """From the driver, once a second: an actor that was started again asks nothing before."""
        self.handle.allow.remote(allowance, self.key)

    def _lost(self, error: BaseException) -> EndpointDeadError:
        return EndpointDeadError(
            f"{self.name} gave no sign of life within {self.patience:g} s ({type(error).__name__}); its log is "
            "in Ray's log folder on the driver's node"
        )


@contextmanager
def served(
    judge: JudgeSection | None, folder: AnyPath, allowance: Allowance | None = None
) -> Iterator[EndpointLine | None]:
    """The pass's line to its judge's endpoint, None where it has none. Answers are kept in `folder`.

    Raises: InputError where the endpoint is not there, or does not know the model or the key.
    """
    if not isinstance(judge, Endpoint):
        yield None
        return
    key = api_key(judge)
    check_endpoint(judge, key)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here,
               "max_concurrency": 10_000}  # fmt: skip
    handle = ray.remote(EndpointActor).options(**options).remote(judge, folder if judge.cache else None)
    name = f"endpoint actor {handle._actor_id.hex()}, which asks {judge.base_url},"
    line = EndpointLine(handle, name, SIGN_OF_LIFE, key)
    line.allow(allowance or Allowance())
    try:
        yield line
    finally:
        ray.kill(line.handle)
