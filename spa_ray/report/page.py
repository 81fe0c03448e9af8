"""From a run's data to the page and its Markdown: what is told, in which order. Jinja2 escapes every text."""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup

from spa_ray.evaluation.bootstrap import Interval
from spa_ray.evaluation.tables import UNSAFE_BELOW, ArmMetrics, is_share, markdown, number
from spa_ray.logs import printable
from spa_ray.report import charts, examples, tables
from spa_ray.report.compare import names
from spa_ray.report.headline import bounds, direction, headline
from spa_ray.report.packed import group_of, page_data
from spa_ray.report.run_data import RunData

CURVES = {
    "loss": "Loss", "rewards/accuracies": "Pairs ordered right", "rewards/margins": "Reward margin",
    "logps/chosen_per_token": "Log-prob of the chosen, per token", "grad_norm": "Gradient norm",
    "learning_rate": "Learning rate",
}  # fmt: skip
LOWER_IS_BETTER = ("unsafe",)


@cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("spa_ray.report"), autoescape=select_autoescape(["html.jinja"], default=False),
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    made.filters |= {
        "score": lambda score: "–" if score is None else f"{score:g}",
        "change": lambda changed: " / ".join(f"{c:+g}" for c in changed),
        "marks": examples.marks,
        "safe_text": printable,
        "indented": lambda text: "\n".join(f"    {line}" for line in printable(text).split("\n")),
        "as_markdown": lambda table: table.markdown(),
    }
    return made


