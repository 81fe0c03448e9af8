"""A study over seeds: the tables that its spec asks for, out of one run a seed.

Comes in: `SeedRun`s with the same arms and the same held-out prompts, and a `config.study.Study`. Goes out: a `Results`
and its Markdown. Every measure is averaged over seeds prompt by prompt, then bootstrapped over prompts. Never: files,
judges, a verdict, an arm's name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from spa_ray.config.study import Study, StudyTable
from spa_ray.evaluation.answers import FamilyAnswers
from spa_ray.evaluation.bootstrap import Interval, ratio_interval
from spa_ray.evaluation.prompts import MAIN_FAMILY
from spa_ray.evaluation.tables import (
    UNSAFE_BELOW,
    Answers,
    ArmMetrics,
    Floats,
    arm_metrics,
    by_prompt,
    cell,
    is_share,
    number,
    plain_means,
)

PAIR_COLUMNS = ("right", "tied", "pairs")
Cell = Interval | list[float]


@dataclass(frozen=True)
class PairOrder:
    """How one arm's pairs of one seed stand by another judge: counts by prompt_id.

    right: the chosen precedes the rejected in that judge's lexicographic order; tied: it finds them equal.
    """

    right: Mapping[str, int]
    tied: Mapping[str, int]
    pairs: Mapping[str, int]


def pair_order(judged: Iterable[tuple[str, Sequence[float], Sequence[float]]]) -> PairOrder:
    """Count pairs given as (prompt_id, the chosen's scores, the rejected's), scores in objective order."""
    right, tied, pairs = Counter[str](), Counter[str](), Counter[str]()
    for prompt_id, chosen, rejected in judged:
        pairs[prompt_id] += 1
        right[prompt_id] += tuple(chosen) > tuple(rejected)
        tied[prompt_id] += tuple(chosen) == tuple(rejected)
    return PairOrder(right, tied, pairs)


@dataclass(frozen=True)
class SeedRun:
    """One finished run. answers: arm -> family -> its answers; judges: the same by further judges, under their names;
    orders: arm -> its first iteration's pairs, judged."""

    seed: int
    answers: Mapping[str, Mapping[str, FamilyAnswers]]
    judges: Mapping[str, Mapping[str, Mapping[str, FamilyAnswers]]] = field(default_factory=dict)
    orders: Mapping[str, PairOrder] = field(default_factory=dict)


@dataclass(frozen=True)
class ResultTable:
    """Rows of cells. columns: label -> measure, which says how its cells are written; prompts: held-out, by family."""

    title: str
    note: str
    prompts: dict[str, int]
    columns: dict[str, str]
    rows: dict[str, dict[str, Cell]]
    signed: bool = False


@dataclass(frozen=True)
class Results:
    """All tables by key, and over what they are: seeds, in order, and resamples of the bootstrap."""

    seeds: list[int]
    resamples: int
    objectives: list[str]
    tables: dict[str, ResultTable]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def build_study(measured: Measured, study: Study) -> Results:
    """All tables for which there are arms."""
    tables = {key: _table(measured, spec) for key, spec in study.tables.items()}
    kept = {key: table for key, table in tables.items() if table.rows and table.columns}
    return Results([run.seed for run in measured.runs], measured.resamples, measured.objectives, kept)


