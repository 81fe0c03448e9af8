"""An OpenAI-compatible endpoint: one answer per request, with limits, retries, kept answers and an account.

One object serves all engines of a pass. What cannot be had is an error, never an answer.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from spa_ray.config.endpoint import Endpoint
from spa_ray.engine.answers import Answers
from spa_ray.engine.limiter import Limiter
from spa_ray.errors import RunError

LOGGER = logging.getLogger(__name__)
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between tries; doubled each time, with jitter
DEAD_AFTER = 3  # requests that failed for good, one after the other, with no answer between
CHARS_PER_TOKEN = 3  # for the limit of tokens, before the endpoint has counted; and where it counts none
TURN_TOKENS = 32  # the most that a chat template adds to a message
RETRIED = frozenset({408, 409, 429})  # and all of 5xx
FINAL = frozenset({401, 403, 404})  # the key, the address or the model's name is wrong
SHOWN = 200  # characters of an endpoint's own words


class EndpointDeadError(RunError):
    """The endpoint cannot be asked any more: wrong key or model, quota used up, or nothing but failures."""


class BudgetSpentError(RunError):
    """What a run may spend is used up, or the next request could use up more."""


class EndpointError(RuntimeError):
    """One request got no answer, after all its retries."""


@dataclass(frozen=True)
class Answer:
    """What the endpoint wrote. Tokens are as it counts them."""

    text: str
    finish_reason: str
    prompt_tokens: int
    generated_tokens: int


@dataclass(frozen=True)
class Allowance:
    """What requests may cost, with all that the client has spent; None: no bound."""

    usd: float | None = None
    tokens: float | None = None

    def beside(self, account: Mapping[str, float]) -> Allowance:
        """The same, of a client that has spent so much already."""
        spent = account.get("prompt_tokens", 0) + account.get("generated_tokens", 0)
        usd = None if self.usd is None else self.usd + account.get("usd", 0.0)
        return Allowance(usd, None if self.tokens is None else self.tokens + spent)


class EndpointClient:
    """See the module. `key` is the API key; it is in no message and no log."""

    def __init__(
        self,
        endpoint: Endpoint,
        key: str | None,
        answers: Answers | None = None,
        allowance: Allowance | None = None,
    ) -> None:
        from openai import AsyncOpenAI

        self._endpoint, self._answers = endpoint, answers
        self._client = AsyncOpenAI(
            base_url=endpoint.base_url, api_key=key or "none", max_retries=0, timeout=endpoint.timeout_s
        )
        self._limiter = Limiter(endpoint.requests_per_minute, endpoint.tokens_per_minute)
        self._places = asyncio.Semaphore(endpoint.max_concurrency)
        self._asked: dict[str, asyncio.Future[Answer]] = {}
        self._failures = 0  # since the last answer
        self._dead: EndpointDeadError | None = None
        self._account: Counter[str] = Counter()
        self._under_way: Counter[str] = Counter()  # the most tokens that unanswered requests may come to
        self.allowance = allowance or Allowance()

    async def ask(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        max_tokens: int,
        temperature: float,
        seed: int,
        choices: Sequence[str] | None = None,
        draw: int = 0,
        attempt: int = 0,
    ) -> Answer:
        """The answer to these messages, kept under the request, `draw` and `attempt`. `choices` constrains it to one of
        these texts, where the endpoint knows vLLM's `structured_outputs`.

        Raises: EndpointDeadError; EndpointError after the last retry; ValueError for what the endpoint refuses (400);
        BudgetSpentError, before anything is sent, where the answer might cost more than `allowance`.
        """
        request = {"model": self._endpoint.model, "messages": [dict(m) for m in messages], "max_tokens": max_tokens,
                   "temperature": temperature}  # fmt: skip
        if choices is not None:
            request["extra_body"] = constrained(choices)
        key = _key({**request, "base_url": self._endpoint.base_url, "draw": draw, "attempt": attempt})
        if (running := self._asked.get(key)) is not None:  # two prompts with the same answer, say
            return await asyncio.shield(running)
        task = asyncio.ensure_future(self._answer(key, {**request, "seed": seed % 2**31}))
        self._asked[key] = task
        task.add_done_callback(lambda done: self._forget(key, done))
        return await asyncio.shield(task)  # who asked may go away: the answer is kept all the same

    def account(self) -> dict[str, float]:
        """Requests, retries, kept answers, tokens and US dollars since this object was made."""
        names = ("requests", "retries", "cached", "prompt_tokens", "generated_tokens")
        account: dict[str, float] = {name: self._account[name] for name in names}
        if self._endpoint.price is not None:
            account["usd"] = self._usd(self._account)
        return account

    def _usd(self, tokens: Mapping[str, int]) -> float:
        price = self._endpoint.price
        return 0.0 if price is None else price.usd(tokens["prompt_tokens"], tokens["generated_tokens"])

    @contextmanager
    def _reserved(self, request: Mapping[str, Any]) -> Iterator[None]:
        """Hold back the most that the request may cost while it is under way: a token has a byte at least."""
        prompt = sum(len(m["content"].encode()) + TURN_TOKENS for m in request["messages"])
        most = {"prompt_tokens": prompt, "generated_tokens": request["max_tokens"]}
        self._under_way.update(most)
        try:
            worst, allowed = self._account + self._under_way, self.allowance
            tokens = worst["prompt_tokens"] + worst["generated_tokens"]
            for key, cost, bound in (("usd", self._usd(worst), allowed.usd), ("tokens", tokens, allowed.tokens)):
                if bound is not None and cost > bound:
                    raise BudgetSpentError(f"what is left of budget.{key} may not be enough for one more request")
            yield
        finally:
            self._under_way.subtract(most)

    def _forget(self, key: str, done: asyncio.Future[Answer]) -> None:
        self._asked.pop(key, None)
        if not done.cancelled():
            done.exception()  # marks it as seen: those who asked may all have gone

    async def _answer(self, key: str, request: Mapping[str, Any]) -> Answer:
        if self._answers is not None and (kept := await self._answers.get(key)) is not None:
            self._account["cached"] += 1
            return Answer(**kept)
        async with self._places:
            with self._reserved(request):
                return await self._tried(key, request)

    async def _tried(self, key: str, request: Mapping[str, Any]) -> Answer:
        estimate = _tokens(request["messages"]) + request["max_tokens"]
        why, wait = "", 0.0
        for number in range(self._endpoint.retries + 1):
            await asyncio.sleep(wait)
            await self._limiter.admit(estimate)
            if self._dead is not None:
                raise self._dead
            self._account["requests"] += 1
            self._account["retries"] += number > 0
            try:
                answer = await asyncio.wait_for(self._once(request), self._endpoint.timeout_s)
            except Exception as e:  # noqa: BLE001 sorted there: what is not worth another try is raised again
                why, wait = self._sort(e, number)
                LOGGER.warning("endpoint: %s; again in %.1f s", why, wait)
                continue
            self._failures = 0
            if self._answers is not None:
                await self._answers.put(key, asdict(answer))
            return answer
        self._failures += 1
        tries = f"{self._endpoint.retries + 1} tries"
        if self._failures >= DEAD_AFTER:
            raise self._die(f"{self._failures} requests failed after {tries} each, none was answered between; {why}")
        raise EndpointError(f"endpoint {self._endpoint.base_url}: no answer in {tries}; the last: {why}")

    async def _once(self, request: Mapping[str, Any]) -> Answer:
        found = await self._client.chat.completions.create(**request)
        choice = found.choices[0]
        text, used = choice.message.content, found.usage
        prompt = _tokens(request["messages"]) if used is None else used.prompt_tokens
        generated = _tokens([{"content": text or ""}]) if used is None else used.completion_tokens
        self._account.update(prompt_tokens=prompt, generated_tokens=generated)
        if text is None:
            raise TypeError(f"an answer without text (finish_reason {choice.finish_reason})")
        # No reason is not "stop": what may have been cut is read as if it was.
        return Answer(text, choice.finish_reason or "unknown", prompt, generated)

    def _sort(self, error: Exception, number: int) -> tuple[str, float]:
        """What went wrong, and the seconds to wait. Raises: EndpointDeadError, ValueError where no try can help."""
        import openai

        why = self._words(error)
        backoff = min(FIRST_WAIT * 2**number, LONGEST_WAIT) * random.uniform(0.5, 1.0)
        if isinstance(error, openai.APIStatusError):
            status, why = error.status_code, f"status {error.status_code}: {why}"
            if status in FINAL or getattr(error, "code", None) == "insufficient_quota":
                raise self._die(why) from error
            if status not in RETRIED and status < 500:
                raise ValueError(f"the endpoint refuses the request: {why}") from error
            asked = _retry_after(error.response.headers.get("retry-after"))
            if asked is not None:
                self._limiter.hold(min(asked, self._endpoint.timeout_s))
            return why, 0.0 if asked is not None else backoff
        if isinstance(error, TimeoutError | openai.APITimeoutError):
            return f"no answer within {self._endpoint.timeout_s:g} s", backoff
        if isinstance(error, openai.APIConnectionError):
            return f"no connection ({self._words(error.__cause__ or error)})", backoff
        # An answer that is no JSON, or not an answer's: what the client raises then differs.
        if not isinstance(error, ValueError | TypeError | AttributeError | LookupError | openai.APIError):
            raise error
        return f"an answer that cannot be read ({type(error).__name__}: {why})", backoff

    def _words(self, error: BaseException) -> str:
        """An error's first line; an endpoint that quotes the key is not repeated."""
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return lines[0].replace(self._client.api_key, "***")[:SHOWN]

    def _die(self, why: str) -> EndpointDeadError:
        self._dead = EndpointDeadError(f"endpoint {self._endpoint.base_url}, model {self._endpoint.model}: {why}")
        return self._dead


def constrained(choices: Sequence[str]) -> dict[str, Any]:
    """The part of a request's body that holds an answer to one of these texts."""
    return {"structured_outputs": {"choice": list(choices)}}


def _tokens(messages: Sequence[Mapping[str, str]]) -> int:
    """About how many, where the endpoint has not counted."""
    return sum(len(m["content"]) for m in messages) // CHARS_PER_TOKEN


def _key(request: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def _retry_after(value: str | None) -> float | None:
    """Seconds; a date, which few endpoints send, counts as none."""
    try:
        return max(0.0, float(value)) if value else None
    except ValueError:
        return None
