"""Folders that nobody can write (a read-only disk, a home that is not there) end a command in one line and exit 2."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from spa_ray.cli.guard import guarded
from spa_ray.cli.main import app
from spa_ray.engine.vllm_start import own_environment, prepare_environment
from spa_ray.errors import InputError
from spa_ray.pipeline.cluster import connected
from spa_ray.storage import node_cache
from spa_ray.storage.files import check_writable, out_path
from spa_ray.storage.lock import RunLock
from spa_ray.storage.node_cache import local_folder

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


def test_engines_keep_their_caches_elsewhere_where_home_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("XDG_CACHE_HOME", "VLLM_CACHE_ROOT", "TRITON_HOME"):
        monkeypatch.delenv(name, raising=False)
    for home, elsewhere in ((NOWHERE, True), (Path("/sys"), True), (tmp_path, False)):
        monkeypatch.setenv("HOME", str(home))
        with own_environment():
            prepare_environment()
            found = [os.environ.get(name) for name in ("VLLM_CACHE_ROOT", "TRITON_HOME")]
        assert [value is not None for value in found] == [elsewhere, elsewhere]
        for value in filter(None, found):
            check_writable(Path(value))
    monkeypatch.setenv("HOME", str(NOWHERE))
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    with own_environment():
        prepare_environment()
        assert os.environ["VLLM_CACHE_ROOT"] == str(tmp_path)


def test_a_machine_without_any_temporary_folder_is_told_what_to_set(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(NOWHERE), "/sys"])
    status, out, err = spa(capsys, ("run", DEMO, f"run_dir={Path.cwd()}/nothing-is-written-here", SCRIPTED))
    assert (status, out) == (2, "")
    assert err.startswith(f"spa: No usable temporary directory found in ['{NOWHERE}', '/sys']; set TMPDIR to a folder")


@pytest.mark.parametrize(("home", "temporary"), [("/sys", str(NOWHERE)), (str(NOWHERE), "x" * 120)])
def test_a_plan_and_a_preview_need_neither_home_nor_a_named_temporary_folder(
    home: str, temporary: str, tmp_path: Path, tiny_model: Path
) -> None:
    """In a process of its own: libraries read these variables when they are imported. The long path is longer than a
    socket's may be."""
    (tmp_path / ("x" * 120)).mkdir()
    (tmp_path / "p.txt").write_text("How?\n")
    given = ["prompts.source=" + str(tmp_path / "p.txt"), f"model.path={tiny_model}", SCRIPTED, "scoring.mode=regex"]
    raw = "model: {max_model_len: 4096}\nevaluation: {prompts: null}\n"
    (tmp_path / "c.yaml").write_text(raw)
    code = (
        "import sys; from spa_ray.cli.main import app; from spa_ray.cli.guard import guarded\n"
        "for command in (['plan'], ['preview', '--prompts', '1']):\n"
        "    guarded(lambda: app([*command, *sys.argv[1:]], standalone_mode=False, prog_name='spa'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "c.yaml"), *given],
        env={**os.environ, "HOME": home, "TMPDIR": str(tmp_path / temporary)}, cwd=Path(__file__).parents[1],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "signal     to expect" in done.stdout


def test_a_cache_that_cannot_be_made_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from upath import UPath

    folder = UPath("memory://bucket-of-nowhere/model")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_bytes(b"{}")
    monkeypatch.setenv(node_cache.CACHE, str(NOWHERE))
    with pytest.raises(InputError, match="set SPA_RAY_CACHE"):
        local_folder(folder)
