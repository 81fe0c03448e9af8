"""What a run found, in one sentence: what changed beyond its interval, what did not, or what is still to come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spa_ray.evaluation.bootstrap import Interval
from spa_ray.evaluation.tables import number
from spa_ray.report.run_data import VANILLA, RunData


def headline(run: RunData) -> str:
    """One sentence about the main arm's first family; of a run without an evaluation about its pairs."""
    arm = run.main_arm
    if arm is None:
        return _unfinished(run)
    found = next(iter(run.metrics.values()))[arm]
    n, differences = found["n"], found["differences"]
    if not differences:
        return f"{arm} was measured on {n} held-out prompts, without a model to compare it with."
    base = "the model as it was" if run.baseline == VANILLA else run.baseline
    return f"{sentence(arm, run.objectives, found, base)}, on {n:,} held-out prompts."


def sentence(arm: str, objectives: Sequence[str], found: Mapping[str, Any], base: str) -> str:
    """Which objectives an arm raised or lowered, and which not by more than chance (95 % intervals)."""
    groups: dict[str, list[str]] = {"raises": [], "lowers": [], "leaves": []}
    for name in objectives:
        if name in found["differences"]:
            change, mean = Interval(**found["differences"][name]), Interval(**found["means"][name])
            by = f"{number(name, change.mean, signed=True)} [{bounds(name, change)}]"
            verb = direction(change)
            told = f"{name} to {number(name, mean.mean)} ({by})" if verb != "leaves" else f"{name} ({by})"
            groups[verb].append(told)
    parts = [f"{verb} {listed(names)}" for verb, names in groups.items() if names and verb != "leaves"]
    if groups["leaves"]:
        parts.append(f"shows no clear change in {listed(groups['leaves'])}")
    return f"{arm} {listed(parts)} against {base}" if parts else f"{arm}: no objective was compared"


def direction(change: Interval) -> str:
    return "raises" if change.low > 0 else "lowers" if change.high < 0 else "leaves"


def bounds(name: str, interval: Interval) -> str:
    return f"{number(name, interval.low, signed=True)}, {number(name, interval.high, signed=True)}"


def listed(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _unfinished(run: RunData) -> str:
    verb = "are" if len(run.unfinished) > 1 else "is"
    waiting = f"{listed(run.unfinished)} {verb} still to come" if run.unfinished else "there are no held-out scores"
    if not run.funnels:
        return f"No pairs have been made yet; {waiting}."
    funnel = run.funnels[0].value
    return (
        f"{funnel['kept']:,} of {funnel['prompts']:,} prompts were kept and gave {funnel['pairs']:,} pairs; {waiting}."
    )
