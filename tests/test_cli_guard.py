"""The last line of defence: no command shows a traceback, whatever it is given and whatever goes wrong inside it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from spa_ray.cli.guard import guarded
from spa_ray.cli.main import app, main
from spa_ray.errors import InputError, RunError

SEED = 20_261_125
COMMANDS = sorted(command.name or command.callback.__name__ for command in app.registered_commands if command.callback)
GARBAGE = [
    "",
    " ",
    "-",
    "--",
    "---",
    "=",
    "=1",
    "a=",
    "a=b",
    "a.b.c=1",
    "..=1",
    "train=1",
    "train.lr=x",
    "[",
    "{",
    "{{",
    "'",
    '"',
    "\\",
    "/",
    "//",
    ".",
    "..",
    "~",
    "~nobody/x",
    "\udcff",
    "\x1b[2J",
    "ü",
    "\u202e",
    "x" * 5000,
    "/" + "x" * 300,
    "null",
    "@x",
    "--out",
    "--config",
    "--json",
    "--verbose",
    "--help=1",
    "--until",
    "--limit",
    "--price=x",
    "--price=nan",
    "--price",
    "-1",
    "--compare",
    "--step",
    "--seeds=0",
    "--prompts",
    "--no-such-option",
    "s3://",
    "://",
    "file://",
    "nope://x/y",
    "s3://user:secret@bucket/x",
    "a\tb",
    "a\nb",
    "%s",
    "$HOME",
    "/dev/null",
    "/proc/self/mem",
    "/etc/passwd",
    "package://x",
    "module:name",
    "os:nothing",
    "json:loads",
    "config.yaml",
    "folder",
    "prompts.jsonl",
    "binary",
    "model.path=",
    "arms=[]",
    "arms={a: {b: 1}}",
    "arms.a.b.c=1",
    "objectives=[]",
    "prompts.source=json:loads",
    "prompts.source=os.path:join",
    "model.path=~nobody/x",
    "model.path=--x",
    "model.path=a b/c",
    "model.path=--x/--y",
    "run_dir=",
    "run_dir=[",
    "constitution=/",
    "name=",
    "seed=1e999",
]


@pytest.fixture
def spa(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run `spa ARGS`; returns (exit status, stdout and stderr)."""

    def call(*arguments: str | Path) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["spa", *map(str, arguments)])
        try:
            main()
            status = 0
        except SystemExit as e:
            status = e.code if isinstance(e.code, int) else 0
        out, err = capsys.readouterr()
        return status, out + err

    return call


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a config that names no model, an empty folder and a file of noise."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "config.yaml").write_text("model: {path: ./none}\nprompts: {source: prompts.jsonl}\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Hi"}\n')
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    (tmp_path / "folder").mkdir()
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_shows_a_traceback_for_garbage(spa: Any, here: Path, command: str) -> None:
    rng = random.Random(f"{SEED}{command}")  # fixed, so that a failure comes again
    overrides = ["model.path=./none"] if command in ("demo", "reproduce") else []  # else they would run
    tried = [[g] for g in rng.sample(GARBAGE, 40)] + [
        [rng.choice(GARBAGE) for _ in range(rng.randint(2, 5))] for _ in range(25)
    ]
    tried += [["config.yaml", "--out", "o", "--config", "config.yaml", g] for g in rng.sample(GARBAGE, 15)]
    for arguments in tried:
        status, told = spa(command, *overrides, *arguments)
        assert "Traceback" not in told, (command, arguments, told)
        assert "not expected" not in told, (command, arguments, told)
        if status == 2 and "Usage" not in told:
            assert told.strip().count("\n") == 0, (command, arguments, told)


class PanicError(BaseException):
    """As pyo3 derives its own."""


