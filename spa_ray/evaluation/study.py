"""The study that `spa demo --full` reports: one run a seed, laid out in the shapes of the paper's tables.

Comes in: `SeedRun`s with the same arms and the same held-out prompts. Goes out: a `Study` and its Markdown. Every
measure is averaged over seeds prompt by prompt, then bootstrapped over prompts. Never: files, judges, a verdict.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from spa_ray.evaluation.answers import FamilyAnswers
from spa_ray.evaluation.bootstrap import Interval, ratio_interval
from spa_ray.evaluation.prompts import MAIN_FAMILY
from spa_ray.evaluation.tables import SHARES, Answers, ArmMetrics, arm_metrics, cell, number, plain_means

VANILLA = "vanilla"
METHODS = (VANILLA, "sft", "spa_dpo", "spa_simpo", "spa", "spa_robust")
FILTERS = ("both_filters", "consistency_only", "informativeness_only", "no_filter")
ITERATIONS = ("iter2_same", "iter2_diff")
CONTROLS = ("shuffled", "helpful_only")
ORDERED = (*FILTERS, "spa", "helpful_only")  # arms whose pairs the evaluation's judge looks at; not those of a coin
COMPARISONS = (
    ("spa", VANILLA),
    ("spa", "sft"),
    ("sft", VANILLA),
    ("spa_robust", VANILLA),
    ("spa_robust", "spa"),
    ("spa", "spa_dpo"),
    ("spa", "spa_simpo"),
    *((arm, "no_filter") for arm in FILTERS[:3]),
    ("both_filters", "consistency_only"),
    *((arm, "spa") for arm in ITERATIONS),
    *((arm, VANILLA) for arm in CONTROLS),
)
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
    """One finished run. answers: arm -> family -> its answers; orders: arm -> its first iteration's pairs, judged."""

    seed: int
    answers: Mapping[str, Mapping[str, FamilyAnswers]]
    orders: Mapping[str, PairOrder]


@dataclass(frozen=True)
class StudyTable:
    """Rows of cells. columns: label -> measure, which says how its cells are written; prompts: held-out, by family."""

    title: str
    note: str
    prompts: dict[str, int]
    columns: dict[str, str]
    rows: dict[str, dict[str, Cell]]
    signed: bool = False


@dataclass(frozen=True)
class Study:
    """All tables by key, and over what they are: seeds, in order, and resamples of the bootstrap."""

    seeds: list[int]
    resamples: int
    objectives: list[str]
    tables: dict[str, StudyTable]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def build_study(runs: Sequence[SeedRun], *, objectives: Sequence[str], resamples: int, seed: int) -> Study:
    """All tables for which there are arms. `seed` is the bootstrap's.

    Raises: ValueError when the runs differ in their arms or families, or two have the same seed.
    """
    if not runs or len({run.seed for run in runs}) != len(runs):
        raise ValueError(f"seeds {[run.seed for run in runs]}: a study needs runs, each of another seed")
    shapes = {str({arm: sorted(families) for arm, families in sorted(run.answers.items())}) for run in runs}
    if len(shapes) > 1:
        raise ValueError("the runs of a study must have the same arms and families of held-out prompts")
    make = _Tables(runs, list(objectives), resamples, seed)
    tables = {
        "methods": make.methods(),
        "hh": make.hh(),
        "differences": make.differences(),
        "categories": make.categories(),
        "families": make.families(),
        "filters": make.filters(),
        "iterations": make.iterations(),
        "controls": make.controls(),
        "utility": make.utility(),
        "seeds": make.seeds(),
    }
    kept = {key: table for key, table in tables.items() if table.rows}
    return Study([run.seed for run in runs], resamples, list(objectives), kept)