def render(context: Mapping[str, Any]) -> tuple[str, str]:
    """(the page, its Markdown)."""
    files = resources.files("spa_ray.report").joinpath("templates")
    css, js = (files.joinpath(name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    digest = base64.b64encode(hashlib.sha256(js.encode()).digest()).decode()
    own = {"css": Markup(css), "js": Markup(js), "script_hash": f"sha256-{digest}"}  # the one script that may run
    page = _environment().get_template("report.html.jinja").render(**context, **own)
    return page.lstrip(), _environment().get_template("report.md.jinja").render(**context)


def context_of(run: RunData, *, sources: Sequence[RunData] = ()) -> dict[str, Any]:
    """What the templates are given. `sources`: the two runs that `run` is made of, where it is a comparison."""
    shown, arm, baseline = examples.of_run(run), run.main_arm, run.baseline
    answers, packed, kept = page_data(run) if run.asked else (None, "", 0)
    note = f"{len(run.asked):,} prompts, {len(run.models)} models; all of them in report.jsonl."
    if kept < len(run.asked):
        note = f"{kept:,} of {note}"
    arms = {name: k for k, name in enumerate(next(iter(run.metrics.values()), {}))}
    curves = {found.title: arms.get(found.title, k) for k, found in enumerate(run.curves, 1)}
    context = {
        "title": run.name,
        "state": state(run),
        "headline": headline(run),
        "facts": facts_line(run),
        "path": run.path,
        "judge": judge_name(run.config["evaluation"].get("judge")),
        "tiles": tiles(run),
        "objectives": run.objectives,
        "results": [family(run, name, arms) for name, arms in run.metrics.items()],
        "legend": charts.legend(arms),
        "examples": shown, "rule": examples.RULE, "baseline": baseline,
        "main_arm": arm or (run.models[-1] if run.models else ""),
        "fold": run.config["evaluation"].get("unsafe_below", UNSAFE_BELOW),
        "answers": answers, "packed": packed, "answers_note": note, "models": run.models,
        "groups": list(dict.fromkeys(map(group_of, run.asked))),
        "funnels": [(found.title, charts.funnel(found.value)) for found in run.funnels],
        "funnel_facts": [(found.title, found.value) for found in run.funnels],
        "signals": [drawn for found in run.signals for drawn in _ratings(found.title, found.value)],
        "signal_tables": [tables.signal_table(found.title, found.value) for found in run.signals],
        "advice": [one["text"] for found in run.signals for one in found.value.get("advice", [])],
        "curves": [pair for key, name in CURVES.items() for pair in _curve(run, key, name, curves)],
        "curve_legend": charts.legend(curves),
        "rv": [(", ".join(found.get("arms", [])), charts.rv(found)) for found in run.rv],
        "judging": tables.judging_tables(run),
        "plan": tables.plan_table(run), "cost": cost_line(run),
        "differing": tables.differing_table(sources, names(*sources)) if sources else None,
        "again": [again(source) for source in sources or [run]],
    }  # fmt: skip
    context["sections"] = sections(context)
    return context


def state(run: RunData) -> str:
    if run.unfinished:
        return f"still to come: {', '.join(run.unfinished)}"
    return "two runs" if run.main else "finished" if run.manifest else "not finished"


def sections(context: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = [("differ", "Differences", context["differing"]), ("results", "Results", context["results"]),
             ("examples", "Before and after", context["examples"]), ("all", "All answers", context["answers"]),
             ("data", "Pairs", context["funnels"] or context["signals"]), ("training", "Training", context["curves"]),
             ("judging", "Judges", context["judging"] or context["rv"]),
             ("plan", "Plan", context["plan"]), ("again", "Run it again", True)]  # fmt: skip
    return [(where, name) for where, name, there in found if there]


def family(run: RunData, name: str, arms: Mapping[str, Any]) -> dict[str, Any]:
    """One family of held-out prompts: its tables and pictures."""
    asked = [prompt for prompt in run.asked if prompt.family == name]
    baseline = run.baseline
    pair = (baseline, run.main_arm or baseline)
    compared = any(found["differences"] for found in arms.values())
    measured = {arm: ArmMetrics.from_dict(found) for arm, found in arms.items()}
    found = [
        tables.of_measures(arms, "means", ""),
        tables.of_measures(arms, "differences", f"Against {baseline}, paired by prompt"),
        *(tables.of_measures({a: f["judges"][judge] for a, f in arms.items()}, "means", f"By the judge {judge}")
          for judge in next(iter(arms.values())).get("judges", {})),
    ]  # fmt: skip
    spread = [charts.distribution(asked, pair, k, o) for k, o in enumerate(run.objectives)] if asked else []
    return {
        "name": name, "pair": pair, "tables": [table for table in found if table],
        "forest": charts.forest(arms, run.objectives, baseline) if compared else None,
        "plane": charts.plane(arms, run.objectives) if len(run.objectives) > 1 else None,
        "bubbles": charts.bubbles(asked, pair, run.objectives) if asked and len(run.objectives) > 1 else None,
        "bubble_note": f"Rings {pair[0]}, discs {pair[1]}; the area counts prompts.",
        "distributions": [drawn for drawn in spread if drawn],
        "categories": tables.by_category(arms, run.objectives),
        "means_md": markdown(measured), "differences_md": markdown(measured, differences=True) if compared else "",
    }  # fmt: skip


def tiles(run: RunData) -> list[dict[str, str]]:
    """The figures that a reader looks for first: each objective, unsafe answers, pairs, time."""
    found: list[dict[str, str]] = []
    arms: Mapping[str, Any] = next(iter(run.metrics.values()), {})
    if run.main_arm:
        mine = arms[run.main_arm]
        for name in [*run.objectives, "unsafe"]:
            if name in mine["differences"] and name in mine["means"]:
                change, after = Interval(**mine["differences"][name]), mine["means"][name]["mean"]
                unit, verb = " %" if is_share(name) else "", direction(change)
                good = "down" if (verb == "lowers") != (name in LOWER_IS_BETTER) else "up"
                value = f"{number(name, after - change.mean)} → {number(name, after)}{unit}"
                note = f"{number(name, change.mean, signed=True)} [{bounds(name, change)}]".replace(", ", ",\u00a0")
                note += ", not clear" if verb == "leaves" else ""
                found.append({"name": name, "value": value, "note": note, "kind": "" if verb == "leaves" else good})
    if run.funnels:
        funnel = next((f for f in run.funnels if run.main_arm and run.main_arm in f.title), run.funnels[0]).value
        note = f"from {funnel['kept']:,} of {funnel['prompts']:,} prompts"
        found.append({"name": "pairs", "value": f"{funnel['pairs']:,}", "note": note})
    seconds = ((run.stages or {}).get("total", {}).get("actual") or {}).get("seconds")
    if seconds:
        found.append({"name": "time of all stages", "value": tables.duration(seconds), "note": cost_line(run)})
    return found


def cost_line(run: RunData) -> str:
    spent = run.manifest.get("spent")
    if not spent:
        return ""
    usd = f", {spent['usd']:,.2f} USD" if spent["usd"] else ""
    return f"{spent['tokens']:,} tokens{usd}"


def facts_line(run: RunData) -> str:
    model, changed = run.config["model"]["path"], run.arms.get(run.main_arm or "", {})
    method = changed.get("train.method", run.config["train"]["method"])
    when = run.manifest.get("finished", "")[:10]
    parts = [f"Model {model}", f"method {method}", f"judge {judge_name(run.config['evaluation'].get('judge'))}", when]
    return " · ".join(part for part in parts if part)


def judge_name(judge: Any) -> str:
    if isinstance(judge, Mapping):
        return str(next((judge[key] for key in ("name", "model", "path", "kind") if judge.get(key)), "its judge"))
    return str(judge or "the model itself")


def again(run: RunData) -> dict[str, Any]:
    """The exact command, versions, seeds and config."""
    command = run.manifest.get("command")
    if command:
        command = shlex.join(["spa", *command[1:]])
    facts = {"run folder": run.path, "seed": run.config.get("seed"), "started": run.manifest.get("started"),
             "finished": run.manifest.get("finished"), **run.manifest.get("versions", {})}  # fmt: skip
    return {
        "name": run.name,
        "command": command or "not known: the run has not come to its end",
        "facts": [(key, value) for key, value in facts.items() if value is not None],
        "arms": tables.arms_table(run),
        "config": yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True),
    }


def _ratings(title: str, signal: Mapping[str, Any]) -> list[tuple[str, Markup]]:
    found = {name: {round(float(score)): n for score, n in one["histogram"].items()}
             for name, one in signal["objectives"].items()}  # fmt: skip
    return [(title, charts.histogram([counts], [name], name)) for name, counts in found.items() if any(counts.values())]


def _curve(run: RunData, key: str, name: str, colours: Mapping[str, int]) -> list[tuple[str, Markup]]:
    series = {found.title: [(row["step"], row[key]) for row in found.value if row.get(key) is not None]
              for found in run.curves}  # fmt: skip
    drawn = charts.curve(series, key, colours)
    return [(name, drawn)] if drawn else []
