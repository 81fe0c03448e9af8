"""An OpenAI-compatible server on loopback that behaves as it is told, and counts what it is asked."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

Act = Callable[[int, dict[str, Any]], Any]  # (number of the request from 0, its body) -> a reply


@dataclass
class FakeEndpoint:
    """`act` gives the text of an answer, or a tuple (status, headers, body), or "hang"."""

    act: Act = lambda number, body: "[[7]]"
    models: tuple[str, ...] = ("judge",)
    key: str | None = None
    delay: float = 0.0
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)
    inside: int = 0
    most_inside: int = 0

    async def _models(self, request: web.Request) -> web.Response:
        if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": {"message": "no such key"}}, status=401)
        return web.json_response({"data": [{"id": name} for name in self.models]})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        number = len(self.bodies)
        body = await request.json()
        self.bodies.append(body)
        self.times.append(time.monotonic())
        self.keys.add(request.headers.get("Authorization"))
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        try:
            if self.delay:
                await asyncio.sleep(self.delay)
            if body["model"] not in self.models:
                message = {"message": f"The model `{body['model']}` does not exist"}
                return web.json_response({"error": message}, status=404)
            reply = self.act(number, body)
            if reply == "hang":
                await asyncio.sleep(60)
            if isinstance(reply, tuple):
                status, headers, text = reply
                return web.Response(status=status, headers=headers, text=text, content_type="application/json")
            return web.Response(text=json.dumps(completion(reply)), content_type="application/json")
        finally:
            self.inside -= 1


def completion(text: str | None, finish_reason: str = "stop") -> dict[str, Any]:
    return {
        "id": "c",
        "object": "chat.completion",
        "created": 0,
        "model": "judge",
        "choices": [{"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12},
    }


@contextmanager
def running(fake: FakeEndpoint) -> Iterator[FakeEndpoint]:
    """The server, on a thread of its own."""
    loop = asyncio.new_event_loop()
    ready = threading.Event()

    runners: list[web.AppRunner] = []

    async def serve() -> None:
        app = web.Application()
        app.add_routes([web.get("/v1/models", fake._models), web.post("/v1/chat/completions", fake._chat)])
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        runners.append(runner)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        ready.set()

    serving = loop.create_task(serve())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield fake
    finally:
        assert serving.done()
        asyncio.run_coroutine_threadsafe(runners[0].cleanup(), loop).result(70)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
