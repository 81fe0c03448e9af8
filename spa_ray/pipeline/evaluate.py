"""The evaluation stage: held-out prompts answered by several models on one engine, scored, and the metrics of a run.

Takes one work per model and writes its answers into its stage folder. One Ray Data pass serves all models that lack
answers: its rows name their model, and the engine changes weights in between.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from spa_ray.config.models import Config
from spa_ray.data.episodes import EpisodeFolder
from spa_ray.data.left_out import ErrorKinds, add_errors
from spa_ray.data.schemas import EPISODES, PROMPTS, STEERED, WRITE_OPTIONS, with_attributes, with_ranges
from spa_ray.evaluation.answers import FamilyAnswers, read_answers
from spa_ray.evaluation.tables import arm_metrics
from spa_ray.generation.setup import Task
from spa_ray.generation.stage import OnProgress, PassCounts, generate
from spa_ray.pipeline.preflight import eval_config
from spa_ray.pipeline.work import Context, Work
from spa_ray.steering.actor import STEER, as_json, upstream_of
from spa_ray.steering.asking import conditioning
from spa_ray.storage.files import AnyPath, arrow_filesystem, delete_tree, is_file, make_folder, parquet_dataset
from spa_ray.storage.folder import PASS, StageFolder
from spa_ray.storage.hashing import digest

SEPARATOR = "::"  # between a model's hash and a prompt_id, in a pass over several models


def evaluate(works: Sequence[Work], context: Context, *, on_progress: OnProgress | None = None) -> None:
    """Answer and score for every work's model, and finish its stage.

    All works have the same `prompts`, the same `base`, with which the engine starts, and the same `judge`, which scores
    in a pass of its own where it is a folder. A benchmark's prompts are played instead.
    """
    first = works[0]
    config, judge, benchmark = eval_config(first.config), first.inputs.get("judge"), first.known.benchmark
    started = time.time()
    name = digest([work.stage.hash for work in works])
    folder = context.passes / f"{PASS}{name}"
    rows = folder / "prompts.parquet"
    uses = [(work.input("model"), work.config.steer) for work in works]
    upstream = upstream_of(config, uses, prompts=first.input("prompts"), day=context.day)
    write_rows(first.input("prompts"), works, rows, steered=upstream is not None)
    task = Task(kind="answer", scored=judge is None, day=context.day)
    if benchmark:
        task = Task(kind="play", scored=False, day=context.day, benchmark=benchmark)
    shared: dict[str, Any] = {
        "config_hash": name,
        "verbose": context.verbose,
        "on_progress": on_progress,
        "meter": context.meter,
    }
    answers = folder / "answers"
    passes = [
        generate(
            config, task, prompts=rows, out=answers, checkpoint=folder / "checkpoint", model=first.input("base"),
            upstream=upstream, **shared,
        )
    ]  # fmt: skip
    if judge:
        answered, scored = folder / "answered.parquet", folder / "scored"
        if not is_file(answered):
            write_table(EpisodeFolder(answers).table(), answered)
        judged = generate(
            config, Task(kind="score", day=context.day), prompts=answered, out=scored,
            checkpoint=folder / "checkpoint-scored", model=judge, **shared,
        )  # fmt: skip
        passes.append(judged)
        answers = scored
    table = EpisodeFolder(answers).table()
    for work in works:
        mine = with_own_columns(split_rows(table, work), work)
        write_table(mine, work.stage.folder / "episodes" / "part.parquet")
        context.finish(work, started, **stage_facts(mine, passes, share=mine.num_rows / table.num_rows))
    delete_tree(folder)


def with_own_columns(mine: pa.Table, work: Work) -> pa.Table:
    """What a model was asked for, under its own attributes; of a model that is asked for nothing no such columns, in
    whatever company it was."""
    if STEERED.names[0] not in mine.column_names:
        return mine
    method = conditioning(work.input("model"))
    if method is None:
        return mine.drop_columns(STEERED.names)
    schema = with_ranges(with_attributes(mine.schema, method.state["objectives"]), method.state["ranges"])
    return mine.replace_schema_metadata(schema.metadata)


def stage_facts(mine: pa.Table, passes: list[PassCounts], *, share: float) -> dict[str, Any]:
    """What a work's stage says of itself. Requests, seconds and the account with an
    endpoint are its share of the passes that it had part in."""
    kinds: ErrorKinds = {}
    add_errors(kinds, mine["error"].to_pylist())
    judged = next((counts.judge for counts in passes if counts.judge), {})
    return {
        "rows": mine.num_rows,
        "errors": mine.num_rows - mine["error"].null_count,
        "error_kinds": kinds,
        **floored(mine),
        "failed_judgements": _failed_judgements(mine),
        "requests": round(share * sum(counts.requests for counts in passes)),
        "prompt_tokens": pc.sum(mine["prompt_tokens"]).as_py() or 0,
        "generated_tokens": pc.sum(mine["generated_tokens"]).as_py() or 0,
        "seconds": round(share * sum(counts.seconds for counts in passes), 2),
        **({"judge": {key: share * value for key, value in judged.items()}} if judged else {}),
    }


def floored(table: pa.Table) -> dict[str, Any]:
    """How many prompts' scores `steer.floors` raised, by attribute; nothing where none was."""
    if "floored" not in table.column_names:
        return {}
    counts = {c["values"]: c["counts"] for c in pc.value_counts(pc.list_flatten(table["floored"])).to_pylist()}
    return {"floored": counts} if counts else {}


