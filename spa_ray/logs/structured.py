"""Logs as JSON lines: one object a record with time, level, logger, message, and where in a run it was written.

Comes in: records of the logger `spa_ray` and those below it. Goes out: `RUN/logs/driver.jsonl` from the driver, and
standard output from Ray's workers, so that they lie in Ray's log folder, a file a process. Secrets are taken out of
every record. Never: other libraries' loggers (RAY_LOGGING_CONFIG_ENCODING=JSON is for Ray's), human output on stderr.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from spa_ray.errors import InputError
from spa_ray.logs.redact import redact, redact_tree

ROOT = "spa_ray"
LEVEL_VARIABLE = "SPA_LOG_LEVEL"
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")

_NOTHING: Mapping[str, Any] = MappingProxyType({})
_HERE: ContextVar[Mapping[str, Any]] = ContextVar("spa_ray.logs", default=_NOTHING)
_VLLM = {"vllm_process_name"}  # in every record of a process that has imported vLLM
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"} | _VLLM


@contextmanager
def context(**fields: Any) -> Iterator[None]:
    """Fields of every record that is written inside the block, by this thread or coroutine: stage, prompt_id, step."""
    token = _HERE.set({**_HERE.get(), **fields})
    try:
        yield
    finally:
        _HERE.reset(token)


class JsonLines(logging.Formatter):
    """A record as one line of JSON. `fields` stand in every line; the record's own `extra` fields come last."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__()
        self._fields = dict(fields)

    def format(self, record: logging.LogRecord) -> str:
        told = vars(record).items()
        extra = {key: value for key, value in told if key not in _STANDARD and not key.startswith("_")}  # Ray adds some
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": redact(record.getMessage()),
            **redact_tree({**self._fields, **_HERE.get(), **extra}),
        }
        if record.exc_info:
            line["traceback"] = redact(self.formatException(record.exc_info))
        return json.dumps(line, default=_as_text)


def _as_text(value: Any) -> str:
    return redact(str(value))


def level_of(*, verbose: bool = False) -> str:
    """The level to log at: SPA_LOG_LEVEL where it is set, else DEBUG with `verbose` and INFO without.

    Raises: InputError for a name that is no level.
    """
    named = os.environ.get(LEVEL_VARIABLE, "").upper()
    if named and named not in LEVELS:
        raise InputError(f"{LEVEL_VARIABLE}: {named!r} is no level; one of {', '.join(LEVELS)}")
    return named or ("DEBUG" if verbose else "INFO")


@contextmanager
def driver_log(path: Path, *, run: str, verbose: bool = False) -> Iterator[None]:
    """Append this process's records to a file while the block runs; what ends the block is its last record.

    Raises: InputError as `level_of`, OSError when the file cannot be written.
    """
    level = level_of(verbose=verbose)
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    with _listening(handler, level, {"run": run}):
        try:
            yield
        except BaseException as e:
            logging.getLogger(ROOT).error("ended: %s: %s", type(e).__name__, e)
            raise


@dataclass(frozen=True)
class WorkerLog:
    """How a worker process logs: plain data that travels with an actor's arguments. `fields` stand in every line."""

    level: str
    fields: Mapping[str, Any]

    @classmethod
    def of(cls, *, run: str, stage: str, verbose: bool = False) -> WorkerLog:
        """Read on the driver, whose environment decides. Raises: InputError as `level_of`."""
        return cls(level_of(verbose=verbose), {"run": run, "stage": stage})

    def start(self, **more: Any) -> None:
        """Send this process's records to its standard output, from now on. A second call replaces the first."""
        _stop(logging.getLogger(ROOT))
        handler = logging.StreamHandler(sys.stdout)
        _start(handler, self.level, {**self.fields, **more})

    @contextmanager
    def running(self, **more: Any) -> Iterator[None]:
        """The same for the length of a block, for processes that go on with something else."""
        handler = logging.StreamHandler(sys.stdout)
        with _listening(handler, self.level, {**self.fields, **more}):
            yield


@contextmanager
def _listening(handler: logging.Handler, level: str, fields: Mapping[str, Any]) -> Iterator[None]:
    logger = logging.getLogger(ROOT)
    before = (logger.level, logger.propagate)
    _start(handler, level, fields)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
        logger.setLevel(before[0])
        logger.propagate = before[1]


def _start(handler: logging.Handler, level: str, fields: Mapping[str, Any]) -> None:
    handler.setFormatter(JsonLines(fields))
    logger = logging.getLogger(ROOT)
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False  # else Python's last resort, or Ray's root handler, would say it again on stderr


def _stop(logger: logging.Logger) -> None:
    for handler in [h for h in logger.handlers if isinstance(h.formatter, JsonLines)]:
        logger.removeHandler(handler)
