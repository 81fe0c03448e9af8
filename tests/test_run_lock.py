"""One driver a folder: of processes that really race one gets in, the dead are replaced, the living are named."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from spa_ray.errors import InputError, RunError
from spa_ray.storage.files import AnyPath, as_path, children, read_json, write_json, write_text
from spa_ray.storage.lock import WORD, Claim, RunLock
from tests.s3_server import BUCKET, s3_server

QUICK: dict[str, Any] = {"beat": 0.1, "deadline": 1.0}


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    with s3_server() as environment:
        yield environment


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AnyPath:
    if request.param == "local":
        return tmp_path / "run"
    for key, value in request.getfixturevalue("s3").items():
        monkeypatch.setenv(key, value)
    return as_path(f"s3://{BUCKET}/{tmp_path.name}/run")


def claims(folder: AnyPath) -> list[dict[str, Any]]:
    return [read_json(path) for path in children(folder / "lock")]


def foreign(**changes: Any) -> Claim:
    """A claim from another machine."""
    return replace(Claim.mine(), owner="other", user="ada", host="far", place="another kernel", **changes)


def put(folder: AnyPath, number: int, claim: Claim) -> None:
    write_json(folder / "lock" / f"{number:08d}.json", asdict(claim))


def hold(folder: str, started: Any) -> None:
    with RunLock(as_path(folder), **QUICK):
        started.set()
        time.sleep(60)


def enter_often(folder: str, times: int, answers: Any) -> None:
    """Get in `times` times, and see each time that nobody else is inside."""
    inside, refused = Path(folder) / "inside", 0
    for _ in range(times):
        while True:
            try:
                with RunLock(Path(folder), say=lambda _: None):
                    os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
                    time.sleep(0.002)
                    inside.unlink()
                break
            except InputError:
                refused += 1
    answers.put(refused)


def test_of_processes_that_race_one_is_inside_at_a_time(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    racers = [context.Process(target=enter_often, args=(str(tmp_path), 25, answers)) for _ in range(4)]
    for racer in racers:
        racer.start()
    refused = [answers.get(timeout=60) for _ in racers]
    for racer in racers:
        racer.join()
    assert sum(refused) > 0, "they never met: nothing was tried"
    assert [racer.exitcode for racer in racers] == [0] * 4


def test_a_folder_in_use_is_refused_at_once_naming_who_and_how_to_mend(folder: AnyPath) -> None:
    with RunLock(folder):
        started = time.monotonic()
        with pytest.raises(InputError, match=rf"in use by .*@.* \(pid {os.getpid()}, .*last sign of life \d+ s ago"):
            RunLock(folder).__enter__()
        assert time.monotonic() - started < 2
    with RunLock(folder):
        pass


@pytest.mark.parametrize("ending", [None, ValueError("x"), KeyboardInterrupt()])
def test_the_claim_is_given_back_however_the_block_ends(folder: AnyPath, ending: BaseException | None) -> None:
    said: list[str] = []
    try:
        with RunLock(folder):
            if ending is not None:
                raise ending
    except (ValueError, KeyboardInterrupt):
        assert ending is not None
    assert [claim["released"] for claim in claims(folder)] == [True]
    with RunLock(folder, say=said.append):
        assert [claim["released"] for claim in claims(folder)] == [False]
    assert said == []


def test_a_claim_of_a_dead_process_of_this_machine_is_taken_over_at_once(folder: AnyPath) -> None:
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    child = context.Process(target=hold, args=(str(folder), started))
    child.start()
    assert started.wait(60)
    with pytest.raises(InputError, match="in use by"):
        RunLock(folder).__enter__()
    os.kill(int(child.pid or 0), signal.SIGKILL)
    time.sleep(0.2)  # it is a zombie now: nobody has waited for it
    said: list[str] = []
    began = time.monotonic()
    with RunLock(folder, say=said.append):
        assert time.monotonic() - began < 2
    assert len(said) == 1
    assert f"(pid {child.pid}, " in said[0]
    assert "whose process is gone" in said[0]
    child.join()


def test_a_pid_that_was_given_out_again_is_not_taken_for_the_owner() -> None:
    mine = Claim.mine()
    assert not mine.dead()
    assert replace(mine, born="1").dead()
    assert not replace(mine, born="1", place="another kernel").dead()


def test_a_silent_claim_of_another_machine_is_taken_over(folder: AnyPath) -> None:
    put(folder, 7, foreign(beat=time.time() - 500))
    said: list[str] = []
    with RunLock(folder, say=said.append, **QUICK):
        assert [path.name for path in children(folder / "lock")] == ["00000008.json"]
    assert "taken over from ada@far" in said[0]
    assert "without a sign of life for 50" in said[0]


def test_a_claim_whose_clock_is_behind_but_which_moves_is_alive(folder: AnyPath) -> None:
    put(folder, 1, foreign(beat=time.time() - 500))
    timer = threading.Timer(0.3, put, (folder, 1, foreign(beat=time.time() - 499)))
    timer.start()
    with pytest.raises(InputError, match="in use by ada@far"):
        RunLock(folder, beat=0.6, deadline=1.0).__enter__()
    timer.join()


def test_a_claim_that_was_cut_off_while_it_was_made_counts_by_its_age(tmp_path: Path) -> None:
    write_text(tmp_path / "lock" / "00000001.json", "")
    with pytest.raises(InputError, match="in use by somebody"):
        RunLock(tmp_path).__enter__()
    os.utime(tmp_path / "lock" / "00000001.json", (0, 0))
    with RunLock(tmp_path, say=lambda _: None, **QUICK):
        pass


def test_signs_of_life_come_while_the_block_runs(folder: AnyPath) -> None:
    with RunLock(folder, **QUICK):
        before = claims(folder)[0]["beat"]
        time.sleep(0.5)
        assert claims(folder)[0]["beat"] > before
        assert claims(folder)[0]["beat"] == pytest.approx(time.time(), abs=0.5)


def work_while(folder: AnyPath, happens: Callable[[], None]) -> None:
    with RunLock(folder, **QUICK):
        happens()
        time.sleep(30)


def test_who_loses_the_claim_is_stopped(folder: AnyPath) -> None:
    began = time.monotonic()
    with pytest.raises(RunError, match="taken over by ada@far"):
        work_while(folder, lambda: put(folder, 2, foreign()))
    assert time.monotonic() - began < 10
    assert read_json(folder / "lock" / "00000002.json")["owner"] == "other"


def test_a_command_that_a_script_started_in_the_background_is_stopped_too(tmp_path: Path) -> None:
    """A shell that runs a script lets what it starts with «&» ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        began = time.monotonic()
        with pytest.raises(RunError, match="taken over by ada@far"):
            work_while(tmp_path, lambda: put(tmp_path, 2, foreign()))
        assert time.monotonic() - began < 10
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_locks_signal_means_nothing_while_the_claim_holds_and_is_given_back(tmp_path: Path) -> None:
    before = signal.getsignal(WORD)
    with RunLock(tmp_path, **QUICK):
        signal.raise_signal(WORD)
    assert signal.getsignal(WORD) == before


def test_who_finds_its_claim_deleted_is_stopped(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="deleted"):
        work_while(tmp_path, (tmp_path / "lock" / "00000001.json").unlink)


def test_a_command_on_a_folder_in_use_ends_with_exit_status_2_and_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("arms: {}")
    command = [sys.executable, "-m", "spa_ray.cli.main", "clean", str(tmp_path)]
    with RunLock(tmp_path):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"spa: {tmp_path}: in use by")
    assert done.stderr.count("\n") == 1


def test_no_override_stands_in_a_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/bin/spa", "run", "a.yaml", "model.engine_kwargs.token=hunter2"])
    with RunLock(tmp_path):
        assert "hunter2" not in json.dumps(claims(tmp_path))
        assert claims(tmp_path)[0]["command"] == "spa run a.yaml"
