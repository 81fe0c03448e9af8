"""How fast one endpoint may be asked: requests and tokens per minute, over all who ask it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

WINDOW = 60.0  # seconds


class Limiter:
    """At most so many requests and tokens within any minute. Who comes first goes first.

    A request that alone has more tokens than a minute may goes when the minute before it is empty.
    """

    def __init__(self, requests: int | None, tokens: int | None, *, now: Callable[[], float] = time.monotonic) -> None:
        self._requests, self._tokens, self._now = requests, tokens, now
        self._sent: deque[tuple[float, int]] = deque()  # when, and its tokens
        self._held_until = 0.0
        self._turn = asyncio.Lock()

    async def admit(self, tokens: int) -> None:
        """Return when a request of so many tokens may be sent."""
        async with self._turn:
            while (wait := self.wait(tokens)) > 0:
                await asyncio.sleep(wait)
            self._sent.append((self._now(), tokens))

    def hold(self, seconds: float) -> None:
        """Send nothing for so long: the endpoint asked for it (Retry-After)."""
        self._held_until = max(self._held_until, self._now() + seconds)

    def wait(self, tokens: int) -> float:
        """Seconds until a request of so many tokens may be sent, as things are; 0: now."""
        now = self._now()
        while self._sent and self._sent[0][0] <= now - WINDOW:
            self._sent.popleft()
        until = self._held_until
        if self._requests is not None and len(self._sent) >= self._requests:
            until = max(until, self._sent[-self._requests][0] + WINDOW)
        if self._tokens is not None:
            room = self._tokens - tokens
            used = sum(spent for _, spent in self._sent)
            for at, spent in self._sent:
                if used <= max(room, 0):
                    break
                until, used = max(until, at + WINDOW), used - spent
        return max(0.0, until - now)
