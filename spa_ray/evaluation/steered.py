"""Sections of a page on answers that should have certain scores: how far sensed scores are off, whether steering an
attribute moves it, the objectives side by side, and what training and sensing cost.

Takes measured runs; returns Markdown and plain data. All intervals are over prompts, each the mean over the seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from spa_ray.evaluation.agreement import spearman
from spa_ray.evaluation.bootstrap import Interval, as_json, ratio_interval, statistic_interval
from spa_ray.evaluation.prompts import MAIN_FAMILY
from spa_ray.evaluation.study import Measured
from spa_ray.evaluation.tables import cell, markdown_table
from spa_ray.evaluation.wishes import (
    CONSTANT,
    LEVELS,
    SENSED,
    SENSING,
    Floats,
    error_shares,
    sensing_targets,
)

BINS = 10
NAMED = {"": "the best annotated answer's scores", " (wish)": "the wish"}


def sensed_section(measured: Measured, arms: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Sensed scores against the best constant on prompts with a cue, and the shares of |s - ŝ|."""
    head = ["", "compared with", "sensed", "best constant", "less error"]
    rows, bars, data = [], [], {}
    for arm in (arm for arm in arms if arm in measured.arms):
        values = measured.by_prompt(arm)
        data[arm] = {suffix: found for suffix in NAMED if (found := sensing(values, suffix, measured)) is not None}
        for suffix, found in data[arm].items():
            cells = [
                cell(*each)
                for each in ((SENSING, found["sensed"]), (SENSING, found["constant"]), ("gain", found["gain"]))
            ]
            rows.append([arm, NAMED[suffix], *cells])
        shares = shares_of(measured, arm)
        data[arm] = as_json(data[arm]) | {"shares": shares}
        bars += [[arm, NAMED[suffix], *(f"{share:.1%}" for share in found)] for suffix, found in shares.items()]
    edges = [f"{k / BINS:.1f}–{(k + 1) / BINS:.1f}" for k in range(BINS)]
    tables = [markdown_table(head, rows), "Shares of |s - ŝ| over prompts with a cue and objectives:"]
    return "\n\n".join([*tables, markdown_table(["", "compared with", *edges], bars)]), data


def sensing(values: Mapping[str, Floats], suffix: str, measured: Measured) -> dict[str, Interval] | None:
    """`sensed` and `constant`: mean absolute errors on the same prompts; `gain`: by which share the first is smaller.
    None where nothing was sensed."""
    if SENSING + suffix not in values:
        return None
    both = np.stack([values[SENSING + suffix], values[CONSTANT + suffix]])
    known = np.isfinite(both[0]) & np.isfinite(both[1])
    ours, constant = both[:, known]
    ones, bootstrap = np.ones(len(ours)), {"resamples": measured.resamples, "seed": measured.seed}
    ratio = ratio_interval(ours, np.maximum(constant, 1e-12), **bootstrap)
    return {
        "sensed": ratio_interval(ours, ones, **bootstrap),
        "constant": ratio_interval(constant, ones, **bootstrap),
        "gain": Interval(1 - ratio.mean, 1 - ratio.high, 1 - ratio.low, ratio.n),
    }


def shares_of(measured: Measured, arm: str) -> dict[str, list[float]]:
    """The shares of |s - ŝ| by what s is, over all seeds."""
    seeds = [answers.scores_beside(measured.objectives) for answers in measured.answers(arm, MAIN_FAMILY)]
    seeds = [beside for beside in seeds if SENSED in beside]
    targets = [sensing_targets(beside) for beside in seeds]
    return {
        suffix: error_shares(np.concatenate([b[SENSED] for b in seeds]), np.concatenate([t[suffix] for t in targets]))
        for suffix in (targets[0] if targets else ())
    }


def steering_section(measured: Measured, arms: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Rank correlations between the level that was asked of one attribute, the rest sensed, and every attribute's
    score. What is asked of an attribute moves that one, and those in conflict with it the other way."""
    parts, data = [], {}
    for arm in (arm for arm in arms if arm in measured.arms):
        if not (found := steering(measured, arm)):
            continue
        data[arm] = found
        rows = [
            [asked, *(cell("correlation", row[name]) for name in measured.objectives)] for asked, row in found.items()
        ]
        against = [
            f"{asked} lowers {name}"
            for asked, row in found.items()
            for name, value in row.items()
            if name != asked and value is not None and value.high < 0
        ]
        parts += [f"`{arm}`:", markdown_table(["asked of", *measured.objectives], rows)]
        parts.append(f"In conflict: {', '.join(against) or 'none'}.")
    return "\n\n".join(parts), as_json(data)


def steering(measured: Measured, arm: str) -> dict[str, dict[str, Interval | None]]:
    """Attribute that a level was asked of -> objective -> the rank correlation of levels and its scores."""
    seeds = measured.answers(arm, MAIN_FAMILY)
    shared = sorted(set[str].intersection(*(set(answers.prompt_ids) for answers in seeds)))
    places = [{prompt: at for at, prompt in enumerate(answers.prompt_ids)} for answers in seeds]
    rows = [[at[prompt] for prompt in shared] for at in places]
    scores = np.mean([answers.scores[at] for answers, at in zip(seeds, rows, strict=True)], axis=0)
    beside = seeds[0].scores_beside(measured.objectives)
    if LEVELS not in beside:
        return {}
    levels = beside[LEVELS][rows[0]]
    return {
        asked: {
            name: statistic_interval(
                spearman, levels[:, k], scores[:, j], resamples=measured.resamples, seed=measured.seed
            )
            for j, name in enumerate(measured.objectives)
        }
        for k, asked in enumerate(measured.objectives)
    }


def cost_section(costs: Sequence[Mapping[str, Mapping[str, float]]], arms: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Means over the seeds. costs: one mapping a seed, arm -> `pipeline.study.read_costs`."""
    arms = [arm for arm in arms or costs[0] if arm in costs[0]]
    mean = {arm: {name: float(np.mean([seed[arm][name] for seed in costs])) for name in costs[0][arm]} for arm in arms}
    names = list(dict.fromkeys(name for found in mean.values() for name in found))
    rows = [[arm, *(f"{found[name]:,.1f}" if name in found else "" for name in names)] for arm, found in mean.items()]
    return markdown_table(["", *names], rows), mean
