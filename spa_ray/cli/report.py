"""`spa report`, and the report that a run ends with."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from spa_ray.cli.guard import explain
from spa_ray.cli.options import AsJson, emit
from spa_ray.logs import printable, redact
from spa_ray.storage.files import AnyPath, as_path, out_path


def report(
    runs: Annotated[
        list[Any], typer.Argument(parser=as_path, metavar="RUN [RUN]", help="run folder, or two to compare")
    ],
    out: Annotated[
        Any,
        typer.Option(parser=out_path, metavar="PATH", help="folder; else the first run's", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """One page that says what a run found (report.html), and its tables; of two runs, what is different."""
    from spa_ray.report.write import report as write

    emit(write(runs, out=out), as_json)


def last_report(run_dir: str | AnyPath, *, examples: bool = False) -> str | None:
    """Write the report of a run whose result stands, and print its path, which is returned, after its examples where
    asked. A report that fails takes nothing from the run: it is one line on stderr, and None."""
    from spa_ray.report.examples import of_run, print_examples
    from spa_ray.report.run_data import read_run
    from spa_ray.report.write import write_report

    try:
        if examples:
            print_examples(of_run(read_run(run_dir)))
        path = str(write_report(run_dir)["report"])
    except Exception as e:  # noqa: BLE001 (whatever it was: the run is done and its numbers are written)
        reason = printable(redact(" ".join(explain(e)[0].split())))
        print(f"spa: the run is done, but its report was not written: {reason}", file=sys.stderr)
        return None
    print(f"report: {path}")
    return path
