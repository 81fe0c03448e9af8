"""What must hold after a schedule of the chaos suite, whatever happened in it. Each function returns what does not."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from spa_ray.config import arm_configs
from spa_ray.data.episodes import EpisodeFolder
from spa_ray.data.schemas import canonical
from spa_ray.generation.episode import Episodes
from spa_ray.generation.ledger import SUSPECT_TRIES
from spa_ray.storage.files import parquet_dataset
from tests.chaos_scene import SUSPECT, Scene, config_of
from tests.scripted import scripted_episodes


def verdict(scene: Scene, calm: pa.Table | None) -> list[str]:
    """Every violation of a scene that has ended; `calm` holds the rows of an undisturbed run of the same prompts."""
    scene.look()
    assert scene.stage is not None
    wrong = [*scene.wrong, *left_behind(scene)]
    if not (scene.stage / "stage.json").is_file():
        return [*wrong, "the run ended well and its stage is not finished"]
    folder = EpisodeFolder(scene.stage / "episodes")
    episodes = folder.table()
    wrong += [*each_once(scene, episodes), *parts_once(scene), *never_again(scene), *bounded(scene)]
    wrong += [*errors(scene, episodes)]
    if calm is not None:
        wrong += same(scene, episodes, calm)
    return wrong


def each_once(scene: Scene, episodes: pa.Table) -> list[str]:
    ids = episodes["prompt_id"].to_pylist()
    lost, strange = sorted(set(scene.ids) - set(ids)), sorted(set(ids) - set(scene.ids))
    twice = sorted({name for name in ids if ids.count(name) > 1})
    found = {"lost": lost, "from nowhere": strange, "twice": twice}
    return [f"{len(names)} prompts {what}: {names[:5]}" for what, names in found.items() if names]


def parts_once(scene: Scene) -> list[str]:
    """No part holds a prompt twice, not even where readers would take only one."""
    assert scene.stage is not None
    wrong = []
    for part in sorted((scene.stage / "episodes").glob("part=*")):
        ids = parquet_dataset(part).to_table(columns=["prompt_id"])["prompt_id"]
        if pc.count_distinct(ids).as_py() != len(ids):
            wrong.append(f"{part.name}: {len(ids)} rows of {pc.count_distinct(ids).as_py()} prompts")
    return wrong


def never_again(scene: Scene) -> list[str]:
    """A row that was seen committed is never asked for again, but for losses that came before its commit."""
    most = {key: max(begins, scene.unsure.get(key, 0)) for key, begins in scene.promised.items()}
    again = [key for key, begins in most.items() if scene.begins[key] > begins]
    return [f"{len(again)} committed rows were asked again: {sorted(again)[:5]}"] if again else []


def repeats(scene: Scene) -> int:
    """Episodes that were begun beyond the first time."""
    return sum(begins - 1 for begins in scene.begins.values())


def bound(scene: Scene) -> int:
    """What the schedule's losses may cost. An engine's death: the rows of its blocks. A node's or driver's: all rows
    begun and not committed (those in engines, and those in blocks that wait to be written)."""
    deadly = (scene.ids[SUSPECT], 0), (scene.ids[SUSPECT], 1), (scene.ids[SUSPECT], 2)
    lives = sum(1 for keys in scene.lives.values() if keys.intersection(deadly))
    died = lives * scene.schedule.engine_bound if scene.schedule.fault == "always dies" else 0
    return died + sum(rows for _, rows in scene.limits)


def bounded(scene: Scene) -> list[str]:
    wrong = []
    if repeats(scene) > bound(scene):
        wrong.append(f"{repeats(scene)} episodes were begun again, {bound(scene)} at most: {scene.limits}")
    missing = [name for name in scene.ids if not scene.begins[(name, 0)]]
    if missing:
        wrong.append(f"{len(missing)} prompts were never asked: {missing[:5]}")
    return wrong


def errors(scene: Scene, episodes: pa.Table) -> list[str]:
    """Only a prompt that no engine survives may end in an error, and only where engines died often is one retried."""
    deadly = {scene.ids[SUSPECT]} if scene.schedule.fault == "always dies" else set()
    failed = {row["prompt_id"]: row["error"] for row in episodes.to_pylist() if row["error"] is not None}
    wrong = [f"{name}: {why}" for name, why in failed.items() if name not in deadly]
    wrong += [f"{name} ended well, though no engine survives it" for name in deadly - set(failed)]
    if scene.deaths < SUSPECT_TRIES and not deadly:
        tried = sorted(key for key in scene.begins if key[1])
        wrong += [f"tried anew after {scene.deaths} deaths: {tried[:5]}"] if tried else []
    return wrong


def same(scene: Scene, episodes: pa.Table, calm: pa.Table) -> list[str]:
    """Rows of the first attempt have the undisturbed run's bytes; later ones what their own seeds say."""
    fine = pc.and_(pc.is_null(episodes["error"]), pc.equal(episodes["attempt"], 0))
    mine = episodes.filter(fine)
    theirs = calm.filter(pc.is_in(calm["prompt_id"], value_set=mine["prompt_id"].combine_chunks()))
    wrong = [] if as_bytes(mine) == as_bytes(theirs) else [f"rows differ: {differing(mine, theirs)[:5]}"]
    later = episodes.filter(pc.and_(pc.is_null(episodes["error"]), pc.greater(episodes["attempt"], 0)))
    alone = episodes_of(scene)
    strange = [row for row in later.to_pylist() if row != asyncio.run(alone.run(row, attempt=row["attempt"]))]
    return [*wrong, *(f"{r['prompt_id']}: attempt {r['attempt']} is not what its seeds say" for r in strange)]


def as_bytes(table: pa.Table) -> bytes:
    """The canonical bytes, as Arrow IPC."""
    sink = pa.BufferOutputStream()
    table = canonical(table.replace_schema_metadata(None))
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def differing(mine: pa.Table, theirs: pa.Table) -> list[str]:
    other = {row["prompt_id"]: row for row in theirs.to_pylist()}
    return [row["prompt_id"] for row in mine.to_pylist() if row != other.get(row["prompt_id"])]


def episodes_of(scene: Scene) -> Episodes:
    """The run's episodes on an engine in this process, without Ray and without faults."""
    raw = config_of(scene.schedule, scene.folder)
    raw["model"] = {"path": "model", "engine": "spa_ray.engine.scripted:ScriptedEngine"}
    episodes, engine = scripted_episodes(arm_configs(raw, [], where="chaos", stem="chaos")["main"])
    asyncio.run(engine.load_weights(Path("model")))  # the name of the run's model folder
    return episodes


def left_behind(scene: Scene) -> list[str]:
    return [f"left behind: {name}" for name in [*scene.town.settle(), *scene.driver.left()]]
