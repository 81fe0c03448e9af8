"""From finished run folders, one a seed, to the study beside them: Markdown and JSON.

Comes in: run folders of the same arms, settings and held-out prompts. Goes out: two files. Reads finished stages only;
the judge of the pairs is the evaluation's where it is code of the user's own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spa_ray.config.models import Config
from spa_ray.config.plugs import JUDGES, load_dotted
from spa_ray.config.study import Study
from spa_ray.data.episodes import EpisodeFolder
from spa_ray.errors import InputError
from spa_ray.evaluation.answers import read_answers
from spa_ray.evaluation.metrics import Floats
from spa_ray.evaluation.study import Measured, PairOrder, SeedRun, build_study, pair_order, study_markdown
from spa_ray.generation.judging import Item, Parts, Scorer
from spa_ray.objectives import Objective, load_objectives
from spa_ray.pipeline.inspect import run_configs
from spa_ray.storage.files import AnyPath, as_path, is_file, parquet_dataset, read_json, write_json, write_text
from spa_ray.storage.folder import EVALUATION, RunFolder, StageFolder, open_run

SCORED = "score:"  # how the label of a further judge's stages begins
OF_A_SEED = {"name", "run_dir", "seed", "resources"}  # what the runs of a study may differ in


@dataclass(frozen=True)
class _Run:
    """A finished run: its folder, its arms' configs, what it says of its evaluation."""

    folder: RunFolder
    configs: dict[str, Config]
    stages: dict[str, str]
    judges: dict[str, dict[str, str]]  # name -> arm -> the stage's folder

    @property
    def config(self) -> Config:
        return next(iter(self.configs.values()))

    def settings(self, *, own_models: bool) -> dict[str, Any]:
        """What must be equal in every run of a study."""
        arms = {name: config.model_dump(mode="json", exclude=OF_A_SEED) for name, config in self.configs.items()}
        for arm in arms.values() if own_models else ():
            arm["model"].pop("path")
        return {"arms": arms, "evalprompts": self.stages["evalprompts"]}

    def stage(self, folder_name: str) -> AnyPath:
        """The folder of a finished stage. Raises: InputError when it is unfinished."""
        name, _, digest = folder_name.rpartition("-")
        stage = StageFolder(name, digest, self.folder.path / "stages" / folder_name)
        stage.facts()
        return stage.folder


def write_study(run_dirs: Sequence[AnyPath], out: AnyPath, study: Study) -> AnyPath:
    """Write the Markdown to `out` and the JSON beside it (the same name, `.json`), each by rename.

    Raises: InputError when a run is unfinished, two have the same seed, or their settings or prompts differ.
    Returns: `out`.
    """
    results = build_study(read_measured(run_dirs, study.judged), study)
    write_json(out.with_suffix(".json"), {"runs": list(map(str, run_dirs)), **results.to_dict()})
    write_text(out, study_markdown(results, title=f"Study: {out.stem}"))
    return out


def read_measured(run_dirs: Sequence[AnyPath], judged: Sequence[str] = (), *, own_models: bool = False) -> Measured:
    """The answers of finished runs, and how the evaluation's judge sees the pairs of the `judged` arms. `own_models`:
    each started from another model.

    Raises: InputError as `write_study` does.
    """
    runs = [_open(path) for path in run_dirs]
    check_comparable(runs, own_models=own_models)
    first = runs[0].config
    objectives = list(first.evaluation.objectives or first.objectives)
    evaluation = first.evaluation
    found = [_read(run, judged) for run in runs]
    return Measured(found, objectives, evaluation.bootstrap, first.seed, evaluation.unsafe_below)


def _open(path: AnyPath) -> _Run:
    folder = open_run(path)
    record = folder.path / EVALUATION
    if not is_file(record):
        raise InputError(f"{path}: not evaluated yet (no {record.name}); run it to its end first")
    found = read_json(record)
    judges = {
        label.removeprefix(SCORED): arms for label, arms in found.get("judges", {}).items() if label.startswith(SCORED)
    }
    run = _Run(folder, run_configs(folder), found["stages"], judges)
    if run.config.evaluation.prompts is None:
        raise InputError(f"{path}: evaluation.prompts.source was not given; a study compares answers to those prompts")
    return run


def check_comparable(runs: Sequence[_Run], *, own_models: bool = False) -> None:
    """Raises: InputError unless there are runs, each of another seed, that are alike in all else."""
    if not runs:
        raise InputError("a study needs at least one run folder")
    seeds: dict[int, AnyPath] = {}
    for run in runs:
        path = run.folder.path
        if run.config.seed in seeds:
            raise InputError(f"{path}: seed {run.config.seed} again, as {seeds[run.config.seed]}; one run a seed")
        seeds[run.config.seed] = path
        if run.settings(own_models=own_models) != runs[0].settings(own_models=own_models):
            raise InputError(
                f"{path}: its arms, settings or held-out prompts are not those of {runs[0].folder.path}; "
                "only the seed may differ within a study"
            )


