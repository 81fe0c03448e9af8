"""The tables that commands print when they are done: funnels, metrics, benchmarks, win rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spa_ray.evaluation.rv import rv_markdown


def print_result(result: dict[str, Any]) -> None:
    for name, arm in result["arms"].items():
        for number, iteration in enumerate(arm["iterations"], 1):
            if "funnel" in iteration:
                print_funnel(iteration["funnel"], f"{name}, iteration {number}")
    print(f"run folder: {result['run_dir']}")


def print_funnel(funnel: dict[str, Any], title: str) -> None:
    """The funnel as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", "prompts", title=f"funnel: {title}", title_justify="left")
    table.add_row("in", str(funnel["prompts"]))
    for reason, count in funnel["dropped"].items():
        table.add_row(f"− {reason}", str(count))
    table.add_row("kept", str(funnel["kept"]))
    table.add_section()
    for label, counts in (("chosen", funnel["pairs_by_kind"]), ("decided by", funnel["pairs_by_decided_by"])):
        for name, count in counts.items():
            table.add_row(f"pairs, {label} {name}", str(count))
    table.add_row("pairs", str(funnel["pairs"]))
    table.add_row("of them dead (gap 0)", str(funnel["dead_pairs"]))
    if funnel.get("truncated_pairs"):
        table.add_row("− pairs, the chosen answer was cut", str(funnel["truncated_pairs"]))
    Console().print(table)


def print_win_rates(arms: Mapping[str, Mapping[str, Any]]) -> None:
    """One table per family: arms by objectives, wins / ties / losses and the win rate."""
    from rich.console import Console
    from rich.table import Table

    first: Mapping[str, Any] = next(iter(arms.values()), {"families": {}})
    for family, objectives in first["families"].items():
        table = Table(
            "", *objectives, title=f"{family}: against {first['against']}, win / tie / loss", title_justify="left"
        )
        for arm, found in arms.items():
            cells = found["families"].get(family, {}).values()
            table.add_row(arm, *(f"{c['wins']} / {c['ties']} / {c['losses']}  {cell(c['win_rate'])}" for c in cells))
        Console().print(table)


def print_rv(curves: Sequence[Mapping[str, Any]]) -> None:
    """A table for every set of candidates."""
    for curve in curves:
        print(f"RV of the candidates' scores with the evaluation's judge's: {', '.join(curve['arms'])}")
        print(rv_markdown([curve]))


def print_benchmarks(arms: Mapping[str, Mapping[str, Any]]) -> None:
    """One table per benchmark: arms by measures. `arms` is arm -> benchmark -> its measures."""
    from rich.console import Console
    from rich.table import Table

    for name in next(iter(arms.values()), {}):
        found = {arm: played[name] for arm, played in arms.items()}
        first = next(iter(found.values()))
        table = Table("", *found, title=f"benchmark: {name}, version {first['version']}", title_justify="left")
        for measure in first["measures"]:
            table.add_row(measure, *(cell(of_arm["measures"].get(measure)) for of_arm in found.values()))
        table.add_row("prompts", *(f"{of_arm['n']}" for of_arm in found.values()))
        Console().print(table)


def cell(value: Any) -> str:
    """A measure: a number, or an interval as `{mean, low, high}`."""
    if isinstance(value, dict) and {"mean", "low", "high"} <= value.keys():
        return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
    return f"{value:.3f}" if isinstance(value, float) else "" if value is None else str(value)


def print_metrics(metrics: dict[str, Any]) -> None:
    """One table per family and judge."""
    from rich.console import Console
    from rich.measure import Measurement

    from spa_ray.evaluation.tables import ArmMetrics, rich_table

    console = Console()
    for family, arms in metrics.items():
        by_judge = {"": arms}
        for judge in next(iter(arms.values())).get("judges", {}):
            by_judge[f", by {judge}"] = {name: arm["judges"][judge] for name, arm in arms.items()}
        for by, found in by_judge.items():
            table = rich_table({name: ArmMetrics.from_dict(arm) for name, arm in found.items()})
            table.title = f"held-out prompts: {family}{by}"
            if not console.is_terminal:  # a file or a pipe has no width: nothing is cut to fit
                console.width = Measurement.get(console, console.options.update(max_width=10_000), table).maximum
            console.print(table)
