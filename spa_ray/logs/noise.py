"""Third-party noise: warnings, log lines and bars of the libraries below, which stay off the terminal.

`hush` has to run before those libraries are imported: most read their settings once. It hides nothing of ours and no
library's error, and a variable that the user has set keeps its value.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager

# Processes that are started later inherit these: tensor-parallel workers of an engine, a local Ray and its workers.
ENVIRONMENT = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # transformers' bars obey it as well
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DATASETS_VERBOSITY": "error",
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # the C++ side's warnings, among them vLLM's about NUMA nodes
    "PYTHONWARNINGS": "ignore::FutureWarning",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # the C++ core's warnings, which it writes to the terminal of every process
    "RAY_LOG_TO_DRIVER_EVENT_LEVEL": "FATAL",
}
LOGGERS = ("accelerate", "bitsandbytes", "datasets", "huggingface_hub", "peft", "torch", "transformers", "vllm")
LIBRARIES = (*LOGGERS, "deepspeed", "ray", "triton")  # whose warnings are not shown; DeepSpeed and Ray log otherwise


def hush(environment: MutableMapping[str, str] | None = None) -> None:
    """Quieten the libraries in this process and, through `environment` (this process's own), in those that follow."""
    environment = os.environ if environment is None else environment
    for name, value in ENVIRONMENT.items():
        environment.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning)  # for who writes the code, not for who runs it
    warnings.filterwarnings("ignore", module=rf"({'|'.join(LIBRARIES)})(\.|$)")
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    deepspeed = logging.getLogger("DeepSpeed")  # sets its own level when it is imported, and takes no variable for it
    if _is_error not in deepspeed.filters:
        deepspeed.addFilter(_is_error)


# What Ray's C++ core says of the variable above when it reads it, at a level that the variable does not reach yet.
_RAYS_LEVEL = re.compile(rb"\[[^\]]*\] logging\.cc:\d+: Set ray log level from environment variable .*\n?")


@contextmanager
def without_rays_level() -> Iterator[None]:
    """What the process writes to stderr in this block comes through at once, but for that one line of Ray's.

    C++ code writes to the file descriptor itself, so that is what is led through a pipe.
    """
    try:
        terminal = os.dup(2)
    except OSError:  # stderr is closed: there is nothing to filter
        yield
        return
    source, sink = os.pipe()
    copier = threading.Thread(target=_copy, args=(source, terminal), daemon=True)
    copier.start()
    sys.stderr.flush()
    os.dup2(sink, 2)
    os.close(sink)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(terminal, 2)
        copier.join(1.0)  # longer only where a process that was started holds the pipe: then it is served on


def _copy(source: int, terminal: int) -> None:
    held = b""  # the beginning of what may become the line
    with os.fdopen(source, "rb", buffering=0) as pipe:
        while data := pipe.read(65536):
            *lines, held = (held + data).splitlines(keepends=True) or [b""]
            if held.endswith(b"\n") or not held.startswith(b"["):
                lines, held = [*lines, held], b""
            _write(terminal, lines)
    _write(terminal, [held])


def _write(terminal: int, lines: list[bytes]) -> None:
    for line in lines:
        rest = memoryview(b"" if _RAYS_LEVEL.fullmatch(line) else line)
        while rest:
            rest = rest[os.write(terminal, rest) :]


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