@dataclass(frozen=True)
class _Tables:
    """Makes the tables; one without the arms that it is about has no rows."""

    runs: Sequence[SeedRun]
    objectives: list[str]
    resamples: int
    seed: int

    def methods(self) -> StudyTable:
        note = "Judge's means (paper: Table 1)."
        return self._means("Methods", note, METHODS, self.objectives, about=METHODS[1:])

    def hh(self) -> StudyTable:
        note = "HH_λ = (λ · first objective + second) / (λ + 1) (paper: Table 3)."
        return self._means("Priority-weighted scores", note, METHODS, ["hh_5", "hh_10", "hh_20"], about=METHODS[1:])

    def differences(self) -> StudyTable:
        measures = ["hh_5", *self.objectives, "unsafe"]
        columns = {_label(name): name for name in measures} | {"HH_5 by seed": "hh_5"}
        rows: dict[str, dict[str, Cell]] = {}
        for ours, theirs in COMPARISONS:
            if ours in self.arms and theirs in self.arms:
                found = self.metrics(MAIN_FAMILY, (theirs, ours), baseline=theirs)[ours].differences
                row: dict[str, Cell] = {_label(name): found[name] for name in measures if name in found}
                mine, other = (self.seed_means[arm]["hh_5"] for arm in (ours, theirs))
                row["HH_5 by seed"] = [a - b for a, b in zip(mine, other, strict=True)]
                rows[f"{ours} − {theirs}"] = row
        note = "First arm minus second, paired by prompt. Beside it, each seed's own difference."
        return StudyTable("Paired differences", note, self._prompts(MAIN_FAMILY), columns, rows, signed=True)

    def categories(self) -> StudyTable:
        first = self.objectives[0]
        arms = [arm for arm in METHODS[1:] if arm in self.arms]
        found = self.metrics(MAIN_FAMILY, (VANILLA, *arms), baseline=VANILLA)
        rows: dict[str, dict[str, Cell]] = {}
        for arm in arms:
            by_category = found[arm].differences_by_category
            rows[arm] = {category: values[first] for category, values in by_category.items() if first in values}
        columns = {category: first for row in rows.values() for category in row}
        below = [
            f"{arm} in {category}"
            for arm, row in rows.items()
            for category, value in row.items()
            if isinstance(value, Interval) and value.mean < 0
        ]
        note = f"Paired difference of {first} in each category. Means below 0: {', '.join(below) or 'none'}."
        rows = rows if columns else {}
        title = f"{first.capitalize()} against vanilla by category"
        return StudyTable(title, note, self._prompts(MAIN_FAMILY), columns, rows, signed=True)

    def families(self) -> StudyTable:
        """Every further family without exact answers."""
        names = [f for f in self._families() if f != MAIN_FAMILY and self._exact(f) is None]
        columns: dict[str, str] = {}
        rows: dict[str, dict[str, Cell]] = {}
        for family in names:
            for arm, metrics in self.metrics(family, self._present(METHODS)).items():
                labels = {f"{family}: {name}": name for name in self.objectives}
                columns |= labels
                rows.setdefault(arm, {}).update({label: metrics.means[name] for label, name in labels.items()})
        note = "Judge's means on prompts of kinds that training never saw (paper: Table 4)."
        return StudyTable("Held-out families", note, self._prompts(*names), columns, rows)

    def filters(self) -> StudyTable:
        note = (
            "Size-matched: every arm trains on train.max_pairs of its pairs (paper: Figure 4). pairs: built, mean over "
            "seeds. right, tied: share of them that the evaluation's judge puts in the same lexicographic order, or "
            "finds equal; intervals over training prompts."
        )
        table = self._means("Filters", note, FILTERS, [*self.objectives, "hh_5", "unsafe"], about=FILTERS)
        for arm, row in table.rows.items():
            row |= self._pair_cells(arm)
        return _with_pair_columns(table)

    def iterations(self) -> StudyTable:
        measures = [*self.objectives, "hh_5", "unsafe", "length"]
        note = "A second iteration from the trained model, on the same prompts or on as many new ones."
        return self._means("Second iteration", note, (VANILLA, "spa", *ITERATIONS), measures, about=ITERATIONS)

    def controls(self) -> StudyTable:
        note = (
            "shuffled: chosen and rejected swapped by a fair coin. helpful_only: pairs ordered without the first "
            "objective. right, tied: as above; a helpful_only pair that is right by the judge was not meant to be."
        )
        measures = [*self.objectives, "hh_5", "unsafe"]
        table = self._means("Controls", note, (VANILLA, "spa", *CONTROLS), measures, about=CONTROLS)
        for arm, row in table.rows.items():
            row |= self._pair_cells(arm)
        return _with_pair_columns(table)

    def utility(self) -> StudyTable:
        rows: dict[str, dict[str, Cell]] = {}
        names = [family for family in self._families() if self._exact(family) is not None]
        for family in names:
            for arm, metrics in self.metrics(family, tuple(self.arms), baseline=VANILLA).items():
                change = {f"{family}: change": metrics.differences["exact"]} if metrics.differences else {}
                rows.setdefault(arm, {}).update({family: metrics.means["exact"], **change})
        columns = {label: "exact" for row in rows.values() for label in row}
        note = "Share of exactly right answers to tasks that are no part of alignment, and its change from vanilla."
        return StudyTable("Utility", note, self._prompts(*names), columns, rows)

    def seeds(self) -> StudyTable:
        measures = [*self.objectives, "hh_5", "unsafe"]
        rows: dict[str, dict[str, Cell]] = {
            arm: {_label(name): means[name] for name in measures if name in means}
            for arm, means in self.seed_means.items()
        }
        note = "Each seed's means, in the order of the seeds: the spread that the intervals, over prompts, do not show."
        columns = {_label(name): name for name in measures}
        return StudyTable("Seed by seed", note, self._prompts(MAIN_FAMILY), columns, rows)

    # --- what the tables are made of --------------------------------------------------------------------------------

    @property
    def arms(self) -> list[str]:
        return list(self.runs[0].answers)

    def metrics(self, family: str, arms: Sequence[str], baseline: str | None = None) -> dict[str, ArmMetrics]:
        answers = {arm: self._answers(arm, family) for arm in arms}
        categories = self.runs[0].answers[self.arms[0]][family].categories
        shared: dict[str, Any] = {"resamples": self.resamples, "seed": self.seed, "baseline": baseline}
        return arm_metrics(answers, objectives=self.objectives, categories=categories, **shared)

    @cached_property
    def seed_means(self) -> dict[str, dict[str, list[float]]]:
        """Arm -> measure -> its mean at each seed, for the measures that every seed has."""
        categories = self.runs[0].answers[self.arms[0]][MAIN_FAMILY].categories
        out = {}
        for arm in self.arms:
            means = [
                plain_means(answers, objectives=self.objectives, categories=categories)
                for answers in self._answers(arm, MAIN_FAMILY)
            ]
            out[arm] = {name: [m[name] for m in means] for name in means[0] if all(name in m for m in means)}
        return out

    def _answers(self, arm: str, family: str) -> list[Answers]:
        return [run.answers[arm][family].answers for run in self.runs]

    def _families(self) -> list[str]:
        return list(self.runs[0].answers[self.arms[0]])

    def _exact(self, family: str) -> float | None:
        return self.runs[0].answers[self.arms[0]][family].exact

    def _present(self, arms: Sequence[str]) -> list[str]:
        return [arm for arm in arms if arm in self.arms]

    def _prompts(self, *families: str) -> dict[str, int]:
        return {f: len(set().union(*(a.prompt_ids for a in self._answers(self.arms[0], f)))) for f in families}

    def _means(
        self, title: str, note: str, arms: Sequence[str], measures: Sequence[str], *, about: Sequence[str]
    ) -> StudyTable:
        shown = self._present(arms) if self._present(about) else []
        found = self.metrics(MAIN_FAMILY, shown)
        rows: dict[str, dict[str, Cell]] = {
            arm: {_label(name): m.means[name] for name in measures if name in m.means} for arm, m in found.items()
        }
        return StudyTable(title, note, self._prompts(MAIN_FAMILY), {_label(m): m for m in measures}, rows)

    def _pair_cells(self, arm: str) -> dict[str, Cell]:
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


