"""The sections of `evaluation.benchmarks`, each the `Config` of the benchmark that it names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, SerializeAsAny

from spa_ray.config.plugs import BENCHMARKS, load_plug
from spa_ray.config.rollout import EvalSampling
from spa_ray.config.section import JudgeSection, Section
from spa_ray.errors import InputError

WHERE = "evaluation.benchmarks"


class BenchmarkConfig(Section):
    """The keys that every benchmark has; one of your own derives from it."""

    sources: ClassVar[frozenset[str]] = frozenset({"limit"})  # keys that only say which prompts there are

    benchmark: str = Field(
        description="a built-in one's name (the entry's own, unless given), or the dotted path `module:Benchmark`"
    )
    limit: int | None = Field(None, ge=1, description="take the first N prompts")
    sampling: EvalSampling = Field(EvalSampling(), description="of its answers, where its protocol has none of its own")

    @property
    def judged_by(self) -> JudgeSection | None:
        """The judge that `ask.judge` asks; None where nothing is judged."""
        return None


def benchmark_class(path: str) -> Any:
    """The class of a benchmark (`spa_ray.Benchmark`). Raises: InputError for an object that is none."""
    found = load_plug(BENCHMARKS, path, where=WHERE)
    section = getattr(found, "Config", None)
    if not (isinstance(section, type) and issubclass(section, BenchmarkConfig)):
        raise InputError(f"{WHERE}: {path!r} is no benchmark; derive it from spa_ray.Benchmark (docs/BENCHMARKS.md)")
    return found


def _section(given: Any) -> Any:
    path = given.get("benchmark") if isinstance(given, Mapping) else None
    return benchmark_class(path).Config.model_validate(given) if isinstance(path, str) else given


def named(given: Any) -> Any:
    """The entries of `evaluation.benchmarks`, where those under a built-in benchmark's name are that one."""
    if not isinstance(given, Mapping):
        return given
    return {
        name: {"benchmark": name, **entry} if name in BENCHMARKS and isinstance(entry, Mapping) else entry
        for name, entry in given.items()
    }


BenchmarkSection = Annotated[SerializeAsAny[BenchmarkConfig], BeforeValidator(_section)]
