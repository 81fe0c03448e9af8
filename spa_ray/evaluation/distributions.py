"""How scores are spread before and after: candidates beside refined answers, held-out answers arm by arm; and the
funnels of several arms side by side.

Comes in: score arrays and funnels as JSON. Goes out: plain counts, and their Markdown. Never: files, judges.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Histogram = dict[int, int]  # a score, rounded -> how many


def histograms(groups: Mapping[str, NDArray[np.float64]], objectives: Sequence[str]) -> dict[str, dict[str, Histogram]]:
    """Objective -> group -> its histogram. groups: name -> scores (n, k), NaN where a judgement failed.

    Raises: ValueError for arrays that have not one column an objective.
    """
    for name, scores in groups.items():
        if scores.ndim != 2 or scores.shape[1] != len(objectives):
            raise ValueError(f"histograms: {name} has shape {scores.shape}, not one column for each of {objectives}")
    return {
        objective: {name: _counted(scores[:, at]) for name, scores in groups.items()}
        for at, objective in enumerate(objectives)
    }


def histogram_markdown(groups: Mapping[str, Histogram]) -> str:
    """One objective's histograms: a row a group, a column a score, each the share of that group's scores."""
    bins = sorted(set().union(*groups.values()))
    lines = [["", *map(str, bins), "mean", "scores"], ["---", *["---:"] * (len(bins) + 2)]]
    for name, found in groups.items():
        count = sum(found.values())
        mean = sum(score * n for score, n in found.items()) / count if count else float("nan")
        shares = [f"{found.get(score, 0) / count:.1%}" if count else "" for score in bins]
        lines.append([name, *shares, f"{mean:.2f}" if count else "", f"{count:,}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def funnel_table(funnels: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, float]]:
    """Arm -> what its funnels count, the mean over seeds: prompts, dropped by reason, kept, pairs by kind and by the
    objective that decides, dead pairs, τ where there is one."""
    table: dict[str, dict[str, float]] = {}
    for arm, seeds in funnels.items():
        rows = [_flat(funnel) for funnel in seeds]
        table[arm] = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    return table


def funnel_markdown(table: Mapping[str, Mapping[str, float]]) -> str:
    """What is counted in rows, arms in columns."""
    names = dict.fromkeys(name for row in table.values() for name in row)
    lines = [["", *table], ["---", *["---:"] * len(table)]]
    for name in names:
        digits = 2 if name == "τ" else 0
        cells = [f"{row[name]:,.{digits}f}" if name in row else "" for row in table.values()]
        if name == "τ" or any(row.get(name) for row in table.values()):
            lines.append([name, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def scores_markdown(spread: Mapping[str, Mapping[str, Mapping[str, Histogram]]]) -> str:
    """Histograms by what they are of, then by objective and group."""
    parts = [
        f"{what}: {name}\n\n{histogram_markdown(groups)}" for what, f in spread.items() for name, groups in f.items()
    ]
    return "\n\n".join(parts)


def _flat(funnel: Mapping[str, Any]) -> dict[str, float]:
    flat = {
        "prompts": funnel["prompts"],
        **{f"dropped: {reason}": count for reason, count in funnel["dropped"].items()},
        "kept": funnel["kept"],
        "pairs": funnel["pairs"],
        **{f"pairs: {kind}": count for kind, count in funnel["pairs_by_kind"].items()},
        **{f"decided by {name}": count for name, count in funnel["pairs_by_decided_by"].items()},
        "dead pairs": funnel["dead_pairs"],
    }
    return flat if funnel["tau"] is None else {**flat, "τ": funnel["tau"]}


def _counted(scores: NDArray[np.float64]) -> Histogram:
    return dict(sorted(Counter(int(score) for score in np.rint(scores[np.isfinite(scores)])).items()))