class MuteError(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


UNEXPECTED = [
    KeyError("key"),
    IndexError("list index out of range"),
    RecursionError("maximum recursion depth exceeded"),
    MemoryError(),
    PanicError("called `Option::unwrap()` on a `None` value"),
    ExceptionGroup("several", [ValueError("a")]),
    MuteError(),
    StopIteration(),
    AssertionError(),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    ImportError("no libx.so"),
    RuntimeError("first\n\x1b[31msecond"),
    RuntimeError("ray::f()\nTraceback (most recent call last):\n  File x\nValueError: bad"),
    RuntimeError("x" * 10_000),
    NotImplementedError(),
    SyntaxError("bad"),
]


@pytest.mark.parametrize("error", UNEXPECTED, ids=lambda error: type(error).__name__)
def test_what_nobody_expected_is_one_line_and_a_file_with_the_details(
    spa: Any, here: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("spa_ray.config.load_config", broken)
    monkeypatch.setattr("tempfile.tempdir", str(here))
    for command in (["run", "config.yaml"], ["plan", "config.yaml"], ["train", "p", "--out", "o", "--config", "c"]):
        status, told = spa(*command)
        assert status == 1
        assert told.startswith("spa: ")
        assert told.count("\n") == 1
        assert len(told) < 700
        assert "Traceback" not in told
        log = Path(told.strip().rpartition("details: ")[2])
        assert "spa_ray/cli/main.py" in log.read_text() or "cannot be made" in log.read_text()
    status, told = spa("run", "config.yaml", "--verbose")
    assert status == 1
    assert "in broken" in told or "cannot be made" in told


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (InputError("x: wrong"), 2, "spa: x: wrong\n"),
        (RunError("stage: failed"), 1, "spa: stage: failed\n"),
        (KeyboardInterrupt(), 130, "run the same command again"),
        (
            PermissionError(13, "Permission denied", "/root/x"),
            1,
            "spa: /root/x: Permission denied; what was finished stays",
        ),
        (IsADirectoryError(21, "Is a directory", "d"), 1, "spa: d: Is a directory"),
        (OSError(28, "No space left on device"), 1, "spa: No space left on device; what was finished stays"),
        (BrokenPipeError(32, "Broken pipe"), 1, ""),
        (SystemExit("a library gave up"), 1, "spa: a library gave up\n"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_known_keeps_its_status_and_words(
    spa: Any, here: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, told: str
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("spa_ray.config.load_config", broken)
    monkeypatch.setattr("spa_ray.cli.guard._discard_output", lambda: None)
    got = spa("run", "config.yaml")
    assert got[0] == status
    assert told in got[1]


def test_a_wrong_option_is_one_line(spa: Any) -> None:
    assert spa("run", "c.yaml", "--nope") == (2, "spa: No such option: --nope; see spa run --help\n")
    assert spa("run") == (2, "spa: Missing argument 'config'; see spa run --help\n")
    assert "No such command 'rum'" in spa("rum")[1]


def test_a_script_of_any_name_can_be_guarded(capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> None:
        raise typer.BadParameter("nope")

    with pytest.raises(SystemExit):
        guarded(broken, name="bench")
    assert capsys.readouterr().err == "bench: Invalid value: nope; see bench --help\n"


# --- terminals ------------------------------------------------------------------------------------------------------

SHOW = """
import sys
from spa_ray.cli.guard import guarded, shows_unicode
from spa_ray.cli.main import emit
from spa_ray.errors import InputError
def show():
    from rich.console import Console
    from rich.table import Table
    table = Table("τ ≻ −", "中文 😀")
    table.add_row("é", "\\u2028")
    Console().print(table)
    print("Antwort: ü 中 😀 ≻")
    emit({"a": "é中😀", "b": "\\x1b"}, True)
    if len(sys.argv) > 1:
        raise InputError("schlecht: ü 中 😀")
guarded(show)
"""


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "latin-1"},
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "cp1252"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        {"LC_ALL": "POSIX"},
        {"NO_COLOR": "1"},
        {"PYTHONIOENCODING": "latin-1", "FORCE_COLOR": "1"},
    ],
    ids=str,
)
def test_any_terminal_takes_tables_model_text_and_json(tmp_path: Path, environment: dict[str, str]) -> None:
    script = tmp_path / "show.py"
    script.write_text(SHOW, encoding="utf-8")
    kept = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    kept["PYTHONPATH"] = str(Path(__file__).parents[1])
    for fails in ([], ["yes"]):
        done = subprocess.run(
            [sys.executable, str(script), *fails],
            capture_output=True,
            env={**kept, **environment},
            timeout=60,
            check=False,
        )
        assert done.returncode == (2 if fails else 0), done.stderr
        assert b"Traceback" not in done.stderr
        assert b"Unicode" not in done.stderr
        assert json.loads(done.stdout.splitlines()[-1].decode("utf-8")) == {"a": "é中😀", "b": "\x1b"}
        assert not fails or done.stderr.startswith(b"spa: schlecht")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "| head -c 1", "> /dev/full"])
def test_an_output_that_is_closed_or_full_is_no_traceback(closed: str) -> None:
    command = f"{sys.executable} -m spa_ray.cli.main schema {closed}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=60, check=False)
    assert b"Traceback" not in done.stderr
    assert b"Exception" not in done.stderr
    assert b"No space left" in done.stderr or "full" not in closed
