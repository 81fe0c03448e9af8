"""What benchmarks/sensing.py runs in fresh processes: the two ways of sensing, and the generation beside them.

Each takes prompts as ids and gives seconds for all of them, after a first few that warm it up, and its start-up. The
tests compare the scores of the two ways.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Ids = Sequence[Sequence[int]]
WARM = 8  # prompts


class Pooled:
    """Hidden states by vLLM's pooling engine: the last token's, after the final norm, not normalised."""

    def __init__(self, folder: Path, dtype: str) -> None:
        from spa_ray.engine.vllm_start import prepare_environment

        prepare_environment()
        from vllm import LLM
        from vllm.config import PoolerConfig

        pooler = PoolerConfig(seq_pooling_type="LAST", use_activation=False)
        self._llm = LLM(
            model=str(folder), dtype=dtype, runner="pooling", convert="embed", pooler_config=pooler,
            enable_prefix_caching=False,
        )  # fmt: skip

    def hidden(self, prompts: Ids) -> list[list[float]]:
        asked: Any = [{"prompt_token_ids": list(ids)} for ids in prompts]
        return [output.outputs.embedding for output in self._llm.embed(asked, use_tqdm=False)]


def pooled_scores(folder: Path, dtype: str, prompts: Ids) -> list[list[float]]:
    """By vLLM and the folder's own head."""
    return _pooling(folder, dtype)(prompts)


def sensed_scores(folder: Path, dtype: str, prompts: Ids) -> list[list[float]]:
    """By the sensor that passes use."""
    return _transformers(folder, dtype)(prompts)


def time_pooling(folder: Path, dtype: str, prompts: Ids) -> dict[str, float]:
    return _timed(lambda: _pooling(folder, dtype), prompts)


def time_transformers(folder: Path, dtype: str, prompts: Ids) -> dict[str, float]:
    return _timed(lambda: _transformers(folder, dtype), prompts)


def time_generation(folder: Path, dtype: str, prompts: Ids, *, tokens: int, at_once: int) -> dict[str, float]:
    """Answers of exactly so many tokens by the engine of a pass, so many prompts in flight."""

    def start() -> Callable[[Ids], Any]:
        from spa_ray.config.models import Model
        from spa_ray.engine.protocol import Request
        from spa_ray.engine.vllm_requests import sampling_params
        from spa_ray.engine.vllm_start import start_vllm

        section = Model(path=str(folder), dtype=dtype, engine_kwargs={"max_num_seqs": at_once})  # type: ignore[arg-type]
        engine = start_vllm(section, folder, verbose=False)

        def generate(given: Ids) -> None:
            for number, ids in enumerate(given):
                request = Request(prompt_ids=list(ids), max_tokens=tokens, temperature=0.6, seed=number, top_p=0.9)
                params = sampling_params(request, None, rows=engine.vllm_config.use_v2_model_runner)
                params.ignore_eos = True
                engine.add_request(str(number), {"type": "token", "prompt_token_ids": list(ids)}, params)
            while engine.has_unfinished_requests():
                engine.step()

        return generate

    return _timed(start, prompts)


def _timed(start: Callable[[], Callable[[Ids], Any]], prompts: Ids) -> dict[str, float]:
    began = time.perf_counter()
    work = start()
    started = time.perf_counter()
    work(prompts[:WARM])
    warm = time.perf_counter()
    work(prompts)
    return {"startup_seconds": started - began, "seconds": time.perf_counter() - warm}


def _pooling(folder: Path, dtype: str) -> Callable[[Ids], list[list[float]]]:
    import torch

    from spa_ray.steering.asking import conditioning

    method = conditioning(folder)
    assert method is not None
    pooled, head = Pooled(folder, dtype), method.load(folder)

    def scores(prompts: Ids) -> list[list[float]]:
        with torch.inference_mode():
            found: list[list[float]] = method.sense(head, torch.tensor(pooled.hidden(prompts))).tolist()
        return found

    return scores


def _transformers(folder: Path, dtype: str) -> Callable[[Ids], list[list[float]]]:
    import torch

    from spa_ray.config.models import Model
    from spa_ray.steering.asking import conditioning
    from spa_ray.steering.sensor import Sensor, chunks

    method = conditioning(folder)
    assert method is not None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    section = Model(path=str(folder), dtype=dtype)  # type: ignore[arg-type]
    sensor = Sensor(section, folder, method, device=device)

    def scores(prompts: Ids) -> list[list[float]]:
        found: dict[int, list[float]] = {}
        for places in chunks({at: len(ids) for at, ids in enumerate(prompts)}):
            found |= zip(places, sensor.scores([prompts[at] for at in places]), strict=True)
        return [found[at] for at in range(len(prompts))]

    return scores