def _failed_judgements(table: pa.Table) -> int:
    """Of the rows without an error."""
    status = pc.list_flatten(pc.struct_field(pc.list_flatten(table["responses"]), "score_status"))
    return pc.sum(pc.not_equal(status, "ok")).as_py() or 0


def write_rows(prompts: AnyPath, works: Sequence[Work], out: AnyPath, *, steered: bool = False) -> None:
    """Every prompt once a model, the models one after the other; ids are made unique by the model's stage. `steered`:
    each says by which section."""
    table = parquet_dataset(prompts).to_table().cast(PROMPTS)
    parts = []
    for work in works:
        ids = pc.binary_join_element_wise(pa.scalar(work.stage.hash), table["prompt_id"], SEPARATOR)
        part = table.set_column(0, "prompt_id", ids).append_column("seed_id", table["prompt_id"])
        part = part.append_column("model", pa.array([str(work.input("model"))] * len(table)))
        steer = pa.array([as_json(work.config.steer)] * len(table))
        parts.append(part.append_column(STEER, steer) if steered else part)
    write_table(pa.concat_tables(parts), out)


def write_table(table: pa.Table, out: AnyPath) -> None:
    """Write one Parquet file, by rename on a disk; on an object store it appears with its last request."""
    make_folder(out.parent)
    if isinstance(out, Path):
        partial = out.with_name(f".{out.name}.part")
        pq.write_table(table, partial, **WRITE_OPTIONS)
        partial.replace(out)
        return
    filesystem, target = arrow_filesystem(out)
    pq.write_table(table, target, filesystem=filesystem, **WRITE_OPTIONS)


def split_rows(table: pa.Table, work: Work) -> pa.Table:
    """The work's rows, under the prompts' own ids again, sorted."""
    prefix = work.stage.hash + SEPARATOR
    mine = table.filter(pc.starts_with(table["prompt_id"], prefix))
    ids = pc.utf8_slice_codeunits(mine["prompt_id"], len(prefix))
    return mine.set_column(0, EPISODES.field("prompt_id"), ids).sort_by("prompt_id")


def run_metrics(
    config: Config, stages: Mapping[str, StageFolder], *, baseline: str | None = "vanilla"
) -> dict[str, Any]:
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
            unsafe_below=config.evaluation.unsafe_below,
        )
        out[family] = {
            arm: {**metrics[arm].to_dict(), "exact": arms[arm].exact, "errors": arms[arm].errors} for arm in arms
        }
    return json.loads(json.dumps(out))
