"""How a pass's rows are spread over its engines, and run folders whose path looks like a partition."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spa_ray.config.models import Config
from spa_ray.data.episodes import EpisodeFolder, part_folder
from spa_ray.data.schemas import PROMPTS
from spa_ray.engine.scripted import ScriptedEngine
from spa_ray.generation.pool import blocks_in_engine, layout
from spa_ray.generation.setup import Task
from spa_ray.generation.stage import generate
from spa_ray.storage.files import parquet_dataset
from tests.scripted import WEIGHTS, scripted_config


def config(least: int, most: int, *, rows: int = 32, concurrency: int = 128, **more: Any) -> Config:
    return scripted_config(
        more.pop("script", None),
        generation={"rows_per_block": rows},
        resources={"engines": {"min": least, "max": most}, "concurrency": concurrency, "cpus_per_engine": 0.5},
        **more,
    )


def test_four_hundred_prompts_are_an_even_share_for_each_of_eight_engines() -> None:
    how = layout(config(8, 8), 400)
    assert (how.least, how.most) == (8, 8)
    assert how.rows_per_block * (how.blocks + how.queued) == 50


@given(st.integers(1, 5000), st.integers(1, 64), st.integers(1, 64), st.integers(1, 512))
def test_no_engine_takes_much_more_than_its_share(rows: int, engines: int, block: int, concurrency: int) -> None:
    how = layout(config(engines, engines, rows=block, concurrency=concurrency), rows)
    assert how.most == min(engines, rows)
    assert how.rows_per_block <= block
    share = -(-rows // how.most)
    at_once = how.rows_per_block * (how.blocks + how.queued)
    assert at_once <= max(share + share // 4 + 1, share + how.rows_per_block)
    assert at_once * how.most >= min(rows, how.most * concurrency), "no engine is left with empty places"


@given(st.integers(1, 8), st.integers(1, 64), st.integers(1, 256))
def test_a_large_set_keeps_its_blocks_and_the_spare_ones(engines: int, block: int, concurrency: int) -> None:
    how = layout(config(engines, engines, rows=block, concurrency=concurrency), 10**6)
    assert (how.rows_per_block, how.blocks, how.queued) == (block, blocks_in_engine(concurrency, block), 1)


def test_a_tiny_set_is_committed_in_small_blocks_and_starts_no_engine_without_work() -> None:
    assert layout(config(1, 1), 12).rows_per_block <= 3
    assert (layout(config(8, 8), 3).most, layout(config(8, 8), 3).least) == (3, 3)


def test_a_pool_that_may_grow_does_so_for_a_quarter_of_an_engines_places() -> None:
    assert layout(config(1, 64), 400).most == 13
    assert layout(config(1, 8), 400).most == 8
    assert layout(config(1, 64), 20).most == 1


# --- real Ray ---------------------------------------------------------------------------------------------------------


class LateEngine(ScriptedEngine):
    """The first to start is ready at once, the others later; each says which prompts it served."""

    def __init__(self, model: Any, folder: Path, *, place: str, late: float, **script: Any) -> None:
        mine = Path(place) / f"engine-{time.time_ns()}"
        try:
            (Path(place) / "first").touch(exist_ok=False)
        except FileExistsError:
            time.sleep(late)
        super().__init__(model, folder, log=str(mine), **script)


def write_prompts(path: Path, count: int) -> Path:
    rows = [
        {"prompt_id": f"p{k:02d}", "messages": [{"role": "user", "content": f"question {k}?"}], "meta": "{}"}
        for k in range(count)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=PROMPTS), path)
    return path


def play(config: Config, prompts: Path, folder: Path) -> Any:
    return generate(
        config, Task(), prompts=prompts, out=folder / "episodes", checkpoint=folder / "checkpoint", model=WEIGHTS,
        config_hash="h",
    )  # fmt: skip


@pytest.mark.engine
@pytest.mark.long
@pytest.mark.usefixtures("ray_session")
def test_engines_that_are_ready_late_find_their_share(tmp_path: Path) -> None:
    script = {"place": str(tmp_path), "late": 2.0, "latency": 1.5}
    late = config(3, 3, concurrency=64, script=script)
    late = late.model_copy(
        update={"model": late.model.model_copy(update={"engine": "tests.test_generation_spread:LateEngine"})}
    )
    assert play(late, write_prompts(tmp_path / "prompts.parquet", 30), tmp_path).rows == 30
    asked = Counter({file.name: len(file.read_text().splitlines()) for file in tmp_path.glob("engine-*")})
    assert len(asked) == 3
    assert max(asked.values()) < 1.6 * min(asked.values())


@pytest.mark.engine
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(
    "where", [pytest.param("sweep/model=llama-8b", marks=pytest.mark.long), "prompt_id=3/part=x/meta=1"]
)
def test_a_run_folder_may_be_named_like_a_partition(tmp_path: Path, where: str) -> None:
    folder = tmp_path / where
    folder.mkdir(parents=True)
    prompts = write_prompts(folder / "prompts.parquet", 6)
    assert play(config(1, 1), prompts, folder).rows == 6
    first = part_folder(folder / "episodes", 0)
    ids = [f"p{k:02d}" for k in range(6)]
    assert sorted(EpisodeFolder(folder / "episodes").table()["prompt_id"].to_pylist()) == ids
    a_file = next(first.glob("*.parquet"))
    rows = parquet_dataset(a_file).count_rows()
    assert EpisodeFolder(a_file).count() == rows
    a_file.unlink()
    counts = play(config(1, 1), prompts, folder)  # goes on: what is there is not asked again
    assert counts.rows == 6
    assert counts.requests < 2 * 6 * 18
    assert sorted(parquet_dataset(first).to_table()["prompt_id"].to_pylist()) == ids
