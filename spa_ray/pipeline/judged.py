"""Further judgements of held-out answers that are there already: more judges' scores, and comparisons in pairs.

Takes one work per model, whose input `answers` is its evaluation's episodes. One Ray Data pass serves all of them; it
starts an engine only where the judge asks one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from spa_ray.config.evaluation import MAIN_JUDGE
from spa_ray.config.judge import Policy
from spa_ray.config.models import Config
from spa_ray.config.pairwise import REFERENCE
from spa_ray.data.episodes import EpisodeFolder
from spa_ray.data.schemas import EPISODES
from spa_ray.errors import InputError
from spa_ray.evaluation.agreement import judges_agreement
from spa_ray.evaluation.answers import FamilyAnswers, read_answers
from spa_ray.evaluation.bootstrap import as_json
from spa_ray.evaluation.prompts import MAIN_FAMILY
from spa_ray.evaluation.rv import rv_curve
from spa_ray.evaluation.win_rates import judgements, win_rates
from spa_ray.generation.pairwise import ORDERS, section_of
from spa_ray.generation.setup import Task
from spa_ray.generation.stage import OnProgress, PassCounts, generate
from spa_ray.pipeline.evaluate import SEPARATOR, run_metrics, split_rows, stage_facts, write_table
from spa_ray.pipeline.preflight import eval_config
from spa_ray.pipeline.work import Context, Work
from spa_ray.storage.files import AnyPath, delete_tree, is_file, parquet_dataset
from spa_ray.storage.folder import StageFolder
from spa_ray.storage.hashing import digest

CANDIDATE = "candidate"
IDLE = "spa_ray.engine.idle:IdleEngine"


def score_again(works: Sequence[Work], context: Context, *, on_progress: OnProgress | None = None) -> None:
    """Every work's answers scored by one more judge, whose place in `evaluation` the works name. Of episodes the
    candidates of `evaluation.rv` prompts are."""
    started, first = time.time(), works[0]
    rows = [(work, _answers(work, "answers")) for work in works]
    if first.stage.name == "rv":
        rows = [(work, candidates(table, work.config.evaluation.rv or 0)) for work, table in rows]
    table, counts = _judge(rows, "score", context, on_progress)
    for work in works:
        mine = split_rows(table, work)
        write_table(mine, work.stage.folder / "episodes" / "part.parquet")
        context.finish(work, started, **stage_facts(mine, [counts], share=mine.num_rows / table.num_rows))


def label(work: Work, context: Context, *, on_progress: OnProgress | None = None) -> None:
    """Given answers scored by `scoring.judge`, row by row as they are generated elsewhere."""
    started, config, judge = time.time(), work.config, work.config.scoring.judged_by
    counts = generate(
        config if judge.asks_engine else _without_engine(config, on_gpu=judge.on_gpu),
        Task(kind="score", given=True, day=context.day),
        prompts=work.input("answers"),
        out=work.stage.folder / "episodes",
        checkpoint=work.stage.folder / "checkpoint",
        model=work.input("base"),
        config_hash=work.stage.hash,
        verbose=context.verbose,
        on_progress=on_progress,
        meter=context.meter,
    )
    context.finish(work, started, **counts.to_dict())


def candidates(episodes: pa.Table, prompts: int) -> pa.Table:
    """The first rows by prompt_id, which is a hash, with their candidates alone."""
    rows = episodes.filter(pc.is_null(episodes["error"])).sort_by("prompt_id").slice(0, prompts).to_pylist()
    for row in rows:
        row["responses"] = [found for found in row["responses"] if found["kind"] == CANDIDATE]
        row["scores"] = []
    return pa.Table.from_pylist(rows, schema=EPISODES)


def candidates_rv(config: Config, weak: AnyPath, strong: AnyPath) -> dict[str, Any]:
    """The RV curve of a run's own judge against the evaluation's, from both folders of episodes, as JSON."""
    ours, theirs = _scored(weak), _scored(strong)
    both = {at: (ours[at], theirs[at]) for at in sorted(ours.keys() & theirs.keys())}
    places = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompt for prompt, _ in both))}
    longest = 1 + max((index for _, index in both), default=-1)
    widths = map(len, next(iter(both.values()), ((), ())))
    weak_grid, strong_grid = (np.full((len(places), longest, width), np.nan) for width in widths)
    for (prompt, index), (mine, other) in both.items():
        weak_grid[places[prompt], index], strong_grid[places[prompt], index] = mine, other
    resamples, seed = config.evaluation.bootstrap, config.seed
    return asdict(rv_curve(weak_grid, strong_grid, ddof=config.denoise.ddof, resamples=resamples, seed=seed))


def _scored(episodes: AnyPath) -> dict[tuple[str, int], list[float]]:
    """A candidate's prompt and place -> its scores, where it has all."""
    rows = EpisodeFolder(episodes).table(["prompt_id", "responses", "error"]).to_pylist()
    found = [(row["prompt_id"], r) for row in rows if row["error"] is None for r in row["responses"]]
    return {
        (prompt, r["index"]): r["scores"]
        for prompt, r in found
        if r["kind"] == CANDIDATE and r["scores"] and None not in r["scores"]
    }


