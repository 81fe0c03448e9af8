"""spa_ray: self-priority alignment on Ray.

The public names are loaded when they are first used: `import spa_ray` imports nothing heavy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spa_ray.api import build, evaluate, generate, import_episodes, plan, run, train
    from spa_ray.config.benchmark import BenchmarkConfig
    from spa_ray.config.load import load_config
    from spa_ray.engine.protocol import Completion, Engine, EngineStats, Request
    from spa_ray.errors import InputError, RunError
    from spa_ray.generation.benchmark import Benchmark
    from spa_ray.generation.function_judge import Judge
    from spa_ray.generation.judging import Item, Judgement
    from spa_ray.generation.pairwise import PairwiseJudge, Verdict
    from spa_ray.methods.pairwise import PairwiseConfig, PairwiseMethod
    from spa_ray.preferences import build_pairs, denoise
    from spa_ray.training.method import Example, LossInputs, Method, Read, Row

__version__ = "0.1.0"
__all__ = [
    "Benchmark",
    "BenchmarkConfig",
    "Completion",
    "Engine",
    "EngineStats",
    "Example",
    "InputError",
    "Item",
    "Judge",
    "Judgement",
    "LossInputs",
    "Method",
    "PairwiseConfig",
    "PairwiseJudge",
    "PairwiseMethod",
    "Read",
    "Request",
    "Row",
    "RunError",
    "Verdict",
    "build",
    "build_pairs",
    "denoise",
    "evaluate",
    "generate",
    "import_episodes",
    "load_config",
    "plan",
    "run",
    "train",
]

_HOMES = {
    "spa_ray.api": ("build", "evaluate", "generate", "import_episodes", "plan", "run", "train"),
    "spa_ray.config.benchmark": ("BenchmarkConfig",),
    "spa_ray.config.load": ("load_config",),
    "spa_ray.engine.protocol": ("Completion", "Engine", "EngineStats", "Request"),
    "spa_ray.errors": ("InputError", "RunError"),
    "spa_ray.generation.benchmark": ("Benchmark",),
    "spa_ray.generation.function_judge": ("Judge",),
    "spa_ray.generation.judging": ("Item", "Judgement"),
    "spa_ray.generation.pairwise": ("PairwiseJudge", "Verdict"),
    "spa_ray.methods.pairwise": ("PairwiseConfig", "PairwiseMethod"),
    "spa_ray.preferences": ("build_pairs", "denoise"),
    "spa_ray.training.method": ("Example", "LossInputs", "Method", "Read", "Row"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
