"""The generation stage: prompts in, episodes out, by Ray Data passes over a pool of actors with one engine each.

Comes in: a Parquet file of PROMPTS (or, for several models at once, rows that name their model). Goes out: Parquet
files of EPISODES under `part=K`, committed block by block; rows that a killed pass committed are not asked again.
Part 0 holds every prompt; part K those whose row of part K - 1 has an error that another try may not meet. A part of
more than a million prompts is run shard by shard. Never: anything on the driver that grows with the number of prompts
beyond one shard's ids and one shard's failed prompts.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pds
import pyarrow.parquet as pq
import ray
from pyarrow.fs import SubTreeFileSystem
from ray.data import DataContext
from ray.data.checkpoint import CheckpointConfig
from ray.data.exceptions import ExecutionTimeoutError

from spa_ray.config.models import Config
from spa_ray.data.episodes import EpisodeFolder, part_folder, shard_folder
from spa_ray.data.left_out import ErrorKinds, add_errors
from spa_ray.data.schemas import STEERED, WRITE_OPTIONS, episodes_schema, with_attributes, with_metadata
from spa_ray.engine.openai import BudgetSpentError
from spa_ray.engine.placement import engine_resources, takes_all_cores
from spa_ray.errors import InputError, RunError
from spa_ray.generation.actor import EpisodeActor, Observe, Pass
from spa_ray.generation.budget import Meter
from spa_ray.generation.commits import settle
from spa_ray.generation.endpoint_actor import served
from spa_ray.generation.episode import RETRYABLE
from spa_ray.generation.follow import Line, OnProgress, Record, followed
from spa_ray.generation.pool import growing_pool, layout
from spa_ray.generation.setup import Task, asked_judge
from spa_ray.generation.shards import SHARD_ROWS, shards
from spa_ray.generation.upstream import Upstream
from spa_ray.generation.usage import Spent, Usage
from spa_ray.logs import WorkerLog
from spa_ray.objectives import load_objectives
from spa_ray.storage.files import AnyPath, arrow_filesystem, kind, make_folder, parquet_dataset, write_bytes
from spa_ray.storage.node_cache import FETCH_SECONDS, may_be_fetched
from spa_ray.storage.token import Token

OWN_ERROR = re.compile(r"^(?:spa_ray\.[\w.]+\.)?(?:EngineDeadError|EndpointDeadError|RunError): (.+)$", re.MULTILINE)
START_DEATHS = 2  # engine processes that may be killed at their start, one after the other, before the pass ends


@dataclass(frozen=True)
class PassCounts:
    """What a finished stage holds, over all its passes and attempts; from `seconds` on: what all calls for it spent.

    `error_kinds`: the errors by kind, each with its `count` and its `first` text.
    `unscored`: rows without an error, none of whose answers has all its scores.
    `engine_busy`: the engines' seconds at work over their seconds since the first request. `tokens_per_second`:
    generated tokens over `seconds`, start-up included.
    """

    rows: int
    errors: int
    error_kinds: ErrorKinds
    unscored: int
    retried: int
    prompt_tokens: int
    generated_tokens: int
    first_error: str | None
    seconds: float
    requests: int
    engines: int
    engine_deaths: int
    engine_busy: float | None
    tokens_per_second: float
    judge: dict[str, float] | None = None  # the account with the judge's endpoint

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def generate(
    config: Config,
    task: Task,
    *,
    prompts: AnyPath,
    out: AnyPath,
    checkpoint: AnyPath,
    model: AnyPath,
    config_hash: str,
    earlier: AnyPath | None = None,
    upstream: Upstream | None = None,
    observe: Observe | None = None,
    on_progress: OnProgress | None = None,
    meter: Meter | None = None,
    verbose: bool = False,
    shard_rows: int = SHARD_ROWS,
) -> PassCounts:
    """Ask every prompt, and those that failed for a passing reason again, up to `generation.max_attempts` times.

    `model` is loaded first; a row's optional column `model` names another folder of the same architecture, to which the
    engine then changes, and `seed_id` what its seeds are drawn from instead of its prompt_id. `earlier` holds the last
    iteration's episodes whose refined answers join the candidates. `upstream` says what a model that is conditioned on
    scores is asked for. `observe` says of finished rows what the display counts. `checkpoint` keeps what a resume
    needs. A pass has at most `shard_rows` prompts, the same in a resumed run. `meter` counts what the run spends.
    Raises: InputError as the engine does; RunError when the pass dies or too many rows failed; BudgetSpentError.
    """
    names = [o.name for o in load_objectives(config)]
    given, bounds = parquet_dataset(prompts), config.scoring.ranges
    steered = upstream is not None or set(STEERED.names) <= set(given.schema.names)
    schema = with_metadata(
        episodes_schema(steered=steered),
        objectives=names,
        model=config.model.path,
        config_hash=config_hash,
        ranges=None if bounds is None else [bounds] * len(names),
        given=task.given,
    )
    if upstream is not None and upstream.attributes is not None:
        schema = with_attributes(schema, upstream.attributes)
    total = given.count_rows()
    log = WorkerLog.of(run=out.parent.name, stage=task.kind, verbose=verbose)
    make_folder(checkpoint)
    usage = Usage(checkpoint / "usage")
    gpus = engine_resources(config.model, config.resources, cluster_gpus=_cluster_gpus()).get("num_gpus", 0.0)
    cores = takes_all_cores(config.resources, gpus=gpus, environment=os.environ)
    judge = asked_judge(config, task)
    with (
        Token.left(checkpoint) as token,
        served(judge, kept_answers(out.parent), meter.left() if meter else None) as line,
        followed(lambda: finished_rows(out), total, on_progress, Record(usage, meter, line)) as ledger,
    ):
        source = prompts
        for part in range(config.generation.max_attempts):
            work = Pass(config, task, model, earlier, part, observe, verbose, log, token, cores, line, upstream,
                        steered)  # fmt: skip
            pieces = shards(source, checkpoint / f"shards-{part}", shard_rows)
            again = checkpoint / f"retry-{part + 1}"
            failed = 0
            for shard, piece in enumerate(pieces):
                where = shard_folder(part_folder(out, part), shard, len(pieces))
                _run_pass(
                    work, piece, where, shard_folder(checkpoint / f"part={part}", shard, len(pieces)), ledger, schema
                )
                why = ledger.ask("stopped") if meter else None
                if meter and why and finished_rows(where) < parquet_dataset(piece).count_rows():
                    done = f"{finished_rows(out):,} of {total:,} prompts are done"
                    raise BudgetSpentError(meter.line(task.stage, f"{why}; {done}"))
                _check_pass(piece, where, stage=out.parent)
                failed += _write_failed(piece, where, again / f"{shard:05d}.parquet")
            if not failed:
                break
            source = again
    spent = usage.total()
    counts = replace(count_rows(out, spent), judge=spent.judge if line else None)
    _check_counts(counts, total, config, out, task)
    return counts


def kept_answers(stage: AnyPath) -> AnyPath:
    """Where an endpoint's answers are kept: in the run folder, for all its stages, or in a folder of one stage."""
    return (stage.parent.parent if stage.parent.name == "stages" else stage) / "judge_answers"


