"""What a run folder holds, as plain data for the report. A part that is not there yet is empty, never an error.

Stages are found through the run's records; of a stage only the files that DESIGN names are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from spa_ray.config.training import DEFAULT_METHOD
from spa_ray.data.episodes import EpisodeFolder
from spa_ray.errors import InputError
from spa_ray.pipeline.plan_compare import PLAN, compare
from spa_ray.storage.files import AnyPath, children, is_file, read_json
from spa_ray.storage.folder import EVALUATION, MARKER, RunFolder, open_run

Json = dict[str, Any]
VANILLA = "vanilla"
EVALPROMPTS = "evalprompts"
ANSWER_COLUMNS = ["prompt_id", "messages", "meta", "responses", "error"]


@dataclass(frozen=True)
class Answer:
    text: str
    scores: list[float | None]  # in the objectives' order; None where a judgement failed


@dataclass(frozen=True)
class Asked:
    """One held-out prompt and what each model answered; a model that gave no answer is absent."""

    prompt_id: str
    family: str
    category: str
    messages: list[dict[str, str]]
    answers: dict[str, Answer]


@dataclass(frozen=True)
class Found:
    """A file of a stage, and who uses the stage (`spa`, `sft, iteration 2`)."""

    title: str
    value: Any


@dataclass(frozen=True)
class RunData:
    """A run. `config` is the first arm's; `arms` maps each arm to the keys in which it differs from that.

    `stages` is the plan beside what happened, None for a run without a plan.
    """

    path: str
    config: Json
    arms: dict[str, dict[str, Any]]
    objectives: list[str]
    models: list[str]  # whose answers were measured: vanilla, then the arms
    metrics: dict[str, dict[str, Json]] = field(default_factory=dict)  # family -> arm -> measures
    asked: list[Asked] = field(default_factory=list)
    funnels: list[Found] = field(default_factory=list)
    signals: list[Found] = field(default_factory=list)
    curves: list[Found] = field(default_factory=list)  # of rows of a training log
    benchmarks: dict[str, Json] = field(default_factory=dict)  # name -> arm -> measures
    win_rates: dict[str, Json] = field(default_factory=dict)
    agreement: dict[str, Json] = field(default_factory=dict)
    rv: list[Json] = field(default_factory=list)  # curves of `evaluation.rv.rv_curve`, with the `arms` that share one
    stages: Json | None = None
    manifest: Json = field(default_factory=dict)
    baseline: str = VANILLA  # what the arms are compared with
    main: str | None = None  # the main arm, where it is not found by the rule of `main_arm`

    @property
    def name(self) -> str:
        return str(self.config.get("name", "run"))

    @property
    def unfinished(self) -> list[str]:
        """Stages that the plan names and that are not done, by name and once each."""
        stages = (self.stages or {"stages": []})["stages"]
        return list(dict.fromkeys(stage["stage"] for stage in stages if stage["status"] != "done"))

    @property
    def main_arm(self) -> str | None:
        """Whom the headline is about: the arm named as the default method, else the last; None before an evaluation."""
        measured = [arm for arm in next(iter(self.metrics.values()), {}) if arm != self.baseline]
        return self.main or next((arm for arm in measured if arm == DEFAULT_METHOD), measured[-1] if measured else None)


def read_run(path: str | AnyPath) -> RunData:
    """Everything that the report tells of a run. Raises: InputError for a folder that is no run, or a damaged one."""
    run = open_run(path)
    configs = _configs(run)
    first = next(iter(configs.values()))
    base = flat(first)
    evaluation = _json(run.path / EVALUATION)
    metrics = _json(run.path / "metrics.json")
    answers = {arm: name for arm, name in evaluation.get("stages", {}).items() if arm != EVALPROMPTS}
    order = [VANILLA, *configs]
    models = sorted(answers, key=lambda arm: order.index(arm) if arm in order else len(order))
    plan = run.path / PLAN
    return RunData(
        path=str(run.path),
        config=first,
        arms={arm: _differences(base, flat(config)) for arm, config in configs.items()},
        objectives=first["evaluation"].get("objectives") or first["objectives"],
        models=models,
        metrics=metrics,
        asked=read_asked({arm: run.path / "stages" / answers[arm] for arm in models}),
        funnels=list(_stage_files(run, "funnel.json")),
        signals=list(_stage_files(run, "signal.json")),
        curves=list(_stage_files(run, "work/train_log.jsonl")),
        benchmarks={
            file.name.removesuffix(".json"): read_json(file)["arms"]
            for file in children(run.path / "benchmarks")
            if file.name.endswith(".json")
        },
        win_rates=_json(run.path / "win_rates.json"),
        agreement=_json(run.path / "agreement.json"),
        rv=_json(run.path / "rv.json") or [],
        stages=compare(run, _json(plan)) if is_file(plan) else None,
        manifest=_json(run.path / "manifest.json"),
    )


def read_asked(stages: Mapping[str, AnyPath]) -> list[Asked]:
    """The held-out prompts with the answers of every finished stage (arm -> its folder), in the prompts' order."""
    prompts: dict[str, Asked] = {}
    for arm, folder in stages.items():
        if not is_file(folder / MARKER):
            continue
        for row in EpisodeFolder(folder / "episodes").table(ANSWER_COLUMNS).sort_by("prompt_id").to_pylist():
            meta = json.loads(row["meta"])
            asked = prompts.setdefault(
                row["prompt_id"],
                Asked(row["prompt_id"], meta["family"], str(meta.get("category", "")), row["messages"] or [], {}),
            )
            if row["error"] is None:
                response = row["responses"][0]
                asked.answers[arm] = Answer(response["text"], response["scores"])
    return list(prompts.values())


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """A config as dotted keys."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {key: v for name, child in value.items() for key, v in flat(child, f"{prefix}.{name}".lstrip(".")).items()}


def _differences(base: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    keys = dict.fromkeys((*base, *other))
    return {key: other.get(key) for key in keys if base.get(key) != other.get(key)}


def _configs(run: RunFolder) -> dict[str, Json]:
    """Every arm's resolved config as it was written: a plug of the user's need not be here to read it."""
    try:
        configs: dict[str, Json] = yaml.safe_load((run.path / "config.yaml").read_text(encoding="utf-8"))["arms"]
        assert all(config["objectives"] and "evaluation" in config for config in configs.values())
        assert configs
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError, AssertionError) as e:
        raise InputError(f"{run.path}: not a run folder: its config.yaml was not written by a run") from e
    return configs


def _stage_files(run: RunFolder, name: str) -> Iterator[Found]:
    """That file of every stage that an arm uses, each stage once, with all its users."""
    users: dict[str, dict[int, list[str]]] = {}  # folder -> iteration -> who
    for file in run.arm_files():
        iteration = int(file.stem.removeprefix("iter_"))
        for label, folder in read_json(file)["stages"].items():
            part = label.partition(":")[2]
            arms = users.setdefault(folder, {}).setdefault(iteration, [])
            arms.append(file.parent.name + (f" ({part})" if part else ""))
    order = sorted(users, key=lambda folder: min(users[folder]))
    several = len({iteration for found in users.values() for iteration in found}) > 1
    for folder in order:
        file = run.path / "stages" / folder / name
        if is_file(file):
            told = [f"iteration {n}: {_some(arms)}" if several else _some(arms) for n, arms in users[folder].items()]
            yield Found("; ".join(told), _read(file))


def _some(names: list[str]) -> str:
    return ", ".join(names if len(names) <= 6 else [*names[:5], f"{len(names) - 5} more"])


def _read(file: AnyPath) -> Any:
    if file.suffix != ".jsonl":
        return read_json(file)
    lines = file.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]  # what has no line end is being written


def _json(file: AnyPath) -> Any:
    return read_json(file) if is_file(file) else {}
