"""The report's tables, as cells that HTML and Markdown render alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spa_ray.evaluation.bootstrap import Interval
from spa_ray.evaluation.tables import SHARES, number
from spa_ray.report.run_data import RunData, flat

Json = Mapping[str, Any]
COMPARED = {
    "requests": "requests",
    "prompt_tokens": "prompt tokens",
    "generated_tokens": "generated",
    "seconds": "time",
}


@dataclass(frozen=True)
class Cell:
    """`value` is what a column is sorted by: None for words, "" for a number that is not there."""

    shown: str
    small: str = ""
    value: float | str | None = None


@dataclass(frozen=True)
class Table:
    title: str
    head: list[str]
    rows: list[list[Cell]]

    def markdown(self) -> str:
        lines = [self.head, ["---", *["---:"] * (len(self.head) - 1)]]
        lines += [[f"{c.shown} {c.small}".strip().replace("|", "\\|") for c in row] for row in self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def words(text: Any) -> Cell:
    return Cell("–" if text is None else str(text))


def measure(name: str, value: Any, *, signed: bool = False) -> Cell:
    """An interval as `mean` with `[low, high]` below it; a plain number as it is."""
    if not isinstance(value, dict):
        return Cell("–", value="") if not isinstance(value, int | float) else Cell(f"{value:.4g}", value=value)
    found = Interval(value["mean"], value["low"], value["high"], value.get("n", 0))
    mean, low, high = (number(name, x, signed=signed) for x in (found.mean, found.low, found.high))
    unit = " %" if name in SHARES else ""
    return Cell(f"{mean}{unit}", f"[{low}, {high}]", found.mean)


def shown_name(name: str) -> str:
    return name.upper() if name.startswith("hh_") else name.replace("_", " ")


def of_measures(arms: Mapping[str, Json], part: str, title: str) -> Table | None:
    """Arms by measures: their `means` or their `differences`."""
    shown = {arm: found[part] for arm, found in arms.items() if found[part]}
    names = list(dict.fromkeys(name for values in shown.values() for name in values))
    rows = [
        [words(arm), *(measure(name, values.get(name), signed=part == "differences") for name in names),
         Cell(f"{arms[arm]['n']:,}", value=arms[arm]["n"])]
        for arm, values in shown.items()
    ]  # fmt: skip
    return Table(title, ["arm", *map(shown_name, names), "prompts"], rows) if rows else None


def by_category(arms: Mapping[str, Json], objectives: Sequence[str]) -> Table | None:
    rows = [
        [words(category), words(arm), *(measure(name, values.get(name)) for name in objectives)]
        for arm, found in arms.items()
        for category, values in found["by_category"].items()
    ]
    return Table("", ["category", "arm", *objectives], rows) if rows else None


def plan_table(run: RunData) -> Table | None:
    """Every stage: what happened, and below it what was planned."""
    if run.stages is None:
        return None
    total = {"stage": "total of the finished", "arms": [], "status": "", **run.stages["total"]}
    rows = []
    for stage in [*run.stages["stages"], total]:
        name = f"{stage['stage']} {stage['iteration']}" if stage.get("iteration") else stage["stage"]
        arms = ", ".join(stage["arms"]) if len(stage["arms"]) <= 3 else f"{len(stage['arms'])} arms"
        numbers = [_planned(key, stage["actual"].get(key), stage["planned"].get(key)) for key in COMPARED]
        rows.append([words(name), words(arms), words(stage["status"]), *numbers])
    return Table("", ["stage", "arms", "state", *COMPARED.values()], rows)


def _planned(key: str, actual: float | None, planned: float | None) -> Cell:
    show: Callable[[float], str] = duration if key == "seconds" else lambda value: f"{value:,.0f}"
    if not actual and not planned:
        return Cell("", value="")
    return Cell("–" if actual is None else show(actual), f"of {show(planned or 0)}", "" if actual is None else actual)


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.4 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def signal_table(title: str, signal: Json) -> Table:
    """The health of the judge's signal: shares with Wilson intervals."""
    columns = {"at_low": "at the bottom", "at_high": "at the top", "within_var": "variance, one answer",
               "between_var": "variance, between answers", "parse_failures": "unreadable"}  # fmt: skip
    rows = []
    for name, found in signal["objectives"].items():
        rows.append([words(name), *(_share(found[key]) for key in columns)])
    return Table(f"Signal of {title}: {signal['prompts']} prompts", ["objective", *columns.values()], rows)


def _share(value: Any) -> Cell:
    if isinstance(value, list):
        share, low, high = (100 * x for x in value)
        return Cell(f"{share:.0f} %", f"[{low:.0f}, {high:.0f}]", share)
    return Cell("–", value="") if value is None else Cell(f"{value:.2f}", value=value)


def judging_tables(run: RunData) -> list[Table]:
    """Win rates, benchmarks and the agreement of judges, whatever of them a run has."""
    found = []
    for arm, rates in run.win_rates.items():
        rows = [
            [words(family), words(objective), words(f"{r['wins']} / {r['ties']} / {r['losses']}"),
             measure("win_rate", r["win_rate"]), measure("consistency", r["consistency"]), words(r["failed"])]
            for family, objectives in rates["families"].items()
            for objective, r in objectives.items()
        ]  # fmt: skip
        head = ["family", "objective", "win / tie / loss", "win rate", "same in both orders", "failed"]
        found.append(Table(f"{arm} against {rates['against']}, in pairs", head, rows))
    for name, arms in run.benchmarks.items():
        measures = list(dict.fromkeys(key for played in arms.values() for key in played["measures"]))
        rows = [[words(arm), *(measure(key, played["measures"].get(key)) for key in measures), words(played["n"])]
                for arm, played in arms.items()]  # fmt: skip
        found.append(Table(f"Benchmark {name}", ["arm", *map(shown_name, measures), "prompts"], rows))
    for family, agreed in run.agreement.items():
        rows = [
            [
                words(judge),
                words(gold),
                words(objective),
                *(measure(m, by[m]) for m in ("accuracy", "kappa", "spearman")),
            ]
            for judge, golds in agreed["judges"].items()
            for gold, objectives in golds.items()
            for objective, by in objectives.items()
        ]
        if rows:
            head = ["judge", "against", "objective", "accuracy", "kappa", "Spearman"]
            found.append(Table(f"Agreement of judges: {family}", head, rows))
    return found


def arms_table(run: RunData) -> Table | None:
    """What each arm changes of the first one's config."""
    rows = [
        [words(arm), words(key), words(value)] for arm, changed in run.arms.items() for key, value in changed.items()
    ]
    return Table("", ["arm", "key", "value"], rows) if rows else None


def differing_table(runs: Sequence[RunData], names: Sequence[str]) -> Table:
    """The config keys in which two runs differ, and their versions."""
    ours, theirs = ({**flat(r.config), **flat(r.manifest.get("versions", {}), "versions")} for r in runs)
    keys = [key for key in dict.fromkeys((*ours, *theirs)) if ours.get(key) != theirs.get(key)]
    rows = [
        [words(key), words(ours.get(key)), words(theirs.get(key))] for key in keys if key not in ("run_dir", "name")
    ]
    return Table(
        "Config keys and versions that differ", ["key", *names], rows or [[words("nothing")] + [words("")] * 2]
    )
