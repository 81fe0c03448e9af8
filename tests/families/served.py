"""vLLM as the package starts it, driven step by step in the tests' own process; one engine at a time."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from spa_ray.config.models import Model
from spa_ray.engine.protocol import Request
from spa_ray.engine.vllm_engine import sampling_params
from spa_ray.engine.vllm_start import start_vllm
from spa_ray.rollout.chat import chat_of
from spa_ray.rollout.settings import ChatSettings
from tests.families.table import CONTEXT

FAST_START = {"max_num_batched_tokens": 1024, "max_num_seqs": 16, "kv_cache_memory_bytes": 1 << 26}


@dataclass(frozen=True)
class Played:
    """`rendered` are prompts' ids by vLLM's tokenizer, `forced` the log-probs of every token but the first per
    sequence, `greedy` and `drawn` the answers to the prompts with their finish reasons."""

    rendered: list[list[int]]
    forced: list[list[float]]
    greedy: list[tuple[list[int], str]]
    drawn: list[tuple[list[int], str]]


def play(
    folder: Path,
    settings: ChatSettings,
    conversations: Sequence[list[dict[str, str]]],
    sequences: Sequence[list[int]],
    prompts: Sequence[list[int]],
) -> Played:
    """All that is asked of vLLM for one family."""
    with served(folder) as engine:
        chat = chat_of(engine.get_tokenizer(), folder, settings)
        draws = [Request(list(p), max_tokens=64, temperature=1.0, seed=s) for s in range(8) for p in prompts]
        return Played(
            rendered=[chat.prompt_ids(messages) for messages in conversations],
            forced=prompt_logps(engine, sequences),
            greedy=answers(engine, [Request(list(p), max_tokens=64, temperature=0.0, seed=0) for p in prompts]),
            drawn=answers(engine, draws),
        )


def play_apart(*arguments: Any) -> Played:
    """In a process of its own. vLLM's transformers backend changes transformers' model classes where it runs, so that
    the same process can compare nothing with them."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(play, *arguments).result()


@contextmanager
def served(folder: Path) -> Iterator[Any]:
    """An engine over the folder, gone afterwards."""
    import torch
    from vllm.distributed import cleanup_dist_env_and_memory

    model = Model(path=str(folder), dtype="float32", max_model_len=CONTEXT, engine_kwargs=FAST_START)
    threads = torch.get_num_threads()
    engine = start_vllm(model, folder, verbose=False)
    try:
        yield engine
    finally:
        with patch("torch.distributed.destroy_process_group"):  # it is the tests' own and is kept
            engine.engine_core.shutdown()
            del engine
            cleanup_dist_env_and_memory()
        gc.unfreeze()  # vLLM freezes what lives when an engine starts
        gc.collect()
        torch.set_num_threads(threads)


def prompt_logps(engine: Any, sequences: Sequence[list[int]]) -> list[list[float]]:
    """Teacher-forced: log-probs of every token but the first, per sequence."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
    outputs = _drive(engine, [(ids, params) for ids in sequences])
    return [
        [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]
        for output, ids in zip(outputs, sequences, strict=True)
    ]


def answers(engine: Any, requests: Sequence[Request]) -> list[tuple[list[int], str]]:
    """Token ids and finish reason per request, by the package's own sampling parameters."""
    outputs = _drive(engine, [(r.prompt_ids, sampling_params(r)) for r in requests])
    return [(list(output.outputs[0].token_ids), output.outputs[0].finish_reason) for output in outputs]


def _drive(engine: Any, work: Sequence[tuple[list[int], Any]]) -> list[Any]:
    for number, (ids, params) in enumerate(work):
        engine.add_request(str(number), {"type": "token", "prompt_token_ids": list(ids)}, params)
    done = {}
    while engine.has_unfinished_requests():
        done.update({output.request_id: output for output in engine.step() if output.finished})
    return [done[str(number)] for number in range(len(work))]
