"""How every command ends: results on stdout, or one line on stderr and an exit status; never a traceback.

What nobody expected is told in one line as well; its traceback goes to a file that the line names, and with
`--verbose` to stderr. A terminal that cannot show a character shows a question mark in its place.
"""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import typer

from spa_ray.errors import InputError, LateError, RunError
from spa_ray.logs import hush, printable, redact
from spa_ray.storage.files import client_error

INTERRUPTED = 130
LONGEST_REASON = 400  # characters of an unexpected error's own text

UsageError: Any = typer.BadParameter.__base__
ClickError: Any = UsageError.__base__


def guarded(command: Callable[[], Any], *, name: str = "spa") -> None:
    """Run a command, other libraries' noise apart; a returned whole number other than 0 is its exit status."""
    tolerant_streams()
    if not verbose():
        hush()
    try:
        status = command()
        sys.stdout.flush()
    except BrokenPipeError:  # who reads our output has gone: there is nobody to tell
        _discard_output()
        sys.exit(1)
    except SystemExit as e:
        _end(e, name)
    except LateError as e:
        fail(*explain(e, name=name), name=name, at_once=True)
    except BaseException as e:  # noqa: BLE001 (the last line of defence; Rust libraries panic with no Exception)
        fail(*explain(e, name=name), name=name)
    else:
        if isinstance(status, int) and status:
            fail(*explain(KeyboardInterrupt()), name=name) if status == INTERRUPTED else sys.exit(status)


def _end(end: SystemExit, name: str) -> NoReturn:
    if end.code == INTERRUPTED:
        fail(*explain(KeyboardInterrupt()), name=name)
    if isinstance(end.code, str):  # `sys.exit("text")` of a library
        fail(end.code, 1, name=name)
    raise end


def explain(error: BaseException, *, name: str = "spa") -> tuple[str, int]:
    """One line for an error and the exit status that goes with it; writes down what nobody expected."""
    if isinstance(error, typer.Abort) and error.__cause__ is not None:  # typer's word for an EOFError
        error = error.__cause__
    if isinstance(error, InputError | RunError):
        return str(error), 2 if isinstance(error, InputError) else 1
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return "stopped; run the same command again and it goes on where it was", INTERRUPTED
    if isinstance(error, ClickError):
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
            sys.exit(2)
        command = getattr(getattr(error, "ctx", None), "command_path", name)
        return f"{error.format_message().rstrip('.')}; see {command} --help", 2
    line = client_error(error)
    if line is not None:
        return f"{line}; check the endpoint and the keys in the environment, and run the same command again", 1
    if isinstance(error, FileNotFoundError) and str(error.strerror).startswith("No usable temporary directory"):
        return f"{error.strerror}; set TMPDIR to a folder that can be written", 2
    if isinstance(error, OSError) and error.strerror:  # a disk that is full, a folder that may not be written
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}; what was finished stays, run the same command again{_details(error)}", 1
    return f"{_reason(error)}; this was not expected{_details(error)}", 1


def _reason(error: BaseException) -> str:
    """The error's class and the line of its text that says most: of a traceback's text the last one."""
    if isinstance(error, MemoryError):
        return "out of memory"
    try:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    except Exception:  # noqa: BLE001 (the text of a foreign error cannot be made)
        lines = []
    text = "" if not lines else lines[-1 if any("Traceback" in line for line in lines) else 0]
    kind = type(error).__name__
    shown = text if text.startswith(kind) else f"{kind}: {text}" if text else kind
    return shown if len(shown) <= LONGEST_REASON else f"{shown[: LONGEST_REASON - 1]}…"


def _details(error: BaseException) -> str:
    """Keep the traceback; says where."""
    try:
        told = printable(redact("".join(traceback.format_exception(error))))
    except Exception as e:  # noqa: BLE001 (as above)
        told = f"{type(error).__name__}, whose text cannot be made ({type(e).__name__})\n"
    if verbose():
        print(told, file=sys.stderr)
    try:
        folder = Path(tempfile.mkdtemp(prefix=f"spa-error-{datetime.now(UTC):%Y%m%d-%H%M%S}-"))
        log = folder / "traceback.txt"
        log.write_text(f"{' '.join(map(redact, sys.argv))}\n{told}", encoding="utf-8", errors="backslashreplace")
    except OSError:
        return "; --verbose shows the details"
    return f"; details: {log}"


def verbose() -> bool:
    return "--verbose" in sys.argv or os.environ.get("SPA_LOG_LEVEL", "").upper() == "DEBUG"


def fail(message: str, status: int, *, name: str = "spa", at_once: bool = False) -> NoReturn:
    """One line, whatever text of models, data or the environment the message quotes. `at_once`: without waiting for
    threads, as Python else does at its end."""
    print(f"{name}: {printable(redact(' '.join(message.split())))}", file=sys.stderr)
    if at_once:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def tolerant_streams() -> None:
    """Let stdout and stderr take any text: a character that the terminal's encoding lacks becomes a question mark."""
    for stream in ("stdout", "stderr"):
        file = getattr(sys, stream)
        if file is None:  # closed by whoever started us
            setattr(sys, stream, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(file, "reconfigure"):
            file.reconfigure(errors="replace")


def shows_unicode() -> bool:
    """Whether stdout takes every character."""
    return (getattr(sys.stdout, "encoding", None) or "utf-8").lower().startswith("utf")


def _discard_output() -> None:
    """Keep Python from writing to a closed pipe once more when it ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        except (OSError, ValueError):
            return
