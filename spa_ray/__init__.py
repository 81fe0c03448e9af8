"""spa_ray: self-priority alignment on Ray. Nothing heavy is imported here.

The public names below are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spa_ray.config.load import load_config
    from spa_ray.methods.pairwise import PairwiseConfig, PairwiseMethod
    from spa_ray.training.method import LossInputs, Method

__version__ = "0.1.0"
__all__ = ["LossInputs", "Method", "PairwiseConfig", "PairwiseMethod", "load_config"]

_HOMES = {
    "LossInputs": "spa_ray.training.method",
    "Method": "spa_ray.training.method",
    "PairwiseConfig": "spa_ray.methods.pairwise",
    "PairwiseMethod": "spa_ray.methods.pairwise",
    "load_config": "spa_ray.config.load",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
