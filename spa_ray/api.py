"""What the command line does, from Python: one function per command, with the same results and errors.

A config is a path of a YAML file, a mapping of its keys, or what `load_config` gave. Overrides are `"key=value"` texts.
All raise `InputError` for what is wrong with config or input, and `RunError` for a run that failed in the middle.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from spa_ray.config import Config, arm_configs, load_config
from spa_ray.config.load import Override
from spa_ray.data.hub import source_path
from spa_ray.errors import InputError
from spa_ray.pipeline import commands
from spa_ray.pipeline.plan import make_plan
from spa_ray.storage.files import AnyPath, as_path

AnyConfig = str | Path | Mapping[str, Any]


def run(
    config: AnyConfig, overrides: Iterable[str] = (), *, until: str = "evaluate", verbose: bool = False
) -> dict[str, Any]:
    """`spa run`: the complete pipeline, resumed where it was left. Returns: what `spa run --json` prints."""
    return commands.run_config(_arms(config, overrides), until=until, verbose=verbose)


def plan(config: AnyConfig, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """`spa plan`: what a run would do. Starts nothing."""
    return make_plan(_arms(config, overrides))


def generate(
    config: AnyConfig, *, out: str | AnyPath, overrides: Iterable[str] = (), verbose: bool = False
) -> dict[str, Any]:
    """`spa generate`: the config's prompts to `out/episodes/`."""
    return commands.generate_stage(_first(config, overrides), out=as_path(out), verbose=verbose)


def import_episodes(
    source: str, *, out: str | AnyPath, config: AnyConfig | None = None, overrides: Iterable[str] = ()
) -> dict[str, Any]:
    """`spa import`: a data set with answers and scores to `out/episodes/`."""
    raw: AnyConfig = {"model": {"path": "none"}} if config is None else config
    return commands.import_stage(_first(raw, [*overrides, ("episodes.source", source)]), out=as_path(out))


def build(
    episodes: str | AnyPath, *, out: str | AnyPath, config: str | Path | None = None, overrides: Iterable[str] = (),
    verbose: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """`spa build`: episodes to `out/pairs/` and `out/funnel.json`."""
    path = None if config is None else Path(config)
    return commands.build_stage(as_path(episodes), as_path(out), path, overrides, verbose=verbose)


def train(
    pairs: str | AnyPath, *, out: str | AnyPath, config: AnyConfig, overrides: Iterable[str] = (), verbose: bool = False
) -> dict[str, Any]:
    """`spa train`: pairs, those of `spa build` or your own, to the model folder `out`."""
    return commands.train_stage(_first(config, overrides), pairs=source_path(pairs), out=as_path(out), verbose=verbose)


def evaluate(
    model: str | AnyPath, *, out: str | AnyPath, config: AnyConfig, overrides: Iterable[str] = (), verbose: bool = False
) -> dict[str, Any]:
    """`spa eval`: a model's answers to the config's held-out prompts and their metrics, in `out`."""
    return commands.evaluate_stage(_first(config, overrides), model=as_path(model), out=as_path(out), verbose=verbose)


def _arms(config: AnyConfig, overrides: Iterable[Override]) -> dict[str, Config]:
    if isinstance(config, str | Path):
        return load_config(config, overrides)
    if config and all(isinstance(arm, Config) for arm in config.values()):
        if list(overrides):
            raise InputError("overrides do not reach a config that is loaded; give them to load_config")
        return dict(config)
    return arm_configs(config, overrides, where="config", stem="run")


def _first(config: AnyConfig, overrides: Iterable[Override]) -> Config:
    return next(iter(_arms(config, overrides).values()))
