"""`spa sense`: prompts to the scores that a model with a head senses in them, one resumable Ray Data pass."""

from __future__ import annotations

import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from spa_ray.config.models import Config
from spa_ray.data.episodes import shard_folder
from spa_ray.data.left_out import FILE as LEFT_OUT
from spa_ray.data.left_out import write_list
from spa_ray.data.schemas import SCORES, WRITE_OPTIONS, with_attributes
from spa_ray.engine.cpu_dtype import with_dtype
from spa_ray.errors import InputError, RunError
from spa_ray.pipeline.cluster import connected
from spa_ray.pipeline.first_day import first_day, record_first_day
from spa_ray.pipeline.models import fetch_model, shared_model
from spa_ray.pipeline.preflight import prompt_check
from spa_ray.pipeline.progress import Progress
from spa_ray.rollout.chat import open_chat
from spa_ray.rollout.settings import ChatSettings
from spa_ray.rollout.template import template_text
from spa_ray.steering.asking import conditioning
from spa_ray.storage.claimed import claimed
from spa_ray.storage.files import AnyPath, arrow_filesystem, as_path, copy_file, make_folder, parquet_dataset
from spa_ray.storage.hashing import file_hash, model_hash, stage_hash
from spa_ray.storage.shared_folder import check_shared
from spa_ray.training.method import Method

STAGE_VERSION = 1
SENSED = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("scores", SCORES),  # in [0, 1], in the order of the metadata's `attributes`; null where the prompt is refused
        ("error", pa.string()),  # why it is
    ]
)


def sense_stage(config: Config, *, out: AnyPath, verbose: bool) -> dict[str, Any]:
    """The prompts of `config.prompts`, read by the model of `config.model`, to `out/scores/`.

    Raises: InputError for a model without a head, or with one that is not its own.
    """
    from spa_ray.data.prompts import write_prompts

    config = with_dtype(config)
    model = fetch_model(config.model)
    method = sensing_method(config, model)
    progress, day = Progress(), first_day(as_path(out))
    chat = open_chat(config.model, model, day=day)
    with closing(progress), tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch) / "prompts.parquet"
        counts = write_prompts(config.prompts, fresh, check=prompt_check(chat), against=[])
        for line in counts.notes():
            progress.say(f"warning: {line}")
        about = {
            "chat": ChatSettings.of(config.model, day=day).key(template_text(model)),
            **config.model.model_dump(mode="json", include={"dtype", "max_model_len"}),
        }
        address = stage_hash("sense", STAGE_VERSION, about, [file_hash(fresh), model_hash(model)])
        with claimed(out, "sense", address) as stage:
            if not stage.done:
                started = time.time()
                write_list({"prompts": counts.dropped}, stage.folder / LEFT_OUT)
                record_first_day(stage.folder, day)
                prompts = stage.folder / "prompts.parquet"
                copy_file(fresh, prompts)
                with connected(verbose=verbose, plugs=[method.config.method]), progress.step("sense"):
                    check_shared(stage.folder)
                    how = (config, shared_model(config.model, model), method)
                    run_pass(*how, prompts, stage.folder / "scores", stage.folder / "checkpoint", day=day)
                found = summary(stage.folder / "scores", method.state["objectives"])
                stage.finish(started, rows=counts.rows, **found)
    facts = stage.facts()
    print_summary(facts)
    return {"scores": str(stage.folder / "scores"), **facts}


def sensing_method(config: Config, model: Path) -> Method[Any]:
    """The method of a model folder with a head, which is looked at. Raises: InputError."""
    method = conditioning(model)
    if method is None or not method.senses:
        trained = "" if method is None else f" ({method.config.method} asks for scores and senses none)"
        raise InputError(f"{model}: no head that senses scores is in it{trained}; give one with all of its files")
    method.load(model, trust_remote_code=config.model.trust_remote_code)
    return method


def run_pass(
    config: Config,
    model: AnyPath,
    method: Method[Any],
    prompts: AnyPath,
    out: AnyPath,
    checkpoint: AnyPath,
    *,
    day: Any,
) -> None:
    """Every prompt once, those that have a row already left out. Raises: RunError."""
    import ray

    from spa_ray.config.steer import Steer
    from spa_ray.generation.commits import settle
    from spa_ray.generation.shards import SHARD_ROWS, shards
    from spa_ray.generation.stage import explained, patience, row_checkpoint
    from spa_ray.steering.actor import upstream_of

    upstream = upstream_of(config, [(model, Steer())], prompts=prompts, day=day, alone=True)
    assert upstream is not None
    schema = with_attributes(SENSED, method.state["objectives"])
    size = config.generation.rows_per_block
    pieces = shards(prompts, checkpoint / "shards", SHARD_ROWS)
    for shard, piece in enumerate(pieces):
        rows, noted = (shard_folder(at, shard, len(pieces)) for at in (out, checkpoint / "rows"))
        settle(rows, noted)
        make_folder(rows)
        make_folder(noted)
        files, source = arrow_filesystem(piece)
        out_files, target = arrow_filesystem(rows)
        with row_checkpoint(noted), patience(config, model):
            data = ray.data.read_parquet(source, filesystem=files, partitioning=None)
            data = data.repartition(target_num_rows_per_block=size)
            data = data.map_batches(
                upstream.actor,
                fn_constructor_args=(*upstream.arguments, None),
                batch_size=size,
                batch_format="pyarrow",
                **upstream.pool(config.resources.engines.max),
            ).map_batches(_narrow, batch_size=size, batch_format="pyarrow")
            try:
                data.write_parquet(target, filesystem=out_files, schema=schema, **WRITE_OPTIONS)
            except Exception as e:
                raise explained(e, None, stage="sense") from e
    ids, asked = (
        parquet_dataset(out).to_table(columns=["prompt_id"])["prompt_id"],
        parquet_dataset(prompts).count_rows(),
    )
    if not len(ids) == pc.count_distinct(ids).as_py() == asked:
        raise RunError(f"sense: {len(ids)} rows were written for {asked} prompts; run the same command again")


def _narrow(batch: pa.Table) -> pa.Table:
    return pa.table([batch["prompt_id"], batch["sensed"], batch["refused"]], schema=SENSED)


def summary(scores: AnyPath, attributes: list[str]) -> dict[str, Any]:
    """The mean of every attribute and how many prompts were refused, over all rows."""
    table = parquet_dataset(scores).to_table(columns=["scores", "error"])
    read = table.filter(pc.is_valid(table["scores"]))["scores"]
    means = {name: pc.mean(pc.list_element(read, k)).as_py() for k, name in enumerate(attributes)}
    return {"attributes": attributes, "mean": means, "errors": len(table) - table["error"].null_count}


def print_summary(facts: dict[str, Any]) -> None:
    means = ", ".join(f"{name} {'–' if mean is None else f'{mean:.3f}'}" for name, mean in facts["mean"].items())
    refused = f"; {facts['errors']:,} prompts could not be read" if facts["errors"] else ""
    print(f"{facts['rows']:,} prompts; mean of what was sensed: {means}{refused}")