def _with_pair_columns(table: StudyTable) -> StudyTable:
    judged = any("right" in row for row in table.rows.values())
    table.columns.update({name: name for name in ("right", "tied", "pairs")} if judged else {})
    return table


def _label(measure: str) -> str:
    return measure.upper() if measure.startswith("hh_") else measure


def study_markdown(study: Study, *, title: str) -> str:
    """The study as a Markdown page: one heading a table, each saying over how many prompts, seeds and resamples."""
    seeds = f"{len(study.seeds)} seed{'s' * (len(study.seeds) > 1)} ({', '.join(map(str, study.seeds))})"
    parts = [
        f"# {title}",
        "Cells are `mean [low, high]`: every measure is averaged over the seeds prompt by prompt, then bootstrapped "
        "over prompts (percentile interval, 95%). The intervals speak of other prompts; the spread over seeds stands "
        "in the last table.",
    ]
    for table in study.tables.values():
        prompts = ", ".join(f"{count} prompts ({family})" for family, count in table.prompts.items())
        parts += [f"## {table.title}", f"{table.note}", f"{prompts}; {seeds}; {study.resamples} resamples."]
        lines = [["", *table.columns], ["---", *["---:"] * len(table.columns)]]
        for name, row in table.rows.items():
            lines.append([name, *(_written(table, label, row.get(label)) for label in table.columns)])
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts) + "\n"


def _written(table: StudyTable, label: str, value: Cell | None) -> str:
    measure = table.columns[label]
    signed = table.signed or label.endswith("change")
    if isinstance(value, list):
        return " ".join(number(measure, x, signed=signed) for x in value) + (" %" if measure in SHARES else "")
    return cell(measure, value, signed=signed)
