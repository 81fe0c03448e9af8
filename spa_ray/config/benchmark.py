"""The sections of `evaluation.benchmarks`, each the `Config` of the benchmark that it names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, SerializeAsAny

from spa_ray.config.plugs import load_dotted
from spa_ray.config.rollout import EvalSampling
from spa_ray.config.section import Section
from spa_ray.errors import InputError

WHERE = "evaluation.benchmarks"


class BenchmarkConfig(Section):
    """The keys that every benchmark has; one of your own derives from it."""

    benchmark: str = Field(description="the dotted path `module:Benchmark` of its class")
    limit: int | None = Field(None, ge=1, description="take the first N prompts")
    sampling: EvalSampling = Field(EvalSampling(), description="of its answers, where its protocol has none of its own")


def benchmark_class(path: str) -> Any:
    """The class of a benchmark (`spa_ray.Benchmark`). Raises: InputError for an object that is none."""
    found = load_dotted(path, where=WHERE)
    section = getattr(found, "Config", None)
    if not (isinstance(section, type) and issubclass(section, BenchmarkConfig)):
        raise InputError(f"{WHERE}: {path!r} is no benchmark; derive it from spa_ray.Benchmark (docs/BENCHMARKS.md)")
    return found


def _section(given: Any) -> Any:
    path = given.get("benchmark") if isinstance(given, Mapping) else None
    return benchmark_class(path).Config.model_validate(given) if isinstance(path, str) else given


BenchmarkSection = Annotated[SerializeAsAny[BenchmarkConfig], BeforeValidator(_section)]
