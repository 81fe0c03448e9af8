"""An OpenAI-compatible endpoint as a config names it: where it is, what it serves, and how much may be asked of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from spa_ray.config.section import JudgeSection, Section


class Price(Section):
    """US dollars per million tokens."""

    input: float = Field(ge=0)
    output: float = Field(ge=0)

    def usd(self, prompt_tokens: float, generated_tokens: float) -> float:
        return (prompt_tokens * self.input + generated_tokens * self.output) / 1e6


class Endpoint(JudgeSection):
    """A judge behind an OpenAI-compatible API; it judges by `scoring.mode: regex`, or with `choices` by
    `choice`. Limits hold for all engines together. Keys come from the environment alone."""

    reads_prompts: ClassVar[bool] = True
    kind: Literal["endpoint"]
    base_url: str = Field(description="for example https://api.openai.com/v1")
    model: str = Field(min_length=1, description="the name that the endpoint knows it by")
    api_key_env: str | None = Field(None, description="the environment variable that holds the key; null: no key")
    choices: bool = Field(
        False,
        description="constrain what it writes to the ratings (or A, B, C), as vLLM's server does by"
        " `structured_outputs`; it is asked once before anything starts whether it obeys",
    )
    max_concurrency: int = Field(16, ge=1, description="requests at a time")
    requests_per_minute: int | None = Field(None, ge=1, description="null: no limit; retries count")
    tokens_per_minute: int | None = Field(None, ge=1, description="null: no limit; prompt and answer count")
    timeout_s: float = Field(120, gt=0, description="of one request, its answer included")
    retries: int = Field(5, ge=0, description="after 408, 409, 429, 5xx, a timeout, or an answer that is no JSON")
    cache: bool = Field(True, description="keep every answer in the run folder and never ask the same twice")
    price: Price | None = Field(None, description="for the account; null: none")

    @field_validator("base_url")
    @classmethod
    def _is_a_url(cls, url: str) -> str:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"{url!r} is no URL; it begins with http:// or https://")
        if "@" in url.partition("://")[2].partition("/")[0]:
            raise ValueError("a URL in a config holds no user or key; name the key's variable in api_key_env")
        return url.rstrip("/")

    @property
    def only_mode(self) -> str:
        return "choice" if self.choices else "regex"

    def bill(self, work: Mapping[str, float], *, seconds: float = 0.0) -> dict[str, float | None]:
        prompt, generated = work["prompt_tokens"], work["generated_tokens"]
        requests, tokens = self.requests_per_minute or math.inf, self.tokens_per_minute or math.inf
        minutes = max(work["requests"] / requests, (prompt + generated) / tokens)
        usd = None if self.price is None else round(self.price.usd(prompt, generated), 4)
        return {"usd": usd, "seconds": max(60 * minutes, work["requests"] * seconds / self.max_concurrency)}

    def key(self) -> Any:
        """Limits, prices and the like change no answer."""
        chosen = {"choices": True} if self.choices else {}
        return {"kind": self.kind, "base_url": self.base_url, "model": self.model, **chosen}
