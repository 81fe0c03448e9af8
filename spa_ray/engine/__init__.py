"""Engines: a small async protocol, vLLM behind it, and a scripted engine for tests. The only importer of vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from spa_ray.config.benchmark import benchmark_class
from spa_ray.config.models import Config, Generation, Model
from spa_ray.config.plugs import ENGINES, load_plug
from spa_ray.engine.protocol import CAPABILITIES, Completion, Engine, EngineDeadError, EngineStats, Request
from spa_ray.errors import InputError

__all__ = ["Completion", "Engine", "EngineDeadError", "EngineStats", "Request", "check_capabilities", "create_engine"]


def create_engine(model: Model, folder: Path, limits: Generation | None = None, *, verbose: bool = False) -> Engine:
    """The engine that `model.engine` names, with the weights in `folder`. `limits` holds vLLM's deadlines.

    Raises: InputError for a dotted path that leads nowhere or a model that the engine refuses.
    """
    factory = load_plug(ENGINES, model.engine, where="model.engine")
    if model.own_engine:
        return factory(model, folder, **model.engine_kwargs)
    return factory(model, folder, limits, verbose=verbose)


def check_capabilities(config: Config, *, several_models: bool = False) -> None:
    """Raises: InputError where there is no such engine, or it is not able to do what the config asks of it."""
    if not config.model.own_engine:
        return
    able = getattr(load_plug(ENGINES, config.model.engine, where="model.engine"), "capabilities", CAPABILITIES)
    judged, mode, ranks = config.scoring.judged_by.asks_engine, config.scoring.mode, config.scoring.compare
    pairwise = config.evaluation.pairwise
    compares = pairwise is not None and pairwise.judged_by.asks_engine and pairwise.mode == "choice"
    stops = config.sampling.stop or config.refine.stop or config.evaluation.sampling.stop
    for needed, asked in (
        ("choices", "scoring.mode choice" if judged and mode == "choice" else None),
        ("choices", "evaluation.pairwise.mode choice" if compares else None),
        ("choices", "scoring.compare.mode choice" if judged and ranks and ranks.mode == "choice" else None),
        ("logprobs", "scoring.mode expected" if judged and mode == "expected" else None),
        ("stop", "a stop string" if stops else None),
        ("load_weights", "an evaluation of several models" if several_models else None),
        *_of_benchmarks(config),
    ):
        if asked and needed not in able:
            known = ", ".join(sorted(able)) or "none"
            raise InputError(
                f"model.engine: {config.model.engine} is not able to do {asked} (its capabilities: {known})"
            )


def _of_benchmarks(config: Config) -> Iterator[tuple[str, str]]:
    """What the config's benchmarks need of an engine."""
    for name, section in config.evaluation.benchmarks.items():
        for needed in benchmark_class(section.benchmark).needs:
            yield needed, f"the benchmark {name}"