def _run_pass(work: Pass, prompts: AnyPath, out: AnyPath, checkpoint: AnyPath, ledger: Line, schema: pa.Schema) -> None:
    """One pass of Ray Data. Nothing is started where every row is there already."""
    config = work.config
    settle(out, checkpoint)
    left = parquet_dataset(prompts).count_rows() - finished_rows(out)
    if not left:
        return
    how = layout(config, left)
    make_folder(out)
    make_folder(checkpoint)
    files, source = arrow_filesystem(prompts)
    out_files, target = arrow_filesystem(out)
    with row_checkpoint(checkpoint), growing_pool(), patience(config, work.model):
        # A run folder may lie below `key=value`: that is no column of the rows.
        data = ray.data.read_parquet(source, filesystem=files, partitioning=None)
        data = data.repartition(target_num_rows_per_block=how.rows_per_block)
        if upstream := work.upstream:
            data = data.map_batches(
                upstream.actor,
                fn_constructor_args=(*upstream.arguments, ledger),
                batch_size=how.rows_per_block,
                batch_format="pyarrow",
                **upstream.pool(how.most),
            )
        data = data.map_batches(
            EpisodeActor,
            fn_constructor_args=(work, ledger),
            batch_size=how.rows_per_block,  # a whole block; where engines have GPUs, Ray wants it said
            batch_format="pyarrow",
            compute=how.pool,
            **engine_resources(config.model, config.resources, cluster_gpus=_cluster_gpus()),
        )
        try:
            data.write_parquet(target, filesystem=out_files, schema=schema, **WRITE_OPTIONS)
        except Exception as e:
            raise explained(e, ledger.ask("last_word")) from e


