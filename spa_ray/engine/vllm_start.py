"""How vLLM is started: its environment, its arguments, and what its refusals mean.

`prepare_environment` has to run before vLLM is imported, in every process where an engine lives; the worker processes
of a tensor-parallel engine inherit it.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spa_ray.config.models import Model
from spa_ray.engine.placement import engine_world, executor_backend
from spa_ray.errors import InputError
from spa_ray.storage.files import check_writable

CPU_KV_GIB = "2"

# What is set unless the user's environment says otherwise. FlashInfer and DeepGEMM compile their kernels with nvcc and
# ninja when they are first used, which many GPU nodes do not have. Nothing is lost without them for bfloat16 models:
# a request with a seed never takes FlashInfer's sampler, and every request here has one.
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": CPU_KV_GIB,
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
    "VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER": "0",
    "VLLM_USE_DEEP_GEMM": "0",
}

# vLLM's exceptions for a model or an argument that cannot work, now or later.
PERMANENT = (ValueError, TypeError, KeyError, NotImplementedError, ImportError)

# The same types can tell of a state that passes: memory that a process is about to give back, a port, a file system.
PASSING = re.compile(
    r"free memory on device|memory profiling|out of memory|cuda error|cublas|cudnn|nccl|device.*(busy|unavailable)"
    r"|address already in use|timed? ?out|connection (refused|reset|closed)|resource temporarily unavailable",
    re.IGNORECASE,
)
LONGEST_REASON = 600  # characters


def prepare_environment(*, verbose: bool = False) -> None:
    """Set what vLLM reads when it is imported. Without `verbose` it logs errors alone."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    for name, value in {**ENVIRONMENT, **_caches()}.items():
        os.environ.setdefault(name, value)
    if not verbose:
        os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
        os.environ["VLLM_CONFIGURE_LOGGING"] = "1"
        logging.getLogger("vllm").setLevel(logging.ERROR)


def _caches() -> dict[str, str]:
    """Where vLLM and Triton keep what they compiled, if the home folder cannot be written: else both write there."""
    try:
        check_writable(Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "vllm")
    except InputError:
        return {"VLLM_CACHE_ROOT": f"{_scratch().name}/vllm", "TRITON_HOME": _scratch().name}
    return {}


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder that is deleted when this process ends."""
    return tempfile.TemporaryDirectory(prefix="spa-cache-")


def start_vllm(model: Model, folder: Path, *, verbose: bool) -> Any:
    """A loaded `LLMEngine`. Raises: InputError for what vLLM refuses for good; anything else may pass."""
    prepare_environment(verbose=verbose)
    from vllm import EngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.llm_engine import LLMEngine

    try:
        # As vLLM's own offline class: its defaults are the wide batches that throughput wants.
        arguments = EngineArgs(**{"use_tqdm_on_load": verbose, **engine_arguments(model, folder)})
        loggers = None if arguments.disable_log_stats else _stat_loggers()
        return LLMEngine.from_engine_args(arguments, usage_context=UsageContext.LLM_CLASS, stat_loggers=loggers)
    except PERMANENT as e:
        raise start_error(e, folder) from e


def start_error(error: Exception, folder: Path) -> Exception:
    """What a failed start is to the caller: `InputError` where no later try can do better, else `RuntimeError`."""
    why = reason(error)
    if not isinstance(error, PERMANENT) or PASSING.search(why):
        return RuntimeError(why)
    return InputError(f"model {folder}: vLLM refuses it: {why}")


def reason(error: Exception) -> str:
    """One line that says why, without the advice that libraries write below it.

    pydantic's errors are taken apart: their last line is a link to its own documentation.
    """
    details = getattr(error, "errors", None)
    if callable(details):
        found = [_detail(item) for item in details(include_url=False)]
        text = "; ".join(dict.fromkeys(found))
    elif isinstance(error, KeyError):
        text = f"no entry {error}"
    else:
        text = next((part for part in str(error).split("\n\n") if part.strip()), "")
    line = " ".join(text.split()) or type(error).__name__
    return line if len(line) <= LONGEST_REASON else line[: LONGEST_REASON - 1] + "…"


def _detail(item: Any) -> str:
    said = str(item["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ").split("\n\n")[0]
    where = ".".join(str(part) for part in item.get("loc", ()))
    if item["type"] in ("value_error", "assertion_error") or not where:
        return said
    return f"{where}: {said} (got {str(item.get('input'))[:60]!r})"


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
        "enable_flashinfer_autotune": False,  # it compiles kernels when the engine starts
        **_platform_arguments(model),
        **model.engine_kwargs,
    }


def _platform_arguments(model: Model) -> dict[str, Any]:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        # On several GPUs vLLM would join sums and norms by a FlashInfer kernel that is compiled at the start.
        several = engine_world(model) > 1
        return {"compilation_config": {"pass_config": {"fuse_allreduce_rms": False}}} if several else {}
    # A seeded request whose prefill is chunked kills the CPU engine: prompts must be prefilled whole.
    budget = max(16384, model.max_model_len or 0)
    # Only whole blocks of a prompt are shared, and vLLM's block on the CPU is 128 tokens: longer than many a prefix.
    blocks = {"block_size": 32}
    return {"enable_chunked_prefill": False, "max_num_batched_tokens": budget, "enforce_eager": True, **blocks}


# --- before anything starts -------------------------------------------------------------------------------------------


def check_engine(model: Model, folder: Path) -> int:
    """The context length that vLLM gives this model, by vLLM's own config classes; no weights are read.

    On a machine whose devices vLLM does not know (a driver without GPUs, say) only what depends on the model is asked.
    Raises: InputError with vLLM's reason for an argument, a value or a model that it refuses.
    """
    with own_environment():
        prepare_environment()
        from vllm import EngineArgs

        check_argument_names(model.engine_kwargs, EngineArgs)
        try:
            arguments = EngineArgs(**engine_arguments(model, folder))
            context = int(arguments.create_model_config().max_model_len)
            if _devices_are_here(model):
                arguments.create_engine_config()
        except Exception as e:  # nothing is loaded or shared yet, so no later try can do better
            raise InputError(f"model {folder}: vLLM refuses it: {reason(e)}") from e
    return context


def check_argument_names(given: dict[str, Any], arguments: Any) -> None:
    """Raises: InputError for a key that is no field of vLLM's `EngineArgs`."""
    import dataclasses
    import difflib

    known = [field.name for field in dataclasses.fields(arguments)]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            fix = f"did you mean {near[0]}?" if near else "remove it (docs/GENERATION.md names where the list is)"
            raise InputError(f"model.engine_kwargs.{name}: vLLM's EngineArgs has no such argument; {fix}")


def _devices_are_here(model: Model) -> bool:
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return True
    import torch

    return torch.cuda.is_available() and torch.cuda.device_count() >= engine_world(model)


@contextmanager
def own_environment() -> Iterator[None]:
    """What vLLM writes into the environment stays in this block: Ray's processes would inherit it."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
