"""A few schedules of the chaos suite (tests/chaos_generation.py) that never change; `make chaos` plays many more."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spa_ray.data.episodes import EpisodeFolder
from spa_ray.data.schemas import EPISODES
from tests.chaos_checks import bound, episodes_of, repeats, verdict
from tests.chaos_cluster import Town, town
from tests.chaos_generation import prompts_of
from tests.chaos_scene import Scene
from tests.chaos_schedules import ACTS, FAULTS, Event, Schedule, draw

ROWS = 24
REQUESTS = 3 + 6 + 1 + 2  # samples, their scores, the refinement and its scores


def schedule(name: str, *events: Event) -> Schedule:
    return Schedule(
        name, ROWS, rows_per_block=2, concurrency=3, engines=2, jitter=0.25, fault=None, events=tuple(events)
    )


@pytest.fixture(scope="module")
def cluster() -> Iterator[Town]:
    with town() as built:
        yield built


def play(schedule: Schedule, cluster: Town, folder: Path) -> Scene:
    """The scene, after everything that must hold of any schedule was seen to hold."""
    rows = prompts_of("scripted")[:ROWS]
    scene = Scene(schedule, cluster, folder, rows)
    scene.play()
    episodes = episodes_of(scene)
    undisturbed = [asyncio.run(episodes.run(row)) for row in rows]
    calm = folder / "calm.parquet"
    pq.write_table(pa.Table.from_pylist(undisturbed, schema=EPISODES), calm)
    assert verdict(scene, EpisodeFolder(calm).table()) == []
    return scene


@pytest.mark.engine
@pytest.mark.chaos
@pytest.mark.timeout(300)
def test_an_engines_process_and_then_its_node_are_killed_and_the_run_ends_by_itself(
    cluster: Town, tmp_path: Path
) -> None:
    scene = play(
        schedule("nodes", Event("kill engine", "begun", 5, 0.0), Event("kill node", "committed", 12, 0.9)),
        cluster,
        tmp_path,
    )
    assert (len(scene.done), scene.driver.starts) == (2, 1)
    assert len(scene.lives) > 2


@pytest.mark.engine
@pytest.mark.chaos
@pytest.mark.timeout(300)
def test_a_driver_killed_at_half_of_its_rows_asks_for_the_other_half_alone(cluster: Town, tmp_path: Path) -> None:
    scene = play(schedule("half", Event("kill driver", "committed", ROWS // 2, 0.0)), cluster, tmp_path)
    assert (len(scene.done), scene.driver.starts) == (1, 2)
    done = ROWS - repeats(scene)
    assert done >= ROWS // 2
    assert repeats(scene) <= bound(scene) < ROWS
    asked = sum(not line.startswith("born") for line in (tmp_path / "trace").read_text().splitlines())
    assert asked <= (ROWS + repeats(scene)) * (REQUESTS + 3)  # a repeated candidate is drawn once more


def test_a_schedule_is_drawn_from_its_seed_alone_and_everything_is_drawn_at_times() -> None:
    drawn = [draw(number, 0) for number in range(100)]
    assert drawn == [draw(number, 0) for number in range(100)]
    assert drawn != [draw(number, 1) for number in range(100)]
    assert {event.act for one in drawn for event in one.events} == set(ACTS)
    assert {one.fault for one in drawn} == set(FAULTS)
    assert all(event.count <= one.rows for one in drawn for event in one.events)
    assert not any(event.act == "fill disk" for n in range(100) for event in draw(n, 0, disks=False).events)
