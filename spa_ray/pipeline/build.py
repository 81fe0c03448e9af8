"""The build stage: episodes to pairs and a funnel, Ray Data carrying the pure functions of `spa_ray.preferences`.

Comes in: a folder of episodes. Goes out: a folder of pairs and their `Funnel`. Ray carries names of files: each task
reads its own and writes one whose name is its number, so a retried task overwrites its own file, and only successful
tasks are counted.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import ray
from ray.data import Datasink
from ray.data.block import Block, BlockAccessor

from spa_ray.config.models import Config
from spa_ray.data.episodes import EpisodeFolder, Retried
from spa_ray.data.schemas import EPISODES
from spa_ray.errors import InputError, RunError
from spa_ray.pipeline.build_files import from_text, pair_task, plan_tasks, to_text
from spa_ray.preferences import Funnel, resolve_delta, resolve_tau
from spa_ray.storage.files import AnyPath, arrow_filesystem, delete_tree, make_folder, write_json

TAU_ROWS = 2**16  # whose scores are looked at together


def data_set_tau(episodes: AnyPath, config: Config) -> float | None:
    """τ over the whole data set, from the narrow `scores` column alone, batch by batch.

    Raises: InputError when the folder holds no episodes.
    """
    return resolve_tau(_scores(episodes), config)


def data_set_delta(episodes: AnyPath, config: Config) -> float:
    """δ; `pairs.delta: auto` reads the `scores` column as `data_set_tau` does. Raises: as it."""
    return resolve_delta(_scores(episodes), config)


def _scores(episodes: AnyPath) -> Iterator[pa.ChunkedArray]:
    batches = open_episodes(episodes).batches(["scores"])
    return _joined(batch.column(0) for batch in batches)


def _joined(columns: Iterable[pa.Array]) -> Iterator[pa.ChunkedArray]:
    """Small columns together: a file may hold a few rows only."""
    held: list[pa.Array] = []
    rows = 0
    for column in columns:
        held.append(column)
        rows += len(column)
        if rows >= TAU_ROWS:
            yield pa.chunked_array(held)
            held, rows = [], 0
    if held:
        yield pa.chunked_array(held)


def open_episodes(folder: AnyPath) -> EpisodeFolder:
    """The episodes of a folder. Raises: InputError when it holds none."""
    try:
        data = EpisodeFolder(folder)
    except FileNotFoundError as e:
        raise InputError(f"{folder}: no *.parquet in it; give the episodes folder that `spa generate` wrote") from e
    missing = set(EPISODES.names) - set(data.schema.names)
    if missing:
        raise InputError(f"{folder}: no column {sorted(missing)[0]!r}; these are not episodes")
    if not data.data.count_rows():
        raise InputError(f"{folder}: no row in it; generate episodes first")
    return data


def build(episodes: AnyPath, out: AnyPath, config: Config, *, tau: float | None) -> Funnel:
    """Denoise every episode and write all pairs under `out`. `tau` comes from `data_set_tau` (or an earlier iteration);
    δ is this data set's own.

    Raises: InputError for a folder without episodes or with a damaged file; RunError when a task fails for good.
    """
    found = open_episodes(episodes)
    delta = data_set_delta(episodes, config)
    make_folder(out)
    tasks = plan_tasks(found.sizes, arrow_filesystem(episodes)[1], found.filesystem)
    items = [{"name": f"{number:06d}", "pieces": to_text(task)} for number, task in enumerate(tasks)]
    sink = _PairsSink(out, config, tau, delta, found)
    try:
        ray.data.from_items(items, override_num_blocks=len(items)).write_datasink(sink)
    except ray.exceptions.RayError as e:
        cause = getattr(e, "cause", None)
        if isinstance(cause, InputError):
            raise cause from e
        lines = [line for line in str(e).splitlines() if line.strip()]
        raise RunError(f"build: {type(e).__name__}: {lines[-1] if lines else ''}; --verbose shows Ray's log") from e
    return functools.reduce(operator.add, sink.funnels)


def build_into(folder: AnyPath, episodes: AnyPath, config: Config, *, frozen_tau: float | None) -> dict[str, Any]:
    """Write `pairs/` and `funnel.json` of a stage. `frozen_tau` is an earlier iteration's τ. Returns: the funnel."""
    tau = data_set_tau(episodes, config) if frozen_tau is None else frozen_tau
    delete_tree(folder / "pairs")  # cheap to build anew: no half of it is kept
    funnel = build(episodes, folder / "pairs", config, tau=tau).to_dict()
    write_json(folder / "funnel.json", funnel)
    return funnel


class _PairsSink(Datasink[Funnel]):
    """Reads a task's episodes and writes their pairs; the task's return value is the funnel."""

    def __init__(self, out: AnyPath, config: Config, tau: float | None, delta: float, episodes: EpisodeFolder) -> None:
        self.out, self.config, self.tau, self.delta = out, config, tau, delta
        self.filesystem, self.metadata = episodes.filesystem, episodes.schema.metadata
        self.retried: Retried | None = episodes.retried if len(episodes.retried.ids) else None
        self.funnels: list[Funnel] = []

    def write(self, blocks: Iterable[Block], ctx: Any) -> Funnel:
        target, root = arrow_filesystem(self.out)
        rows = [row for block in blocks for row in BlockAccessor.for_block(block).to_arrow().to_pylist()]
        funnels = [
            pair_task(
                from_text(row["pieces"]),
                f"{root}/{row['name']}.parquet",
                self.config,
                tau=self.tau,
                delta=self.delta,
                filesystem=self.filesystem,
                target=target,
                metadata=self.metadata,
                retried=self.retried,
            )
            for row in rows
        ]
        return functools.reduce(operator.add, funnels)

    def on_write_complete(self, write_result: Any) -> None:
        self.funnels = list(write_result.write_returns)


def check_pairs(arm: str, funnel: dict[str, Any], folder: AnyPath) -> None:
    """Raises: RunError when nothing is left to train on."""
    if funnel["pairs"]:
        return
    dropped = ", ".join(f"{count} {reason}" for reason, count in funnel["dropped"].items() if count)
    raise RunError(
        f"build: arm {arm}: no pair is left of {funnel['prompts']} prompts (dropped: {dropped}); see "
        f"{folder / 'funnel.json'}; profile=robust or denoise.consistency=primary_ge keep more"
    )
