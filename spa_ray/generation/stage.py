"""The generation stage: one Ray Data pass, prompts in, episodes out, in a pool of actors with one engine each.

Comes in: a Parquet file of PROMPTS (or, for several models at once, rows that name their model). Goes out: Parquet part
files of EPISODES, committed block by block; rows that a former, killed pass committed are not asked again.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pds
import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.data.checkpoint import CheckpointConfig

from spa_ray.config.models import Config, Resources
from spa_ray.data.schemas import EPISODES, with_metadata
from spa_ray.engine import Completion, EngineDeadError, create_engine
from spa_ray.errors import InputError, RunError
from spa_ray.generation.gate import ModelGate
from spa_ray.generation.setup import Task, make_episodes
from spa_ray.objectives import load_objectives

OnProgress = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class PassCounts:
    """What a finished pass holds, over all attempts. Seconds are of this call."""

    rows: int
    errors: int
    prompt_tokens: int
    generated_tokens: int
    seconds: float
    first_error: str | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def generate(
    config: Config,
    task: Task,
    *,
    prompts: Path,
    out: Path,
    checkpoint: Path,
    model: Path,
    config_hash: str,
    earlier: Path | None = None,
    on_progress: OnProgress | None = None,
    verbose: bool = False,
) -> PassCounts:
    """Run the pass to its end. Rows that fail are written with their error.

    `model` is loaded first; a row's optional column `model` names another folder of the same architecture, to which the
    engine then changes, and `seed_id` what its seeds are drawn from instead of its prompt_id. `earlier` holds the last
    iteration's episodes whose refined answers join the candidates.
    Raises: InputError as the engine does; RunError when the pass dies or too many rows failed.
    """
    started = time.monotonic()
    total = pds.dataset(prompts, format="parquet").count_rows()
    out.mkdir(parents=True, exist_ok=True)
    names = [o.name for o in load_objectives(config)]
    schema = with_metadata(EPISODES, objectives=names, model=config.model.path, config_hash=config_hash)
    last_words = out.with_name("last_words.log")
    last_words.unlink(missing_ok=True)
    with _row_checkpoint(checkpoint), _tally(out, total, on_progress) as tally:
        arguments = (config, task, model, earlier, last_words, tally, verbose)
        data = ray.data.read_parquet(str(prompts))
        data = data.repartition(target_num_rows_per_block=config.generation.rows_per_block)
        data = data.map_batches(
            EpisodeActor,
            fn_constructor_args=arguments,
            batch_size=None,
            batch_format="pyarrow",
            compute=_pool(config),
            max_task_retries=config.generation.max_attempts - 1,  # else a prompt that kills engines kills them for ever
            **_engine_resources(config),
        )
        try:
            data.write_parquet(str(out), schema=schema)
        except Exception as e:
            raise _explained(e, last_words) from e
    counts = count_rows(out, seconds=time.monotonic() - started)
    if on_progress is not None:
        on_progress({"done": counts.rows, "total": total, **({"errors": counts.errors} if counts.errors else {})})
    _check_counts(counts, total, config, out)
    return counts


class EpisodeActor:
    """One engine and the episodes in flight on it.

    What ends it is written to the file `last_words`: Ray carries errors to the driver as text, without their type.
    """

    def __init__(
        self, config: Config, task: Task, model: Path, earlier: Path | None, last_words: Path, tally: Any, verbose: bool
    ) -> None:
        self._task, self._last_words, self._tally = task, last_words, tally
        self._refused: InputError | None = None
        try:
            self._engine = create_engine(config.model, model, verbose=verbose)
            self._episodes = make_episodes(config, task, self._engine, model)
        except InputError as e:  # raised by the first block: here Ray would try and report it several times over
            self._refused = e
            return
        self._gate = ModelGate(self._engine, model)
        self._in_flight = asyncio.Semaphore(config.resources.concurrency)
        self._earlier = RefinedAnswers(earlier) if earlier else None

    async def __call__(self, batch: pa.Table) -> pa.Table:
        if self._refused:
            self._leave_word("input", str(self._refused))
            raise self._refused
        try:
            rows = await asyncio.gather(*(self._run(row) for row in batch.to_pylist()))
        except EngineDeadError as e:
            actor = ray.get_runtime_context().get_actor_id()
            self._leave_word("death", f"{e} (engine actor {actor}, its log {_own_log()})")
            os._exit(1)  # so that Ray replaces this actor and its engine and runs the block again
        return pa.Table.from_pylist(rows, schema=EPISODES)

    def _leave_word(self, kind: str, why: str) -> None:
        with self._last_words.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, "why": why}) + "\n")

    async def _run(self, row: dict[str, Any]) -> dict[str, Any]:
        async with self._gate.using(Path(row["model"]) if row.get("model") else None), self._in_flight:
            if self._task.kind == "score":
                episode = await self._episodes.score(row)
            else:
                earlier = self._earlier.get(row["prompt_id"]) if self._earlier else None
                episode = await self._episodes.run(row, earlier=earlier)
        if self._tally is not None:
            self._tally.add.remote(episode["error"] is not None, episode["generated_tokens"])
        return episode


def _own_log() -> str:
    """Where Ray sends this process's output."""
    output = Path("/proc/self/fd/1")
    return str(output.resolve()) if output.exists() else "in Ray's log folder"


