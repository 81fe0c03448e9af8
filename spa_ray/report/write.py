"""`spa report`: report.html, report.md and report.jsonl of one run, or of two side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spa_ray.errors import InputError
from spa_ray.pipeline.result_print import print_funnel, print_metrics
from spa_ray.report.compare import together
from spa_ray.report.examples import of_run, print_examples
from spa_ray.report.headline import headline
from spa_ray.report.packed import json_lines
from spa_ray.report.page import context_of, render
from spa_ray.report.run_data import RunData, read_run
from spa_ray.storage.files import AnyPath, as_path, write_text


def write_report(run_dir: str | AnyPath, *, out: AnyPath | None = None) -> dict[str, Any]:
    """Write a run's report into its folder, or into `out`. Returns: the files' paths and the headline."""
    return _write(read_run(run_dir), out or as_path(run_dir), "report")


def report(run_dirs: Sequence[AnyPath], *, out: AnyPath | None = None) -> dict[str, Any]:
    """`spa report`: write the report of a run, or of two side by side into the first one's folder, and print the
    headline, the tables and the path. Raises: InputError for other than one or two runs, and runs that do not compare.
    """
    if len(run_dirs) > 2:
        raise InputError(f"spa report: {len(run_dirs)} runs; give one, or two to compare")
    runs = [read_run(path) for path in run_dirs]
    shown = runs[0] if len(runs) == 1 else together(*runs)
    stem = "report" if len(runs) == 1 else f"report-and-{as_path(run_dirs[1]).name}"
    result = _write(shown, out or as_path(run_dirs[0]), stem, sources=runs if len(runs) > 1 else ())
    print(result["headline"])
    for found in shown.funnels:
        print_funnel(found.value, found.title)
    print_metrics(shown.metrics)
    print_examples(of_run(shown))
    print(f"report: {result['report']}")
    return result


def _write(run: RunData, out: AnyPath, stem: str, sources: Sequence[RunData] = ()) -> dict[str, Any]:
    page, markdown = render(context_of(run, sources=sources))
    files = {"answers": (f"{stem}.jsonl", json_lines(run)), "markdown": (f"{stem}.md", markdown),
             "report": (f"{stem}.html", page)}  # fmt: skip
    for name, text in files.values():
        write_text(out / name, text)
    return {**{key: str(out / name) for key, (name, _) in files.items()}, "headline": headline(run)}
