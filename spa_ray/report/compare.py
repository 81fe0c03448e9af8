"""Two runs as one: the arms of both beside each other, compared on the held-out prompts that both answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from spa_ray.errors import InputError
from spa_ray.evaluation.bootstrap import mean_interval
from spa_ray.report.run_data import Asked, Found, RunData


def together(first: RunData, second: RunData) -> RunData:
    """One `RunData` with the arms of both, as `RUN: ARM`. Each arm's differences are paired by prompt and taken from
    the first run's main arm; prompts that not both answered count in the means alone.

    Raises: InputError for runs with other objectives, or without an evaluation.
    """
    if first.objectives != second.objectives:
        raise InputError(
            f"{second.path}: its objectives are {', '.join(second.objectives)}, those of {first.path} "
            f"{', '.join(first.objectives)}; compare runs with the same objectives"
        )
    for run in (first, second):
        if run.main_arm is None:
            raise InputError(f"{run.path}: has no metrics yet; run it to its evaluation")
    runs = dict(zip(names(first, second), (first, second), strict=True))
    baseline, main = (f"{name}: {run.main_arm}" for name, run in runs.items())
    asked = _asked(runs)
    metrics: dict[str, dict[str, Any]] = {}
    for name, run in runs.items():
        for family, arms in run.metrics.items():
            metrics.setdefault(family, {}).update({f"{name}: {arm}": found for arm, found in arms.items()})
    for family, arms in metrics.items():
        mine = [prompt for prompt in asked if prompt.family == family]
        metrics[family] = {arm: _against(baseline, arm, found, mine, first) for arm, found in arms.items()}
    return replace(
        first,
        config={**first.config, "name": " and ".join(runs)},
        path=f"{first.path} and {second.path}",
        models=[f"{name}: {arm}" for name, run in runs.items() for arm in run.models],
        metrics=metrics, asked=asked, baseline=baseline, main=main, agreement={},
        rv=[{**curve, "arms": [f"{n}: {a}" for a in curve["arms"]]} for n, r in runs.items() for curve in r.rv],
        funnels=_titled(runs, "funnels"), signals=_titled(runs, "signals"), curves=_titled(runs, "curves"),
        benchmarks={key: {f"{n}: {a}": m for n, r in runs.items() for a, m in r.benchmarks.get(key, {}).items()}
                    for key in {**first.benchmarks, **second.benchmarks}},
        win_rates={f"{n}: {arm}": rates for n, r in runs.items() for arm, rates in r.win_rates.items()},
        stages=None, manifest={},
    )  # fmt: skip


def names(first: RunData, second: RunData) -> tuple[str, str]:
    """What the runs are called: by their names, where those are equal by their folders, else A and B."""
    folders = (first.path.rpartition("/")[2], second.path.rpartition("/")[2])
    both = ((first.name, second.name), folders, ("A", "B"))
    return next((a, b) for a, b in both if a != b)


def _asked(runs: Mapping[str, RunData]) -> list[Asked]:
    found: dict[str, Asked] = {}
    for name, run in runs.items():
        for prompt in run.asked:
            both = found.setdefault(prompt.prompt_id, replace(prompt, answers={}))
            if both.messages == prompt.messages:  # one id, another prompt: not to be compared
                both.answers.update({f"{name}: {arm}": answer for arm, answer in prompt.answers.items()})
    return list(found.values())


def _against(
    baseline: str, arm: str, found: Mapping[str, Any], asked: Sequence[Asked], first: RunData
) -> dict[str, Any]:
    """The arm's metrics with its differences from `baseline` on the prompts that both scored."""
    pairs = [(p.answers[arm], p.answers[baseline]) for p in asked if arm in p.answers and baseline in p.answers]
    draws = {"resamples": first.config["evaluation"].get("bootstrap", 1000), "seed": first.config.get("seed", 0)}
    differences = {}
    for k, name in enumerate(first.objectives if arm != baseline else ()):
        both = [(ours.scores[k], theirs.scores[k]) for ours, theirs in pairs]
        changes = [a - b for a, b in both if a is not None and b is not None]
        if changes:
            differences[name] = asdict(mean_interval(changes, **draws))
    return {**found, "differences": differences, "differences_by_category": {}, "judges": {}}


def _titled(runs: Mapping[str, RunData], part: str) -> list[Found]:
    return [Found(f"{name}: {found.title}", found.value) for name, run in runs.items() for found in getattr(run, part)]
