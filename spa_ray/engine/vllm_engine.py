"""vLLM in this process, stepped by a thread of its own.

Comes in: `Request`s from any event loop. Goes out: `Completion`s; one wake-up of the loop for all that a step finished.
The engine thread alone touches vLLM. If it dies, or finishes no step for too long, which a third thread watches, every
pending and later request gets `EngineDeadError`: nobody waits for what cannot come. Without a step an engine may take
`generation.stall_timeout_s`, and while it loads other weights as long as for its start, `generation.start_timeout_s`.
"""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

from spa_ray.config.models import Generation, Model
from spa_ray.engine.protocol import Completion, EngineDeadError, EngineStats, Request
from spa_ray.engine.vllm_requests import before_stop, continuation_logprobs, sampling_params, special_tokens
from spa_ray.engine.vllm_start import reason, start_vllm

SWAP = "swap"  # an exchange of weights among the pending jobs, whose other names are numbers
IDLE_SECONDS = 0.1  # how often an engine without work says that it lives


class VLLMEngine:
    """One vLLM engine. Construct it where its model shall live; `shutdown` ends it."""

    def __init__(self, model: Model, folder: Path, limits: Generation | None = None, *, verbose: bool = False) -> None:
        """Load the model. Raises: InputError when vLLM refuses it for good, naming vLLM's reason; RuntimeError for what
        a later start may not meet."""
        limits = limits or Generation()
        self._stall_s, self._swap_s, self._swapping = limits.stall_timeout_s, limits.start_timeout_s, False
        self._engine: Any  # made and used by the engine thread
        self._inbox: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._pending: dict[str, _Job] = {}
        self._numbers = itertools.count()
        self._words: dict[int, str] = {}  # token -> its text, of answers of one token
        self._dead: str | None = None
        self._last_step = time.monotonic()
        self._first: float | None = None  # when the first request came
        self._busy = 0.0  # seconds in vLLM's steps
        self._done = 0
        self._tokens = 0  # of finished requests
        self._ended = threading.Event()
        loaded: Future[Any] = Future()
        start = partial(start_vllm, model, folder, verbose=verbose)
        self._thread = threading.Thread(target=self._serve, args=(start, loaded), name="vllm-engine", daemon=True)
        self._thread.start()
        loaded.result()
        self.tokenizer: Any = self._engine.get_tokenizer()
        self.max_model_len: int = self._engine.model_config.max_model_len
        threading.Thread(target=self._watch, name="vllm-watch", daemon=True).start()

    async def generate(self, request: Request) -> Completion:
        given = len(request.prompt_ids) + len(request.continuation_ids or ())
        if given + request.max_tokens > self.max_model_len:
            raise ValueError(
                f"{given} prompt tokens and {request.max_tokens} more exceed the context of {self.max_model_len}"
            )
        return self._completion(request, await self._submit(request=request))

    async def load_weights(self, model: Path) -> None:
        await self._submit(weights=model)

    def stats(self) -> EngineStats:
        now = time.monotonic()
        alive = now - self._first if self._first is not None else 0.0
        stalled = now - self._last_step if self._pending and not self._swapping else 0.0
        return EngineStats(self._done, self._busy, alive, stalled, self._tokens + self._tokens_in_flight())

    def _tokens_in_flight(self) -> int:
        states = list(self._engine.output_processor.request_states.values())
        return sum(state.detokenizer.num_output_tokens() for state in states if state.detokenizer is not None)

    def shutdown(self) -> None:
        self._ended.set()
        self._inbox.put(None)
        self._thread.join(timeout=30)
        self._engine.engine_core.shutdown()

    def _submit(self, **what: Any) -> asyncio.Future[Any]:
        job = _Job(asyncio.get_running_loop(), **what)
        self._inbox.put(job)
        if self._dead:  # asked last: whoever died before may have emptied the inbox already
            job.future.cancel()
            raise EngineDeadError(self._dead)
        return job.future

    def _completion(self, request: Request, answered: Any) -> Completion:
        output = answered.outputs[0]
        if output.finish_reason not in ("stop", "length"):  # aborted, or an error inside vLLM: no answer of the model
            raise RuntimeError(f"vLLM ended the request with {output.finish_reason!r}")
        if request.continuation_ids is not None:
            return Completion("", [], "stop", continuation_logprobs=continuation_logprobs(request, answered))
        ids = list(output.token_ids)
        if request.stop and isinstance(output.stop_reason, str):
            ids = before_stop(self.tokenizer, ids, output.stop_reason)
        labels = None
        if request.label_ids is not None:
            first = output.logprobs[0]
            labels = tuple(first[token].logprob for token in request.label_ids)
        complete = output.finish_reason == "stop" or request.choice_ids is not None
        reason: Literal["stop", "length"] = "stop" if complete else "length"
        return Completion(text=self._text(ids), token_ids=ids, finish_reason=reason, label_logprobs=labels)

    def _text(self, ids: list[int]) -> str:
        if len(ids) != 1:
            return str(self.tokenizer.decode(ids, skip_special_tokens=True))
        if ids[0] not in self._words:
            self._words[ids[0]] = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        return self._words[ids[0]]

    def _watch(self) -> None:
        """On a thread of its own: one deadline for all requests, whoever waits for them."""
        while self._thread.is_alive() and not self._ended.wait(min(1.0, self._stall_s / 4)):
            swapping, idle = self._swapping, time.monotonic() - self._last_step
            if swapping and idle > self._swap_s:
                self._die(f"vLLM: other weights were not loaded in {idle:.0f} s (generation.start_timeout_s)")
                return
            if not swapping and idle > self._stall_s:
                self._die(f"vLLM: no step finished for {idle:.0f} s (generation.stall_timeout_s)")
                return

    # --- the engine thread ------------------------------------------------------------------------------------------

    def _serve(self, start: Callable[[], Any], loaded: Future[Any]) -> None:
        """Loads vLLM as well: on the CPU, OpenMP keeps one team of threads for each thread that ever computed, and once
        they outnumber the cores they no longer wait for each other awake (a fifth of the throughput on two cores).
        """
        try:
            self._engine = start()
        except BaseException as e:  # noqa: BLE001 it is raised where the engine is constructed
            loaded.set_exception(e)
            return
        self._last_step = time.monotonic()
        loaded.set_result(self._engine)
        try:
            while self._take_in():
                if self._engine.has_unfinished_requests():
                    began = time.monotonic()
                    outputs = self._engine.step()
                    self._last_step = time.monotonic()
                    self._busy += self._last_step - began
                    self._hand_out(outputs)
            self._die("vLLM: the engine was shut down")
        except Exception as e:  # whatever killed it, the waiting requests must hear of it
            self._die(f"vLLM: the engine died ({type(e).__name__}: {e})")
            raise

    def _take_in(self) -> bool:
        """Move all waiting jobs into vLLM; waits for one when there is nothing to do. False: shut down."""
        busy = self._engine.has_unfinished_requests()
        while True:
            try:
                job = self._inbox.get_nowait() if busy else self._inbox.get(timeout=IDLE_SECONDS)
            except queue.Empty:
                self._last_step = self._last_step if busy else time.monotonic()
                return True
            if job is None:
                return False
            if job.weights is not None:
                self._swap(job)
            else:
                self._add(job)
                busy = True

    def _add(self, job: _Job) -> None:
        from vllm.exceptions import VLLMClientError

        assert job.request is not None
        number = str(next(self._numbers))
        try:
            stops = special_tokens(self.tokenizer, job.request.stop) if job.request.stop else None
            params = sampling_params(job.request, stops, rows=self._engine.vllm_config.use_v2_model_runner)
            ids = [*job.request.prompt_ids, *(job.request.continuation_ids or ())]
            self._engine.add_request(number, {"type": "token", "prompt_token_ids": ids}, params)
        except (ValueError, VLLMClientError) as e:  # this request is at fault, not the engine
            job.fail(ValueError(f"vLLM: {reason(e)}"))
            return
        self._pending[number] = job
        self._first = self._first or time.monotonic()

    def _swap(self, job: _Job) -> None:
        self._pending[SWAP] = job  # whoever waits for it hears of the engine's death as well
        while self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            self._last_step = time.monotonic()
            self._hand_out(outputs)
        self._last_step, self._swapping = time.monotonic(), True
        try:
            self._engine.collective_rpc("reload_weights", kwargs={"weights_path": str(job.weights)})
            if not self._engine.reset_prefix_cache():
                raise RuntimeError("the prefix cache of the old weights could not be emptied")
        finally:
            self._last_step = time.monotonic()
            self._swapping = False
        if self._pending.pop(SWAP, None) is not None:  # not given up meanwhile
            job.finish(None)

    def _hand_out(self, outputs: list[Any]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Job, Any]]] = defaultdict(list)
        for output in outputs:
            if output.finished:
                job = self._pending.pop(output.request_id, None)
                if job is not None:  # not given up meanwhile
                    self._done += 1
                    self._tokens += len(output.outputs[0].token_ids)
                    by_loop[job.loop].append((job, output))
        for loop, finished in by_loop.items():
            _call_in(loop, partial(_resolve_all, finished))

    def _die(self, why: str) -> None:
        """Called by either thread."""
        self._dead = why
        waiting = [self._pending.pop(number, None) for number in list(self._pending)]
        with suppress(queue.Empty):
            while True:
                waiting.append(self._inbox.get_nowait())
        for job in waiting:
            if job is not None:
                job.fail(EngineDeadError(why))


class _Job:
    """A request, or an exchange of weights, and the future of the loop that waits for it."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, *, request: Request | None = None, weights: Path | None = None
    ) -> None:
        self.loop, self.request, self.weights = loop, request, weights
        self.future: asyncio.Future[Any] = loop.create_future()

    def resolve(self, value: Any) -> None:
        """On the loop's own thread."""
        if not self.future.done():
            self.future.set_result(value)

    def finish(self, value: Any) -> None:
        _call_in(self.loop, lambda: self.resolve(value))

    def fail(self, error: Exception) -> None:
        _call_in(self.loop, lambda: None if self.future.done() else self.future.set_exception(error))


def _resolve_all(finished: list[tuple[_Job, Any]]) -> None:
    for job, value in finished:
        job.resolve(value)


def _call_in(loop: asyncio.AbstractEventLoop, action: Callable[[], Any]) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(action)
