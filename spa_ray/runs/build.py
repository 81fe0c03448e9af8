"""The build stage: episodes to pairs and a funnel, Ray Data carrying the pure functions of `spa_ray.preferences`.

Comes in: a folder of episodes. Goes out: a folder of pairs and their `Funnel`. Each write task writes one file whose
name is its index, so a retried task overwrites its own file, and only successful tasks are counted.
"""

from __future__ import annotations

import functools
import operator
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pds
import pyarrow.parquet as pq
import ray
from ray.data import Datasink
from ray.data.block import Block, BlockAccessor

from spa_ray.config.models import Config
from spa_ray.data.schemas import EPISODES, PAIRS
from spa_ray.errors import InputError, RunError
from spa_ray.preferences import Funnel, build_pairs, denoise, resolve_tau
from spa_ray.runs.folder import Stage, write_json


def data_set_tau(episodes: Path, config: Config) -> float | None:
    """τ over the whole data set, from the narrow `scores` column alone, file by file.

    Raises: InputError when the folder holds no episodes.
    """
    return resolve_tau(_score_columns(episodes), config)


def _score_columns(episodes: Path) -> Iterator[pa.Array]:
    for batch in open_episodes(episodes).to_batches(columns=["scores"]):
        yield batch.column("scores")


def open_episodes(folder: Path) -> pds.Dataset:
    """The Parquet data set of a folder of episodes. Raises: InputError when it is not one."""
    if not any(folder.glob("*.parquet")) and not folder.is_file():
        raise InputError(f"{folder}: no *.parquet in it; give the episodes folder that `spa generate` wrote")
    data = pds.dataset(folder, format="parquet")
    missing = set(EPISODES.names) - set(data.schema.names)
    if missing:
        raise InputError(f"{folder}: no column {sorted(missing)[0]!r}; these are not episodes")
    if not data.count_rows():
        raise InputError(f"{folder}: no row in it; generate episodes first")
    return data


def build(episodes: Path, out: Path, config: Config, *, tau: float | None) -> Funnel:
    """Denoise every episode and write all pairs under `out`. `tau` comes from `data_set_tau` (or an earlier iteration).

    Raises: InputError for a folder without episodes; RunError when a write task fails for good.
    """
    metadata = open_episodes(episodes).schema.metadata
    out.mkdir(parents=True, exist_ok=True)
    sink = _PairsSink(out, config, tau, metadata)
    try:
        ray.data.read_parquet(str(episodes)).write_datasink(sink)
    except ray.exceptions.RayError as e:
        lines = [line for line in str(e).splitlines() if line.strip()]
        raise RunError(f"build: {type(e).__name__}: {lines[-1] if lines else ''}; --verbose shows Ray's log") from e
    return functools.reduce(operator.add, sink.funnels)


def build_into(stage: Stage, episodes: Path, config: Config, *, frozen_tau: float | None) -> None:
    """The whole stage: `pairs/`, `funnel.json`, and `stage.json` last. `frozen_tau` is an earlier iteration's τ."""
    started = time.time()
    tau = data_set_tau(episodes, config) if frozen_tau is None else frozen_tau
    shutil.rmtree(stage.folder / "pairs", ignore_errors=True)  # cheap to build anew: no half of it is kept
    funnel = build(episodes, stage.folder / "pairs", config, tau=tau).to_dict()
    write_json(stage.folder / "funnel.json", funnel)
    stage.finish(started, funnel=funnel)


class _PairsSink(Datasink[Funnel]):
    """Writes the pairs of a task's episodes; the task's return value is their funnel."""

    def __init__(self, out: Path, config: Config, tau: float | None, metadata: dict[bytes, bytes] | None) -> None:
        self.out, self.config, self.tau, self.metadata = out, config, tau, metadata
        self.funnels: list[Funnel] = []

    def write(self, blocks: Iterable[Block], ctx: Any) -> Funnel:
        tables = [BlockAccessor.for_block(block).to_arrow() for block in blocks]
        table = pa.concat_tables(tables).cast(EPISODES).replace_schema_metadata(self.metadata)
        denoised = denoise(table, self.config, tau=self.tau)
        pairs = build_pairs(denoised, self.config)
        schema = PAIRS.with_metadata(self.metadata)
        pq.write_table(pairs.cast(schema), self.out / f"{ctx.task_idx:06d}.parquet")
        return Funnel.of(denoised, pairs, self.config, tau=self.tau)

    def on_write_complete(self, write_result: Any) -> None:
        self.funnels = list(write_result.write_returns)