class RefinedAnswers:
    """The refined answers of an earlier iteration by prompt_id, read once, held as Arrow columns (a few KB each)."""

    def __init__(self, episodes: Path) -> None:
        kept = []
        for batch in pds.dataset(episodes, format="parquet").to_batches(columns=["prompt_id", "responses"]):
            responses = pc.list_flatten(batch["responses"])
            owners = batch["prompt_id"].take(pc.list_parent_indices(batch["responses"]))
            fields = [pc.struct_field(responses, name) for name in ("text", "token_ids", "finish_reason")]
            columns = pa.table([owners, *fields], names=["prompt_id", "text", "token_ids", "finish_reason"])
            kept.append(columns.filter(pc.equal(pc.struct_field(responses, "kind"), "refined")))
        table = pa.concat_tables(kept)
        self._rows = {name: row for row, name in enumerate(table["prompt_id"].to_pylist())}
        self._answers = table.drop_columns(["prompt_id"]).combine_chunks()

    def get(self, prompt_id: str) -> Completion | None:
        row = self._rows.get(prompt_id)
        return None if row is None else Completion(**self._answers.slice(row, 1).to_pylist()[0])


def count_rows(out: Path, *, seconds: float) -> PassCounts:
    """What the written episodes say of themselves."""
    columns = ["error", "prompt_tokens", "generated_tokens"]
    table = pds.dataset(out, format="parquet", schema=EPISODES).to_table(columns=columns)
    errors = table["error"].drop_null()
    return PassCounts(
        rows=table.num_rows,
        errors=len(errors),
        prompt_tokens=pc.sum(table["prompt_tokens"]).as_py() or 0,
        generated_tokens=pc.sum(table["generated_tokens"]).as_py() or 0,
        seconds=round(seconds, 2),
        first_error=errors[0].as_py() if len(errors) else None,
    )


def _check_counts(counts: PassCounts, total: int, config: Config, out: Path) -> None:
    if counts.rows != total:
        raise RunError(f"generate: {counts.rows} episodes were written for {total} prompts; run the command again")
    if counts.errors > config.generation.max_error_fraction * total:
        raise RunError(
            f"generate: {counts.errors} of {total} prompts failed, more than generation.max_error_fraction "
            f"{config.generation.max_error_fraction:g} allows; the first: {counts.first_error}; raise the key to go on "
            f"without them, or remove {out.parent} to ask all again"
        )


def _pool(config: Config) -> ActorPoolStrategy:
    engines = config.resources.engines
    # Blocks enough to keep `concurrency` prompts in flight while the last rows of one block are still on their way;
    # the actor's semaphore holds it to that number.
    calls = 1 + math.ceil(config.resources.concurrency / config.generation.rows_per_block)
    return ActorPoolStrategy(
        min_size=engines.min,
        max_size=engines.max,
        max_concurrent_calls_per_actor=calls,
        max_tasks_in_flight_per_actor=calls + 1,  # one more waits at the actor
    )


def _engine_resources(config: Config) -> dict[str, Any]:
    resources: Resources = config.resources
    gpus = resources.gpus_per_engine
    if gpus is None:
        on_gpus = ray.cluster_resources().get("GPU", 0) > 0
        gpus = float(config.model.tensor_parallel_size) if on_gpus else 0.0
    return {"num_cpus": resources.cpus_per_engine, **({"num_gpus": gpus} if gpus else {})}


@contextmanager
def _row_checkpoint(folder: Path) -> Iterator[None]:
    """Ray Data's row-level checkpoint for the pass; the context is the driver's, so it is put back afterwards."""
    context = DataContext.get_current()
    before = context.checkpoint_config
    context.checkpoint_config = CheckpointConfig(
        id_column="prompt_id", checkpoint_path=str(folder), delete_checkpoint_on_success=False
    )
    try:
        yield
    finally:
        context.checkpoint_config = before


class Tally:
    """Counts finished episodes as they come, for the progress display only."""

    def __init__(self, rows: int) -> None:
        self.rows, self.errors, self.tokens = rows, 0, 0

    def add(self, failed: bool, tokens: int) -> None:
        self.rows += 1
        self.errors += failed
        self.tokens += tokens

    def read(self) -> tuple[int, int, int]:
        return self.rows, self.errors, self.tokens


@contextmanager
def _tally(out: Path, total: int, on_progress: OnProgress | None) -> Iterator[Any]:
    """A counting actor that is read once a second while the pass runs; it starts from the rows that are there."""
    if on_progress is None:
        yield None
        return
    before = pds.dataset(out, format="parquet").count_rows()
    tally = ray.remote(Tally).options(num_cpus=0).remote(before)
    done = threading.Event()

    def follow() -> None:
        started = time.monotonic()
        while not done.wait(1.0):
            rows, errors, tokens = ray.get(tally.read.remote(), timeout=60)
            rate = tokens / (time.monotonic() - started)
            done_rows = min(rows, total)  # an engine's death repeats rows
            on_progress({"done": done_rows, "total": total, "tokens/s": rate, **({"errors": errors} if errors else {})})

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield tally
    finally:
        done.set()
        thread.join()
        ray.kill(tally)


def _explained(error: BaseException, last_words: Path) -> Exception:
    """An actor's own last word where there is one, else one line that says where to look."""
    if last_words.exists():
        word = json.loads(last_words.read_text(encoding="utf-8").splitlines()[-1])
        return InputError(word["why"]) if word["kind"] == "input" else RunError(f"generate: {word['why']}")
    last = [line for line in str(error).splitlines() if line.strip()]
    what = last[-1] if last else ""
    return RunError(f"generate: {type(error).__name__}: {what}; --verbose shows the engine's log")
