"""The commands that run whole studies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spa_ray.cli.options import AsJson, Overrides, Verbose, emit
from spa_ray.errors import InputError


def reproduce(
    overrides: Overrides = None,
    paper: Annotated[str, typer.Option(help="spa or sga; or beyond, for recipes that are in no paper")] = "spa",
    seeds: Annotated[int | None, typer.Option(min=1, help="as many as the study has by default")] = None,
    extended: Annotated[bool, typer.Option("--extended", help="sensitivities and further comparisons as well")] = False,
    model: Annotated[
        str | None, typer.Option(help="a real one: folder or hub id; with --data and --judge, or of sga --reward")
    ] = None,
    reward: Annotated[
        str | None, typer.Option(help="a reward model's folder, or its section as `evaluation.judge` in braces")
    ] = None,
    judge: Annotated[str | None, typer.Option(help="of the evaluation, as `evaluation.judge`")] = None,
    data: Annotated[str | None, typer.Option(help="prompts: a data set by name, a file, a hub id")] = None,
    out: Annotated[str | None, typer.Option(help="folder; runs/reproduce-PAPER unless given")] = None,
    configs: Annotated[
        Path | None, typer.Option(help="write the configs into this folder, for `spa plan` and `spa run`; run nothing")
    ] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """A paper's tables and figures on the embedded world, beside its numbers; run it again to resume."""
    from spa_ray.cli.reproduce import needed, reproduce, write_configs

    given = {"model": model, "judge": judge, "reward": reward, "data": data}
    real = {name: value for name, value in given.items() if value is not None}
    wanted = needed(paper)
    if real and set(real) != set(wanted):
        wrong = next((f"{name}: missing" for name in wanted if name not in real), None)
        wrong = wrong or next(f"{name}: not of this paper" for name in real if name not in wanted)
        all_of_them = " and ".join(f"--{name}" for name in wanted)
        raise InputError(f"--{wrong}; a study on real models needs {all_of_them}")
    folder = out or f"runs/reproduce-{paper}"
    if configs is not None:
        written = write_configs(paper, overrides or [], configs, extended=extended, real=real, out=folder)
        for path in written:
            print(path)
        emit({"configs": list(map(str, written))}, as_json)
        return
    options = {"seeds": seeds, "extended": extended, "real": real, "out": folder, "verbose": verbose}
    emit(reproduce(paper, overrides or [], **options), as_json)  # type: ignore[arg-type]