def _cluster_gpus() -> float:
    return ray.cluster_resources().get("GPU", 0)


def finished_rows(out: AnyPath) -> int:
    """Prompts that have a row under `out`, in whichever part."""
    try:
        return EpisodeFolder(out).count()
    except FileNotFoundError:
        return 0


def _write_failed(prompts: AnyPath, out: AnyPath, again: AnyPath) -> int:
    """Write the file of those of a pass's prompts whose row has an error that may pass; none where there are none.

    It is written when the pass is complete, and found again by a resumed run; prompts that failed since (their file of
    rows was damaged and is made anew) are added, none is taken away. Returns: how many there are.
    """
    failed = EpisodeFolder(out).table(["prompt_id", "error"], ~pds.field("error").is_null())
    kinds = pc.list_element(pc.split_pattern(failed["error"], ":", max_splits=1), 0)
    ids = failed["prompt_id"].filter(pc.is_in(kinds, value_set=pa.array(RETRYABLE))).combine_chunks()
    if kind(again) is not None:
        known = parquet_dataset(again).to_table(columns=["prompt_id"])["prompt_id"].combine_chunks().cast(ids.type)
        if pc.all(pc.is_in(ids, value_set=known), min_count=0).as_py():
            return len(known)
        ids = pc.unique(pa.concat_arrays([known, ids]))
    if len(ids):
        whole = pa.BufferOutputStream()
        pq.write_table(parquet_dataset(prompts).to_table(filter=pds.field("prompt_id").isin(ids)), whole)
        write_bytes(again, whole.getvalue().to_pybytes())
    return len(ids)


def count_rows(out: AnyPath, spent: Spent) -> PassCounts:
    """What the written episodes say of themselves, and what was done for it."""
    folder = EpisodeFolder(out)
    sums: Counter[str] = Counter()
    first_error = None
    kinds: ErrorKinds = {}
    for batch in folder.batches(["error", "scores", "prompt_tokens", "generated_tokens"]):
        errors = batch["error"].drop_null()
        unscored = pc.sum(pc.and_(pc.is_null(batch["error"]), pc.invert(_is_scored(batch["scores"])))).as_py() or 0
        sums.update(rows=batch.num_rows, errors=len(errors), unscored=unscored)
        sums.update({name: pc.sum(batch[name]).as_py() or 0 for name in ("prompt_tokens", "generated_tokens")})
        add_errors(kinds, errors.to_pylist())
        if first_error is None and len(errors):
            first_error = errors[0].as_py()
    return PassCounts(
        rows=sums["rows"],
        errors=sums["errors"],
        error_kinds=kinds,
        unscored=sums["unscored"],
        retried=len(folder.retried.ids),
        prompt_tokens=sums["prompt_tokens"],
        generated_tokens=sums["generated_tokens"],
        first_error=first_error,
        seconds=round(spent.seconds, 2),
        requests=spent.requests,
        engines=spent.engines,
        engine_deaths=spent.deaths,
        engine_busy=None if spent.busy_share is None else round(spent.busy_share, 4),
        tokens_per_second=round(spent.generated_tokens / spent.seconds, 1) if spent.seconds else 0.0,
    )


def _check_pass(prompts: AnyPath, out: AnyPath, *, stage: AnyPath) -> None:
    """Every prompt of the pass once. Raises: RunError."""
    asked = parquet_dataset(prompts).count_rows()
    ids = parquet_dataset(out).to_table(columns=["prompt_id"])["prompt_id"]
    if len(ids) != asked or pc.count_distinct(ids).as_py() != asked:
        raise RunError(
            f"generate: {len(ids)} rows of {pc.count_distinct(ids).as_py()} prompts were written to {out} for {asked} "
            f"prompts; run the same command again to mend that, or remove {stage} to ask all again"
        )


def _is_scored(scores: pa.Array) -> pa.Array:
    """(rows,) bool: whether one of the row's answers has all its scores."""
    answers = pc.list_flatten(scores)
    complete = np.asarray(pc.fill_null(pc.list_value_length(answers), 0)) > 0
    complete[np.asarray(pc.list_parent_indices(answers))[np.asarray(pc.is_null(pc.list_flatten(answers)))]] = False
    rows = np.zeros(len(scores), dtype=np.bool_)
    rows[np.asarray(pc.list_parent_indices(scores))[complete]] = True
    return pa.array(rows)