def _read(run: _Run, judged: Sequence[str]) -> SeedRun:
    """Its answers, and the pairs of the `judged` arms as the evaluation's judge sees them; not of a coin's, which are
    swapped in training."""
    arms = {name: folder for name, folder in run.stages.items() if name != "evalprompts"}
    answers = {arm: read_answers(run.stage(folder) / "episodes") for arm, folder in arms.items()}
    orders: dict[str, PairOrder] = {}
    section = run.config.evaluation.judged_by
    if section.plugs():
        no_engine: Any = None
        parts = Parts(run.config, no_engine, no_engine, no_engine)
        judge = load_dotted(JUDGES[section.kind], where="evaluation.judge").of(section, parts)
        with asyncio.Runner() as runner:
            score = _Asked(judge, load_objectives(run.config), runner)
            looked_at = [a for a in judged if a in run.configs and not run.configs[a].train.shuffle_labels]
            orders = {arm: pair_order(_judged(run, arm, score)) for arm in looked_at}
    judges = {
        name: {arm: read_answers(run.stage(folder) / "episodes") for arm, folder in arms.items()}
        for name, arms in run.judges.items()
    }
    return SeedRun(run.config.seed, answers, judges, orders)


@dataclass(frozen=True)
class Made:
    """What an arm's first iteration made: own scores of its candidates and refined answers (n, k), NaN where one
    failed, and its funnel as JSON."""

    candidate: Floats
    refined: Floats
    funnel: dict[str, Any]


def read_made(run_dir: AnyPath, arm: str) -> Made:
    """Raises: InputError when the run lacks the arm's episodes or pairs."""
    run = open_run(run_dir)
    record = run.arm_file(arm, 1)
    config, stages = run_configs(run).get(arm), read_json(record)["stages"] if is_file(record) else {}
    if config is None or not {"generate", "build"} <= stages.keys():
        raise InputError(f"{run_dir}: arm {arm} built no pairs; name arms that were trained on pairs of their own")
    found: dict[str, list[list[float]]] = {"candidate": [], "refined": []}
    folder = run.path / "stages"
    for batch in EpisodeFolder(folder / stages["generate"] / "episodes").batches(["responses"]):
        for response in (r for row in batch["responses"].to_pylist() for r in row or () if r["scores"]):
            found[response["kind"]].append([np.nan if score is None else score for score in response["scores"]])
    candidate, refined = (
        np.array(rows, dtype=np.float64).reshape(-1, len(config.objectives)) for rows in found.values()
    )
    return Made(candidate, refined, read_json(folder / stages["build"] / "funnel.json"))


def arm_model(run_dir: AnyPath, arm: str) -> AnyPath:
    """The model of a finished arm's last iteration. Raises: InputError where it has none."""
    run = open_run(run_dir)
    config = run_configs(run).get(arm)
    record = run.arm_file(arm, config.iterations.count if config else 1)
    if config is None or not is_file(record):
        raise InputError(f"{run_dir}: arm {arm} has no model; run it to its end first")
    return as_path(read_json(record)["model"])


def read_costs(run_dir: AnyPath) -> dict[str, dict[str, float]]:
    """Arm -> the seconds of training its model, and of the models that its method trains first (`Method.recipe`)."""
    run = open_run(run_dir)
    found = {}
    for arm, config in run_configs(run).items():
        record = run.arm_file(arm, 1)
        if config.merge is None and is_file(record):
            stages = read_json(record)["stages"]
            seconds = {label: read_json(run.path / "stages" / name / "stage.json")["seconds"]
                       for label, name in stages.items() if label.split(":")[0] == "train"}  # fmt: skip
            own = seconds.pop("train")
            found[arm] = {"training, s": own, "further models, s": sum(seconds.values())}
    return found


class _Asked:
    """The judge's scores of an answer, in objective order, none where a judgement failed; the same answer is asked
    about once."""

    def __init__(self, judge: Scorer, objectives: Sequence[Objective], runner: asyncio.Runner) -> None:
        self._judge, self._objectives, self._runner = judge, objectives, runner
        self._known: dict[tuple[str, str], list[float]] = {}

    def __call__(self, prompt_id: str, prompt: Sequence[dict[str, str]], meta: str, text: str) -> list[float]:
        key = (prompt_id, text)
        if key not in self._known:
            item = Item(prompt, meta, text, self._objectives, lambda *_: 0)
            scores = [found.score for found in self._runner.run(self._judge.score(item))]
            self._known[key] = [] if None in scores else [float(score) for score in scores if score is not None]
        return self._known[key]


def _judged(run: _Run, arm: str, score: _Asked) -> Iterator[tuple[str, list[float], list[float]]]:
    """Every pair of the arm's first iteration whose answers both have scores: its prompt_id and those scores."""
    stages = read_json(run.folder.arm_file(arm, 1))["stages"]
    ids = EpisodeFolder(run.stage(stages["generate"]) / "episodes").table(["prompt_id", "meta"]).to_pydict()
    meta = dict(zip(ids["prompt_id"], ids["meta"], strict=True))
    pairs = parquet_dataset(run.stage(stages["build"]) / "pairs")
    for batch in pairs.to_batches(columns=["prompt_id", "prompt", "chosen", "rejected"]):
        for pair in batch.to_pylist():
            asked = (pair["prompt_id"], pair["prompt"], meta[pair["prompt_id"]])
            chosen, rejected = (pair[side][-1]["content"] for side in ("chosen", "rejected"))
            scores = score(*asked, chosen), score(*asked, rejected)
            if all(scores):
                yield pair["prompt_id"], *scores