def compare(works: Sequence[Work], context: Context, *, on_progress: OnProgress | None = None) -> None:
    """Every work's answers against another model's, or the prompts' own references. Prompts that lack either are left
    out and counted."""
    started, first = time.time(), works[0]
    rows = [(work, pairs(_answers(work, "answers"), _opponents(work))) for work in works]
    table, counts = _judge(rows, "compare", context, on_progress)
    objectives = list(eval_config(first.config).objectives)
    orders = ORDERS if section_of(first.config).both_orders else ORDERS[:1]
    for work, asked in rows:
        mine, (_, a, b) = split_rows(table, work), work.known.names
        found = judgements(mine, objectives, orders, a=a, b=b)
        write_table(found, work.stage.folder / "judgements" / "part.parquet")
        failed = pc.sum(pc.equal(found["verdict"], "failed")).as_py() or 0
        facts = stage_facts(mine, [counts], share=mine.num_rows / table.num_rows)
        left_out = parquet_dataset(work.input("answers")).count_rows() - asked.num_rows
        context.finish(work, started, **facts, verdicts=found.num_rows, failed_verdicts=failed, left_out=left_out)


def pairs(ours: pa.Table, theirs: Mapping[str, Mapping[str, Any]]) -> pa.Table:
    """Rows of EPISODES whose responses are the two answers; those of prompts that both answered."""
    rows = [
        {**row, "responses": [row["responses"][0], theirs[row["prompt_id"]]], "scores": []}
        for row in ours.to_pylist()
        if row["error"] is None and row["prompt_id"] in theirs
    ]
    return pa.Table.from_pylist(rows, schema=EPISODES)


def _opponents(work: Work) -> dict[str, Mapping[str, Any]]:
    """Prompt -> the answer that it is compared with. Raises: InputError where no prompt brings a reference."""
    if "against" in work.inputs:
        rows = _answers(work, "against").to_pylist()
        return {row["prompt_id"]: row["responses"][0] for row in rows if row["error"] is None}
    column = section_of(work.config).reference
    found = references(_answers(work, "answers"), column)
    if not found:
        raise InputError(
            f"evaluation.pairwise.against: no held-out prompt has a column {column!r}; give vanilla or an arm, or "
            "pairwise.reference another column"
        )
    return found


def references(answers: pa.Table, column: str = REFERENCE) -> dict[str, Mapping[str, Any]]:
    """Prompt -> its own reference answer, as a response, where it brings one as text."""
    found: dict[str, Mapping[str, Any]] = {}
    for row in answers.select(["prompt_id", "meta"]).to_pylist():
        text = json.loads(row["meta"]).get(column)
        if isinstance(text, str):
            found[row["prompt_id"]] = {"index": 0, "kind": REFERENCE, "text": text, "token_ids": []}
    return found


def _answers(work: Work, role: str) -> pa.Table:
    """The answers, whose tokens are spent already."""
    table = EpisodeFolder(work.input(role)).table(EPISODES.names)
    for name in ("prompt_tokens", "generated_tokens"):
        place = table.column_names.index(name)
        table = table.set_column(place, EPISODES.field(name), pa.array(np.zeros(len(table), dtype=np.int64)))
    return table


