"""`spa sense`: what a model with a head senses in prompts."""

from __future__ import annotations

from typing import Annotated

import typer

from spa_ray.cli.options import AsJson, Out, Overrides, Verbose, emit


def sense(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="its folder or hub id", show_default=False)],
    prompts: Annotated[str, typer.Option(help="prompts: file, folder or module:reader", show_default=False)],
    out: Out,
    overrides: Overrides = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """The scores that an SGA model senses in prompts, as Parquet."""
    from spa_ray.config import arm_configs
    from spa_ray.pipeline.sense import sense_stage

    raw = {"model": {"path": model}, "prompts": {"source": prompts}}
    config = arm_configs(raw, overrides or [], where="spa sense", stem="sense")["main"]
    emit(sense_stage(config, out=out, verbose=verbose), as_json)