@dataclass(frozen=True)
class Measured:
    """The answers of one run a seed, and what is measured of them. `seed` is the bootstrap's.

    Raises: ValueError when the runs differ in their arms or families, or two have the same seed.
    """

    runs: Sequence[SeedRun]
    objectives: list[str]
    resamples: int
    seed: int
    unsafe_below: float = UNSAFE_BELOW

    def __post_init__(self) -> None:
        if not self.runs or len({run.seed for run in self.runs}) != len(self.runs):
            raise ValueError(f"seeds {[run.seed for run in self.runs]}: a study needs runs, each of another seed")
        shapes = {str({arm: sorted(families) for arm, families in sorted(run.answers.items())}) for run in self.runs}
        if len(shapes) > 1:
            raise ValueError("the runs of a study must have the same arms and families of held-out prompts")

    @cached_property
    def arms(self) -> list[str]:
        return list(self.runs[0].answers)

    @cached_property
    def families(self) -> list[str]:
        return list(self.runs[0].answers[self.arms[0]])

    def metrics(
        self, family: str, arms: Sequence[str], baseline: str | None = None, *, judge: str = ""
    ) -> dict[str, ArmMetrics]:
        """Over all seeds. `baseline`: an arm, whose measures are subtracted; `judge`: a further one."""
        both = dict.fromkeys([*([baseline] if baseline else []), *arms])
        shared: dict[str, Any] = {"resamples": self.resamples, "seed": self.seed, "baseline": baseline}
        shared["unsafe_below"] = self.unsafe_below
        answers = {arm: self.answers(arm, family, judge) for arm in both}
        return arm_metrics(answers, objectives=self.objectives, categories=self._categories(family), **shared)

    def seed_means(self, arm: str) -> dict[str, list[float]]:
        """Measure -> its mean at each seed over the main set, for the measures that every seed has."""
        means = [
            plain_means(
                answers,
                objectives=self.objectives,
                categories=self._categories(MAIN_FAMILY),
                unsafe_below=self.unsafe_below,
            )
            for answers in self.answers(arm, MAIN_FAMILY)
        ]
        return {name: [m[name] for m in means] for name in means[0] if all(name in m for m in means)}

    def by_prompt(self, arm: str) -> dict[str, Floats]:
        """Measure -> its values by prompt of the main set, each the mean over the seeds."""
        return by_prompt(self.answers(arm, MAIN_FAMILY), objectives=self.objectives, unsafe_below=self.unsafe_below)

    def prompts(self, families: Iterable[str]) -> dict[str, int]:
        return {f: len(set().union(*(a.prompt_ids for a in self.answers(self.arms[0], f)))) for f in families}

    def pair_cells(self, arm: str) -> dict[str, Cell]:
        """Shares of an arm's pairs over all seeds: a training prompt's pairs of all seeds stay together."""
        orders = [run.orders[arm] for run in self.runs if arm in run.orders]
        prompts = sorted(set().union(*(order.pairs for order in orders)))
        if not prompts:
            return {}

        def total(kind: str) -> list[int]:
            return [sum(getattr(order, kind).get(prompt, 0) for order in orders) for prompt in prompts]

        wholes = total("pairs")
        shares: dict[str, Cell] = {
            kind: ratio_interval(total(kind), wholes, resamples=self.resamples, seed=self.seed)
            for kind in ("right", "tied")
        }
        return {**shares, "pairs": [sum(wholes) / len(orders)]}

    def _categories(self, family: str) -> Mapping[str, str]:
        return self.runs[0].answers[self.arms[0]][family].categories

    def answers(self, arm: str, family: str, judge: str = "") -> list[Answers]:
        """Of every seed."""
        return [(run.judges[judge] if judge else run.answers)[arm][family].answers for run in self.runs]


def together(first: Measured, other: Measured, vanilla: str) -> Measured:
    """The arms of two runs of every seed: those of `other` after the first's, whose `vanilla` they call by that name.

    Raises: ValueError for an arm that both have, or other seeds.
    """
    runs = []
    for mine, theirs in zip(first.runs, other.runs, strict=True):
        own = {(vanilla if arm == "vanilla" else arm): found for arm, found in mine.answers.items()}
        if mine.seed != theirs.seed or own.keys() & theirs.answers.keys():
            raise ValueError(f"runs of seeds {mine.seed} and {theirs.seed} with arms {[*own]} and {[*theirs.answers]}")
        runs.append(SeedRun(mine.seed, {**theirs.answers, **own}))
    return replace(first, runs=runs)


def _table(measured: Measured, spec: StudyTable) -> ResultTable:
    wanted = spec.families or (MAIN_FAMILY,)
    families = [family for family in wanted if family in measured.families]
    if spec.judge and not all(spec.judge in run.judges for run in measured.runs):
        families = []
    columns: dict[str, str] = {}
    rows: dict[str, dict[str, Cell]] = {}
    note = spec.note
    if spec.differences:
        for a, b in spec.differences:
            if {a, b} <= {*measured.arms}:
                rows[f"{a} − {b}"] = _difference(measured, spec, families, (a, b), columns)
        if spec.categories:
            below = [f"{row} in {c}" for row, cells in rows.items() for c, value in cells.items() if _below(value)]
            note += f" Means below 0: {', '.join(below) or 'none'}."
    else:
        arms = [arm for arm in spec.arms or measured.arms if arm in measured.arms]
        if set(spec.about or arms) & {*measured.arms}:
            rows = {arm: _means(measured, spec, families, arm, columns) for arm in arms}
    return ResultTable(spec.title, note.strip(), measured.prompts(families), columns, rows, bool(spec.differences))