def _judge(
    rows: Sequence[tuple[Work, pa.Table]], kind: Any, context: Context, on_progress: OnProgress | None
) -> tuple[pa.Table, PassCounts]:
    """One pass over the rows of all works; ids are made unique by the works' stages."""
    first = rows[0][0]
    place = first.known.names[0]
    judge, config = first.config.evaluation.all_judges[place], eval_config(first.config, place)
    if not judge.asks_engine:
        config = _without_engine(config, on_gpu=judge.on_gpu)
    name = digest([work.stage.hash for work, _ in rows])
    folder = context.passes / f"pass-{name}"
    if not is_file(asked := folder / "rows.parquet"):
        write_table(pa.concat_tables([_marked(*row, own=isinstance(judge, Policy)) for row in rows]), asked)
    counts = generate(
        config, Task(kind=kind, day=context.day), prompts=asked, out=folder / "judged",
        checkpoint=folder / "checkpoint", model=first.inputs.get("judge") or first.input("base"), config_hash=name,
        verbose=context.verbose, on_progress=on_progress, meter=context.meter,
    )  # fmt: skip
    table = EpisodeFolder(folder / "judged").table()
    delete_tree(folder)
    return table, counts


def _marked(work: Work, table: pa.Table, *, own: bool) -> pa.Table:
    """With the work's mark on every id. `own`: each model judges its own answers."""
    ids = pc.binary_join_element_wise(pa.scalar(work.stage.hash), table["prompt_id"], SEPARATOR)
    marked = table.set_column(0, "prompt_id", ids).append_column("seed_id", table["prompt_id"])
    models = pa.array([str(work.input("model"))] * len(table), pa.string())
    return marked.append_column("model", models) if own else marked


def _without_engine(config: Config, *, on_gpu: bool) -> Config:
    model = config.model.model_copy(update={"engine": IDLE, "engine_kwargs": {}})
    resources = config.resources
    if not on_gpu:
        resources = resources.model_copy(update={"gpus_per_engine": 0.0})
    return config.model_copy(update={"model": model, "resources": resources})


def add_judges(
    config: Config,
    metrics: dict[str, Any],
    main: Mapping[str, StageFolder],
    further: Mapping[str, Mapping[str, StageFolder]],
    *,
    baseline: str | None = "vanilla",
) -> dict[str, Any]:
    """Put every further judge's metrics beside the main one's, under `judges`. Returns: family -> how the judges agree.

    `main` and each of `further` map arms to the stages of their scores.
    """
    for name, stages in further.items():
        for family, arms in run_metrics(config, stages, baseline=baseline).items():
            for arm, found in arms.items():
                metrics[family][arm].setdefault("judges", {})[name] = found
    read = {
        name: {arm: read_answers(stage.folder / "episodes") for arm, stage in stages.items()}
        for name, stages in {MAIN_JUDGE: main, **further}.items()
    }
    return {family: _agreement(config, {n: {a: f[family] for a, f in arms.items()} for n, arms in read.items()})
            for family in metrics}  # fmt: skip


def _agreement(config: Config, judges: Mapping[str, Mapping[str, FamilyAnswers]]) -> dict[str, Any]:
    """Over all arms' answers to one family of prompts. `judges`: judge -> arm -> answers."""
    objectives = config.evaluation.objectives or config.objectives
    arms = next(iter(judges.values()))
    ids = sorted({i for found in arms.values() for i in found.answers.prompt_ids})
    place = {prompt_id: row for row, prompt_id in enumerate(ids)}
    scores = {name: np.full((len(ids), len(arms), len(objectives)), np.nan) for name in judges}
    lengths = np.full((len(ids), len(arms)), np.nan)
    for name, by_arm in judges.items():
        for column, found in enumerate(by_arm.values()):
            at = [place[i] for i in found.answers.prompt_ids]
            scores[name][at, column], lengths[at, column] = found.answers.scores, found.answers.lengths
    return as_json(
        judges_agreement(scores, lengths, objectives, resamples=config.evaluation.bootstrap, seed=config.seed)
    )


def pairwise_rates(config: Config, stage: StageFolder) -> dict[str, Any]:
    """A finished comparison's win rates: who, family by family, objective by objective."""
    table = parquet_dataset(stage.folder / "judgements").to_table()
    families = [MAIN_FAMILY, *config.evaluation.families]
    rates = win_rates(table, families, resamples=config.evaluation.bootstrap, seed=config.seed)
    section, facts = section_of(config), stage.facts()
    return {"against": section.against, "both_orders": section.both_orders, "left_out": facts["left_out"],
            "families": rates}  # fmt: skip
