"""vLLM in this process, stepped by a thread of its own.

Comes in: `Request`s from any event loop. Goes out: `Completion`s; one wake-up of the loop for all that a step finished.
The engine thread alone touches vLLM. If it dies, or finishes no step for too long, which a third thread watches, every
pending and later request gets `EngineDeadError`: nobody waits for what cannot come.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
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

from spa_ray.config.models import Model
from spa_ray.engine.placement import executor_backend
from spa_ray.engine.protocol import Completion, EngineDeadError, EngineStats, Request
from spa_ray.errors import InputError

STALL_SECONDS = 300.0  # without one finished step: the engine counts as dead
IDLE_SECONDS = 0.1  # how often an engine without work says that it lives
CPU_KV_GIB = "2"


class VLLMEngine:
    """One vLLM engine. Construct it where its model shall live; `shutdown` ends it."""

    def __init__(self, model: Model, folder: Path, *, verbose: bool = False) -> None:
        """Load the model. Raises: InputError when vLLM refuses it, naming vLLM's reason."""
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
        self._ended = threading.Event()
        loaded: Future[Any] = Future()
        start = partial(_start_vllm, model, folder, verbose=verbose)
        self._thread = threading.Thread(target=self._serve, args=(start, loaded), name="vllm-engine", daemon=True)
        self._thread.start()
        loaded.result()
        self.tokenizer: Any = self._engine.get_tokenizer()
        self.max_model_len: int = self._engine.model_config.max_model_len
        threading.Thread(target=self._watch, name="vllm-watch", daemon=True).start()

    async def generate(self, request: Request) -> Completion:
        if len(request.prompt_ids) + request.max_tokens > self.max_model_len:
            raise ValueError(
                f"{len(request.prompt_ids)} prompt tokens and {request.max_tokens} more exceed the context of "
                f"{self.max_model_len}"
            )
        return self._completion(request, await self._submit(request=request))

    async def load_weights(self, model: Path) -> None:
        await self._submit(weights=model)

    def stats(self) -> EngineStats:
        now = time.monotonic()
        alive = now - self._first if self._first is not None else 0.0
        stalled = now - self._last_step if self._pending else 0.0
        return EngineStats(self._done, self._busy, alive, stalled)

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

    def _completion(self, request: Request, output: Any) -> Completion:
        if output.finish_reason not in ("stop", "length"):  # aborted, or an error inside vLLM: no answer of the model
            raise RuntimeError(f"vLLM ended the request with {output.finish_reason!r}")
        ids = list(output.token_ids)
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
        while self._thread.is_alive() and not self._ended.wait(min(1.0, STALL_SECONDS / 4)):
            idle = time.monotonic() - self._last_step
            if idle > STALL_SECONDS:
                self._die(f"vLLM: no step finished for {idle:.0f} s (limit {STALL_SECONDS:.0f} s)")
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
            params = sampling_params(job.request)
            self._engine.add_request(number, {"type": "token", "prompt_token_ids": job.request.prompt_ids}, params)
        except (ValueError, VLLMClientError) as e:  # this request is at fault, not the engine
            job.fail(ValueError(f"vLLM: {_first_line(e)}"))
            return
        self._pending[number] = job
        self._first = self._first or time.monotonic()

    def _swap(self, job: _Job) -> None:
        while self._engine.has_unfinished_requests():
            self._hand_out(self._engine.step())
        self._engine.collective_rpc("reload_weights", kwargs={"weights_path": str(job.weights)})
        if not self._engine.reset_prefix_cache():
            raise RuntimeError("the prefix cache of the old weights could not be emptied")
        self._last_step = time.monotonic()
        job.finish(None)

    def _hand_out(self, outputs: list[Any]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Job, Any]]] = defaultdict(list)
        for output in outputs:
            if output.finished:
                job = self._pending.pop(output.request_id, None)
                if job is not None:  # not given up meanwhile
                    self._done += 1
                    by_loop[job.loop].append((job, output.outputs[0]))
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


def sampling_params(request: Request) -> Any:
    """vLLM's `SamplingParams` of a request."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    # One-token choices need no grammar and no end token: one masked step, 1.6 times the requests a second.
    single = None if request.choice_ids is None else list(request.choice_ids)
    constrained = request.choices is not None and single is None
    return SamplingParams(
        max_tokens=1 if single else request.max_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        seed=request.seed,
        allowed_token_ids=single,
        structured_outputs=StructuredOutputsParams(choice=list(request.choices or ())) if constrained else None,
        logprob_token_ids=list(request.label_ids) if request.label_ids else None,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_clone=True,  # nobody else holds it
    )


def _start_vllm(model: Model, folder: Path, *, verbose: bool) -> Any:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", CPU_KV_GIB)
    if not verbose:
        os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
        os.environ["VLLM_CONFIGURE_LOGGING"] = "1"
        logging.getLogger("vllm").setLevel(logging.ERROR)
    from vllm import EngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.llm_engine import LLMEngine

    try:
        # As vLLM's own offline class: its defaults are the wide batches that throughput wants.
        arguments = EngineArgs(**engine_arguments(model, folder))
        loggers = None if arguments.disable_log_stats else _stat_loggers()
        return LLMEngine.from_engine_args(arguments, usage_context=UsageContext.LLM_CLASS, stat_loggers=loggers)
    except (ValueError, TypeError) as e:  # vLLM's own checks of model and arguments
        raise InputError(f"model {folder}: vLLM refuses it: {_first_line(e)}") from e


def _stat_loggers() -> list[Any] | None:
    """vLLM's own metrics on Ray's Prometheus endpoint, where this process is Ray's."""
    import ray

    if not ray.is_initialized():
        return None
    from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger

    return [RayPrometheusStatLogger]


def engine_arguments(model: Model, folder: Path) -> dict[str, Any]:
    """vLLM's `EngineArgs` for a model's config section."""
    return {
        "model": str(folder),
        "dtype": model.dtype,
        "tensor_parallel_size": model.tensor_parallel_size,
        "distributed_executor_backend": executor_backend(model),
        "max_model_len": model.max_model_len,
        "trust_remote_code": model.trust_remote_code,
        # The tokenizer and config.json that transformers reads, also where Mistral's own files are beside them.
        "tokenizer_mode": "hf",
        "config_format": "hf",
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "load_format": "safetensors",
        "generation_config": "vllm",  # the model's own sampling defaults must not override the config's
        **_platform_arguments(model),
        **model.engine_kwargs,
    }


def _platform_arguments(model: Model) -> dict[str, Any]:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return {}
    # A seeded request whose prefill is chunked kills the CPU engine: prompts must be prefilled whole.
    budget = max(16384, model.max_model_len or 0)
    # Only whole blocks of a prompt are shared, and vLLM's block on the CPU is 128 tokens: longer than many a prefix.
    blocks = {"block_size": 32}
    return {"enable_chunked_prefill": False, "max_num_batched_tokens": budget, "enforce_eager": True, **blocks}


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
