"""What the benchmarks share: fresh processes, memory readings, length distributions, a model made on the spot.

Goes out: plain numbers and folders. Never: a measurement of its own, and nothing heavy at import: each measured process
imports what it measures and nothing else.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np

P = ParamSpec("P")
T = TypeVar("T")
MIB = 2**20
PAD, BOS, EOS, FIRST_ID = 0, 1, 2, 3  # ids of the tokenizer below; random ids start after its special tokens

# Prompts and answers of preference data in tokens: median and σ of the logarithm, then the bounds.
PROMPTS = (70.0, 0.6, 20, 200)
ANSWERS = (180.0, 0.7, 20, 600)
MAX_LENGTH = PROMPTS[3] + ANSWERS[3]


def in_fresh_process(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run it in an interpreter of its own, whose peak memory is therefore its own; what it prints goes to stderr."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_enter) as pool:
        return pool.submit(work, *args, **kwargs).result()


def _enter() -> None:
    os.dup2(2, 1)
    # One GPU: a trainer that sees several would spread over them, unasked.
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1"}


def progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def report(**sections: Any) -> None:
    """The one JSON object of a benchmark, on stdout."""
    print(json.dumps(sections, indent=1, default=str))


def resident_mib() -> float:
    """What this process has in memory now."""
    return _status("VmRSS")


def peak_resident_mib() -> float:
    """The most that this process ever had. `ru_maxrss` would say the same, but it counts the parent's peak as well."""
    return _status("VmHWM")


def _status(name: str) -> float:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(f"{name}:"))
    return int(line.split()[1]) / 1024


def peak_memory_mib() -> float:
    """The peak so far: what torch has allocated on a GPU, else the process's resident size."""
    import torch

    return torch.cuda.max_memory_allocated() / MIB if torch.cuda.is_available() else peak_resident_mib()


def finish_queued_work() -> None:
    """Wait for the GPU, so that a clock that is read next is right."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def environment() -> dict[str, Any]:
    """Where and with what this runs. Imports torch: call it in a fresh process."""
    import torch

    import spa_ray

    cuda = torch.cuda.is_available()
    installed = [name for name in ("torch", "transformers", "deepspeed", "trl") if find_spec(name)]
    ram = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    memory = torch.cuda.get_device_properties(0).total_memory if cuda else ram
    return {
        "device": torch.cuda.get_device_name() if cuda else _cpu_name(),
        "cuda": cuda,
        "cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "memory_gib": round(memory / 2**30, 1),
        "python": platform.python_version(),
        "versions": {"spa_ray": spa_ray.__version__} | {name: version(name) for name in installed},
    }


def _cpu_name() -> str:
    names = [x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    return names[0] if names else platform.processor()


def log_normal(
    rng: np.random.Generator, shape: int | tuple[int, ...], median: float, sigma: float, low: int, high: int
) -> np.ndarray:
    """Token counts with this median and this σ of the logarithm, clipped."""
    return _lengths(rng.standard_normal(shape), median, sigma, low, high)


def answer_lengths(rng: np.random.Generator, pairs: int, correlation: float) -> np.ndarray:
    """(pairs, 2) token counts; `correlation` is that of a pair's two log-lengths, before the clipping."""
    common, own = rng.standard_normal((pairs, 1)), rng.standard_normal((pairs, 2))
    return _lengths(np.sqrt(correlation) * common + np.sqrt(1 - correlation) * own, *ANSWERS)


def _lengths(normal: np.ndarray, median: float, sigma: float, low: int, high: int) -> np.ndarray:
    return np.clip(np.rint(median * np.exp(sigma * normal)), low, high).astype(np.int64)


def llama(*, hidden: int, layers: int, vocab: int, seed: int) -> Any:
    """A randomly initialised Llama: heads of 32 (64 from width 512 on), grouped by 4 where that divides."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = hidden // (64 if hidden >= 512 else 32)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4 if heads % 4 == 0 else heads,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).float()


def number_tokenizer(vocab: int) -> Any:
    """A tokenizer whose word «123» is the token 123, so that random ids have texts and survive the way back."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = {"<pad>": PAD, "<s>": BOS, "</s>": EOS}
    words = specials | {str(i): i for i in range(FIRST_ID, vocab)}
    core = Tokenizer(models.WordLevel(words, unk_token=str(FIRST_ID)))
    core.pre_tokenizer = pre_tokenizers.Whitespace()  # «<pad>» in a text is three words
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %} {{ m['content'] }}{% endfor %}"
    return tokenizer


def use_all_cores() -> None:
    """The thread count that spa_ray's own workers choose, for whatever is compared with them."""
    from spa_ray.training import comm

    comm.set_threads()