def _means(
    measured: Measured, spec: StudyTable, families: Sequence[str], arm: str, columns: dict[str, str]
) -> dict[str, Cell]:
    """An arm's row; its columns are added to `columns`."""
    row: dict[str, Cell] = {}
    if spec.by_seed:
        row = {_label(name): v for name, v in measured.seed_means(arm).items() if name in spec.measures}
        columns |= {_label(name): name for name in spec.measures if _label(name) in row}
        return row
    for family in families:
        found = measured.metrics(family, [arm], spec.change, judge=spec.judge)[arm]
        for name in spec.measures:
            label = column_name(spec, family, name)
            if name in found.means:
                row[label], columns[label] = found.means[name], name
            if spec.change and name in found.differences:
                row[f"{label}: change"], columns[f"{label}: change"] = found.differences[name], name
    if spec.pairs and (pairs := measured.pair_cells(arm)):
        columns |= {name: name for name in PAIR_COLUMNS}
        row |= pairs
    return row


def _difference(
    measured: Measured, spec: StudyTable, families: Sequence[str], arms: tuple[str, str], columns: dict[str, str]
) -> dict[str, Cell]:
    """The row of one arm minus another; its columns are added to `columns`."""
    row: dict[str, Cell] = {}
    first = spec.measures[0]
    for family in families:
        found = measured.metrics(family, arms[:1], arms[1], judge=spec.judge)[arms[0]]
        if spec.categories:
            of_category = {c: v[first] for c, v in found.differences_by_category.items() if first in v}
            columns |= dict.fromkeys(of_category, first)
            row |= of_category
            continue
        for name in spec.measures:
            if name in found.differences:
                label = column_name(spec, family, name)
                row[label], columns[label] = found.differences[name], name
    if spec.by_seed:
        label = f"{_label(first)} by seed"
        mine, other = (measured.seed_means(arm)[first] for arm in arms)
        row[label], columns[label] = [a - b for a, b in zip(mine, other, strict=True)], first
    return row


def column_name(spec: StudyTable, family: str, measure: str) -> str:
    if not spec.families:
        return _label(measure)
    return family if len(spec.measures) == 1 else f"{family}: {_label(measure)}"


def _below(value: Cell) -> bool:
    return isinstance(value, Interval) and value.mean < 0


def _label(measure: str) -> str:
    return measure.upper() if measure.startswith("hh_") else measure


def study_markdown(study: Results, *, title: str) -> str:
    """The study as a Markdown page: one heading a table, each saying over how many prompts, seeds and resamples."""
    parts = [
        f"# {title}",
        "Cells are `mean [low, high]`: every measure is averaged over the seeds prompt by prompt, then bootstrapped "
        "over prompts (percentile interval, 95%). The intervals speak of other prompts; the spread over seeds stands "
        "in the last table.",
    ]
    for table in study.tables.values():
        parts += [f"## {table.title}", f"{table.note}", over_what(study, table), table_markdown(table)]
    return "\n\n".join(parts) + "\n"


def over_what(study: Results, table: ResultTable) -> str:
    """Over how many prompts, seeds and resamples a table is."""
    seeds = f"{len(study.seeds)} seed{'s' * (len(study.seeds) > 1)} ({', '.join(map(str, study.seeds))})"
    prompts = ", ".join(f"{count} prompts ({family})" for family, count in table.prompts.items())
    return f"{prompts}; {seeds}; {study.resamples} resamples."


def table_markdown(table: ResultTable) -> str:
    lines = [["", *table.columns], ["---", *["---:"] * len(table.columns)]]
    for name, row in table.rows.items():
        lines.append([name, *(_written(table, label, row.get(label)) for label in table.columns)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _written(table: ResultTable, label: str, value: Cell | None) -> str:
    measure = table.columns[label]
    signed = table.signed or label.endswith("change")
    if isinstance(value, list):
        return " ".join(number(measure, x, signed=signed) for x in value) + (" %" if is_share(measure) else "")
    return cell(measure, value, signed=signed)
