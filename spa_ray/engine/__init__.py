"""Engines: a small async protocol, vLLM behind it, and a scripted engine for tests. The only importer of vLLM."""

from __future__ import annotations

from pathlib import Path

from spa_ray.config.models import Generation, Model
from spa_ray.config.plugs import ENGINES, load_plug
from spa_ray.engine.protocol import Completion, Engine, EngineDeadError, EngineStats, Request

__all__ = ["Completion", "Engine", "EngineDeadError", "EngineStats", "Request", "create_engine"]


def create_engine(model: Model, folder: Path, limits: Generation | None = None, *, verbose: bool = False) -> Engine:
    """The engine that `model.engine` names, with the weights in `folder`. `limits` holds vLLM's deadlines.

    Raises: InputError for a dotted path that leads nowhere or a model that the engine refuses.
    """
    factory = load_plug(ENGINES, model.engine, where="model.engine")
    if model.own_engine:
        return factory(model, folder, **model.engine_kwargs)
    return factory(model, folder, limits, verbose=verbose)
