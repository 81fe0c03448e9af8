"""Engines: a small async protocol, vLLM behind it, and a scripted engine for tests. The only importer of vLLM."""

from __future__ import annotations

from pathlib import Path

from spa_ray.config.models import Generation, Model
from spa_ray.config.plugs import load_dotted
from spa_ray.engine.protocol import Completion, Engine, EngineDeadError, EngineStats, Request

__all__ = ["Completion", "Engine", "EngineDeadError", "EngineStats", "Request", "create_engine"]


def create_engine(model: Model, folder: Path, limits: Generation | None = None, *, verbose: bool = False) -> Engine:
    """The engine that `model.engine` names, with the weights in `folder`. `limits` holds vLLM's deadlines.

    Raises: InputError for a dotted path that leads nowhere or a model that the engine refuses.
    """
    if model.engine == "vllm":
        from spa_ray.engine.vllm_engine import VLLMEngine

        return VLLMEngine(model, folder, limits, verbose=verbose)
    factory = load_dotted(model.engine, where="model.engine")
    return factory(model, folder, **model.engine_kwargs)
