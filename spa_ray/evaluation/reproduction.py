"""A paper's tables beside ours, and whether the directions agree.

Comes in: measured runs, their study's tables and the published numbers. Goes out: Markdown and plain data. A direction
is the sign of a difference between two arms; ours has one where its interval leaves out 0. Never: files, runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from spa_ray.config.pairwise import REFERENCE
from spa_ray.config.study import PaperFigure, StudyTable
from spa_ray.evaluation.bootstrap import Interval
from spa_ray.evaluation.prompts import MAIN_FAMILY
from spa_ray.evaluation.published import Published
from spa_ray.evaluation.study import Measured, Results, column_name, over_what, table_markdown
from spa_ray.evaluation.tables import cell

AGREES, DIFFERS, UNCLEAR, MIXED = "agrees", "differs", "no difference here", "the paper gives no one direction"


@dataclass(frozen=True)
class Comparison:
    """Arm `a` minus arm `b` on one of our columns: the paper's differences, ours, and what is to be said of both."""

    a: str
    b: str
    column: str
    measure: str
    paper: list[float]
    ours: Interval
    verdict: str


def compare(measured: Measured, spec: StudyTable, paper: Published) -> list[Comparison]:
    """All comparisons that a table asks for and that both sides have numbers for."""
    section = spec.paper
    assert section is not None
    paper = paper.turned() if section.turned else paper
    found = []
    families = spec.families or (MAIN_FAMILY,)
    places = {column_name(spec, family, name): (family, name) for family in families for name in spec.measures}
    for a, b in section.compare:
        if not {a, b} <= {*measured.arms}:
            continue
        for column, theirs in section.columns.items():
            family, measure = places[column]
            if family not in measured.families:
                continue
            differences = [paper.difference(section.rows.get(a, a), section.rows.get(b, b), name) for name in theirs]
            given = [difference for difference in differences if difference is not None]
            ours = measured.metrics(family, [a], b, judge=spec.judge)[a].differences.get(measure)
            if given and ours is not None:
                found.append(Comparison(a, b, column, measure, given, ours, verdict(given, ours)))
    return found


def verdict(paper: Sequence[float], ours: Interval) -> str:
    """Whether our difference points where all of the paper's do."""
    signs = {(x > 0) - (x < 0) for x in paper}
    if len(signs) > 1 or 0 in signs:
        return MIXED
    mine = (ours.low > 0) - (ours.high < 0)
    return UNCLEAR if mine == 0 else AGREES if {mine} == signs else DIFFERS


def in_a_sentence(found: Sequence[Comparison]) -> str:
    """How many directions agree."""
    counts = Counter(c.verdict for c in found)
    told = len(found) - counts[MIXED]
    if not told:
        return "The paper gives no one direction."
    parts = [f"{counts[AGREES]} agree", f"{counts[DIFFERS]} differ", f"{counts[UNCLEAR]} show no difference here"]
    rest = f"; for {counts[MIXED]} more the paper gives no one direction" if counts[MIXED] else ""
    return f"Of {told} directions of the paper {', '.join(parts)}{rest}."


def table_section(measured: Measured, results: Results, key: str, spec: StudyTable, paper: Published) -> str:
    """One published table, ours, the comparisons, and what is said of them."""
    assert spec.paper is not None
    ours = results.tables[key]
    found = compare(measured, spec, paper)
    parts = [f"## {paper.title}"]
    if paper.rows:
        parts += ["The paper:", _rows(paper.columns, paper.rows)]
    parts += [f"Here: {ours.note} {over_what(results, ours)}", table_markdown(ours)]
    if found:
        parts += [f"**{in_a_sentence(found)}**", _comparisons(found)]
    return "\n\n".join([*parts, *([spec.paper.why.strip()] if spec.paper.why else [])])


def own_section(results: Results, key: str) -> str:
    """A table that no published one stands beside."""
    ours = results.tables[key]
    return "\n\n".join([f"## {ours.title}", f"{ours.note} {over_what(results, ours)}".strip(), table_markdown(ours)])


def win_rates_section(figure: PaperFigure, seeds: Sequence[Mapping[str, Any]]) -> str:
    """The pairwise comparisons of all seeds together. `seeds`: each one's `win_rates.json`, arm -> its comparison."""
    arms = [arm for arm in seeds[0] if not figure.arms or arm in figure.arms]
    families = seeds[0][arms[0]]["families"]
    columns = [
        (family, objective)
        for family, objectives in families.items()
        if not figure.families or family in figure.families
        for objective in objectives
    ]
    head = [objective if family == MAIN_FAMILY else f"{family}: {objective}" for family, objective in columns]
    against = seeds[0][arms[0]]["against"]
    strict = against == REFERENCE  # as the SGA paper counts
    lines = [["", *head], ["---", *["---:"] * len(head)]]
    for arm in arms:
        cells = []
        for family, objective in columns:
            found = [seed[arm]["families"][family][objective] for seed in seeds]
            wins, ties, losses = (sum(f[name] for f in found) for name in ("wins", "ties", "losses"))
            share = (wins + (0 if strict else ties / 2)) / max(1, wins + ties + losses)
            cells.append(f"{wins} / {ties} / {losses}  {share:.1%}")
        lines.append([arm, *cells])
    over = f"{len(seeds)} seed{'s' * (len(seeds) > 1)}"
    rule = "wins / all" if strict else "(wins + ties / 2) / all"
    what = f"Wins / ties / losses against {against} over {over}, and {rule}."
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{what}\n\n{table}"


def as_data(found: Sequence[Comparison]) -> list[dict[str, Any]]:
    return [asdict(comparison) for comparison in found]


def not_here(missing: Mapping[str, str]) -> str:
    """What the world cannot hold."""
    return "\n".join(["## Not here", "", *(f"- **{what}**: {why}" for what, why in missing.items())])


def _rows(columns: Sequence[str], rows: Mapping[str, Sequence[float]]) -> str:
    lines = [["", *columns], ["---", *["---:"] * len(columns)]]
    lines += [[name, *(f"{value:g}" if value < 1 else f"{value:.2f}" for value in row)] for name, row in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _comparisons(found: Sequence[Comparison]) -> str:
    lines = [["", "measure", "paper", "here", ""], ["---", "---", "---:", "---:", "---"]]
    for c in found:
        theirs = " ".join(f"{x:+.2f}" for x in c.paper)
        ours = cell(c.measure, c.ours, signed=True)
        lines.append([f"{c.a} − {c.b}", c.column, theirs, ours, c.verdict])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