def _check_counts(counts: PassCounts, total: int, config: Config, out: AnyPath, task: Task | None = None) -> None:
    """Raises: RunError for missing rows, too many failed ones, and answers without scores where they were asked for:
    all of them, or in an evaluation too many."""
    task = task or Task()
    name, limit = task.stage, config.generation.max_error_fraction
    again = f"or remove {out.parent} to ask all again"
    if counts.rows != total:
        raise RunError(f"{name}: {counts.rows} episodes were written for {total} prompts; run the command again")
    if counts.errors > limit * total:
        raise RunError(
            f"{name}: {counts.errors} of {total} prompts failed, more than generation.max_error_fraction "
            f"{limit:g} allows; the first: {counts.first_error}; raise the key to go on without them, {again}"
        )
    if not task.scored or not counts.unscored:
        return
    if counts.unscored + counts.errors == total:
        raise RunError(
            f"{name}: no judgement could be read, of {counts.unscored} prompts; the first: {_first_failure(out)}; "
            f"change the judge, its prompt or scoring.mode, {again}"
        )
    if task.kind != "episode" and counts.unscored + counts.errors > limit * total:
        raise RunError(
            f"{name}: {counts.unscored} of {total} answers have no score, more than generation.max_error_fraction "
            f"{limit:g} allows; the first: {_first_failure(out)}; raise the key to go on without them, {again}"
        )


def _first_failure(out: AnyPath) -> str:
    """The status of the first judgement that failed."""
    for batch in EpisodeFolder(out).batches(["error", "responses"]):
        status = pc.list_flatten(pc.struct_field(pc.list_flatten(batch["responses"]), "score_status"))
        failed = status.filter(pc.not_equal(status, "ok"))
        if len(failed):
            return failed[0].as_py()
    return "there is no answer"


@contextmanager
def row_checkpoint(folder: AnyPath) -> Iterator[None]:
    """Ray Data's row-level checkpoint for the pass; the context is the driver's, so it is put back afterwards."""
    context = DataContext.get_current()
    before = context.checkpoint_config
    files, path = arrow_filesystem(folder)
    above, _, name = path.rstrip("/").rpartition("/")
    # Ray reads `key=value` in the checkpoint's path as a column, a prompt_id for example: it sees the last name alone.
    below = SubTreeFileSystem(above, files)
    context.checkpoint_config = CheckpointConfig(
        id_column="prompt_id", checkpoint_path=name, override_filesystem=below, delete_checkpoint_on_success=False
    )
    try:
        yield
    finally:
        context.checkpoint_config = before


@contextmanager
def patience(config: Config, model: AnyPath) -> Iterator[None]:
    """How long Ray Data may see nothing move, and how many engine processes may die at their start.

    A model that nodes have to fetch first gets the time of a fetch beside that of an engine's start.
    """
    context, limits = DataContext.get_current(), config.generation
    before = context.execution_no_progress_timeout_s, context.max_consecutive_actor_init_deaths
    fetch = FETCH_SECONDS if may_be_fetched(model) else 0.0
    still = fetch + limits.start_timeout_s + limits.prompt_timeout_s + limits.stall_timeout_s
    context.execution_no_progress_timeout_s = still
    context.max_consecutive_actor_init_deaths = START_DEATHS
    try:
        yield
    finally:
        context.execution_no_progress_timeout_s, context.max_consecutive_actor_init_deaths = before


def explained(error: BaseException, word: tuple[str, str] | None, *, stage: str = "generate") -> Exception:
    """An actor's own last word where that is what ended the pass, else one line that says where to look.

    A word may be of an engine that was replaced since: an error that comes from a task (a full disk, say) or from
    Ray Data's patience speaks for itself, unless it quotes the word. Of two engines that end the pass together one has
    the last word and the other one's error may arrive: that is a RunError too, and is quoted.
    """
    itself = isinstance(error, (ray.exceptions.RayTaskError, ExecutionTimeoutError))
    if word is not None and (not itself or word[1] in str(error)):
        kind, why = word
        return InputError(why) if kind == "input" else RunError(f"{stage}: {why}")
    if own := OWN_ERROR.search(str(error)):
        return RunError(f"{stage}: {own[1]}")
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    what = lines[0] if isinstance(error, ExecutionTimeoutError) else lines[-1]
    return RunError(f"{stage}: {type(error).__name__}: {what}; --verbose shows the engine's log")
