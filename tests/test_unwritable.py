"""Folders that nobody can write (a read-only disk, a home that is not there) end a command in one line and exit 2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from spa_ray.cli.guard import guarded
from spa_ray.cli.main import app
from spa_ray.data import node_cache
from spa_ray.data.files import check_writable, out_path
from spa_ray.data.node_cache import local_folder
from spa_ray.errors import InputError
from spa_ray.runs.cluster import connected
from spa_ray.runs.lock import RunLock

NOWHERE = Path("/proc/none")  # no user can make a folder here
DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"
SCRIPTED = "model.engine=spa_ray.engine.scripted:ScriptedEngine"


def spa(capsys: pytest.CaptureFixture[str], arguments: tuple[Any, ...]) -> tuple[object, str, str]:
    """Exit status, stdout, stderr of `spa ARGUMENTS`."""
    with pytest.raises(SystemExit) as end:
        guarded(lambda: app([str(a) for a in arguments], standalone_mode=False, prog_name="spa"))
    return (end.value.code, *capsys.readouterr())


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", DEMO, f"run_dir={NOWHERE}/r"),
        ("preview", DEMO, "--out", NOWHERE / "p", SCRIPTED),
        ("generate", DEMO, "--prompts", "p.jsonl", "--out", NOWHERE / "g"),
        ("build", "episodes", "--out", NOWHERE / "b"),
        ("train", "pairs", "--config", DEMO, "--out", NOWHERE / "t"),
        ("eval", "model", "--config", DEMO, "--out", NOWHERE / "e"),
    ],
)
def test_a_command_says_so_before_it_begins(arguments: tuple[Any, ...], capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = spa(capsys, arguments)
    assert (status, out) == (2, "")
    assert str(NOWHERE) in err
    assert len(err.strip().splitlines()) == 1


def test_a_folder_that_is_not_there_yet_is_looked_for_above(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    assert out_path(str(tmp_path / "c")) == tmp_path / "c"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="Not a directory"):
        check_writable(tmp_path / "file" / "x")


def test_a_run_folder_is_tried_before_anything_is_written_to_it() -> None:
    with pytest.raises(InputError, match="cannot be written"), RunLock(NOWHERE / "r", say=print):
        pass


def test_a_home_in_which_ray_cannot_write_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def init(**given: Any) -> None:
        NOWHERE.mkdir()

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(InputError, match=r"/proc/none: Ray .* set HOME"), connected(verbose=False):
        pass


def test_a_cache_that_cannot_be_made_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from upath import UPath

    folder = UPath("memory://bucket-of-nowhere/model")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_bytes(b"{}")
    monkeypatch.setenv(node_cache.CACHE, str(NOWHERE))
    with pytest.raises(InputError, match="set SPA_RAY_CACHE"):
        local_folder(folder)
