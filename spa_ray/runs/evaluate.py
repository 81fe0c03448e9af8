"""The evaluation stage: held-out prompts answered by several models on one engine, scored, and the metrics of a run.

Comes in: models and an arm's evaluation section. Goes out: one stage folder a model, and metrics. One Ray Data pass
serves all models that lack answers: its rows name their model and the engine changes weights in between.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pds
import pyarrow.parquet as pq

from spa_ray.config.models import Config
from spa_ray.data.schemas import EPISODES, PROMPTS
from spa_ray.evaluation.answers import FamilyAnswers, read_answers
from spa_ray.evaluation.tables import arm_metrics
from spa_ray.generation.setup import Task
from spa_ray.generation.stage import OnProgress, generate
from spa_ray.runs.folder import Stage
from spa_ray.runs.hashing import digest
from spa_ray.runs.preflight import eval_config

SEPARATOR = "::"  # between a model's hash and a prompt_id, in a pass over several models


@dataclass(frozen=True)
class Subject:
    """A model to evaluate and the stage folder that holds its answers."""

    model: Path
    stage: Stage


def evaluate(
    config: Config,
    subjects: list[Subject],
    *,
    base: Path,
    judge: Path | None,
    prompts: Path,
    work: Path,
    on_progress: OnProgress | None,
    verbose: bool,
) -> None:
    """Answer and score for every subject, and finish its stage.

    `base` is the model that the engine starts with; `judge` the folder of a model that scores in a pass of its own.
    """
    config = eval_config(config)
    started = time.time()
    name = digest([s.stage.hash for s in subjects])
    folder = work / f"pass-{name}"
    rows = folder / "prompts.parquet"
    write_rows(prompts, subjects, rows)
    task = Task(kind="answer", judge="none" if judge else config.evaluation.judge)
    shared: dict[str, Any] = {"config_hash": name, "verbose": verbose, "on_progress": on_progress}
    answers = folder / "answers"
    generate(config, task, prompts=rows, out=answers, checkpoint=folder / "checkpoint", model=base, **shared)
    if judge:
        scored = folder / "scored"
        generate(
            config, Task(kind="score"), prompts=answers, out=scored, checkpoint=folder / "checkpoint-scored",
            model=judge, **shared,
        )  # fmt: skip
        answers = scored
    table = pds.dataset(answers, format="parquet").to_table()
    for subject in subjects:
        mine = split_rows(table, subject)
        (subject.stage.folder / "episodes").mkdir(exist_ok=True)
        pq.write_table(mine, subject.stage.folder / "episodes" / "part.parquet")
        subject.stage.finish(started, rows=mine.num_rows, errors=mine.num_rows - mine["error"].null_count)
    shutil.rmtree(folder)


def write_rows(prompts: Path, subjects: list[Subject], out: Path) -> None:
    """Every prompt once a model, the models one after the other; ids are made unique by the model's stage."""
    table = pq.read_table(prompts).cast(PROMPTS)
    parts = []
    for subject in subjects:
        ids = pc.binary_join_element_wise(pa.scalar(subject.stage.hash), table["prompt_id"], SEPARATOR)
        part = table.set_column(0, "prompt_id", ids).append_column("seed_id", table["prompt_id"])
        parts.append(part.append_column("model", pa.array([str(subject.model)] * len(table))))
    out.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.concat_tables(parts), out)


def split_rows(table: pa.Table, subject: Subject) -> pa.Table:
    """The subject's rows, under the prompts' own ids again, sorted."""
    prefix = subject.stage.hash + SEPARATOR
    mine = table.filter(pc.starts_with(table["prompt_id"], prefix))
    ids = pc.utf8_slice_codeunits(mine["prompt_id"], len(prefix))
    return mine.set_column(0, EPISODES.field("prompt_id"), ids).sort_by("prompt_id")


def run_metrics(config: Config, stages: Mapping[str, Stage], *, baseline: str | None = "vanilla") -> dict[str, Any]:
    """Metrics by family and arm: `{family: {arm: {...}}}`; each arm's holds `exact` and `errors` as well.

    The order of `stages` is the order of the table.
    """
    objectives = config.evaluation.objectives or config.objectives
    answers = {arm: read_answers(stage.folder / "episodes") for arm, stage in stages.items()}
    families: dict[str, dict[str, FamilyAnswers]] = {}
    for arm, by_family in answers.items():
        for family, found in by_family.items():
            families.setdefault(family, {})[arm] = found
    out: dict[str, Any] = {}
    for family, arms in families.items():
        metrics = arm_metrics(
            {arm: found.answers for arm, found in arms.items()},
            objectives=objectives,
            categories=next(iter(arms.values())).categories,
            baseline=baseline,
            resamples=config.evaluation.bootstrap,
            seed=config.seed,
        )
        out[family] = {
            arm: {**metrics[arm].to_dict(), "exact": arms[arm].exact, "errors": arms[arm].errors} for arm in arms
        }
    return json.loads(json.dumps(out))
