"""A command in a pseudo-terminal of its own: what it writes is read, what a person would type is sent."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
from types import TracebackType

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
CTRL_C, CTRL_D = "\x03", "\x04"


class Terminal:
    """A context manager; its end kills what is left of the command."""

    def __init__(self, *command: str, columns: int = 80, rows: int = 40) -> None:
        self.shown, self._read = "", 0
        self._pid, self._fd = pty.fork()
        if self._pid == 0:
            os.execve(command[0], command, {**os.environ, "TERM": "xterm", "COLUMNS": str(columns)})
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def until(self, text: str, seconds: float = 120) -> str:
        """What came since the last call, up to this text. Raises: AssertionError where it does not come."""
        end = time.monotonic() + seconds
        while (at := self.shown.find(text, self._read)) < 0:
            assert time.monotonic() < end, f"no {text!r} in {self.shown[self._read :]!r}"
            assert self._more(), f"ended without {text!r}: {self.shown[self._read :]!r}"
        found, self._read = self.shown[self._read : at], at + len(text)
        return found

    def status(self) -> int:
        """Of the command, once it has ended."""
        while self._more():
            pass
        pid, self._pid = self._pid, 0
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def _more(self) -> bool:
        """Read on; false at the command's end."""
        if select.select([self._fd], [], [], 1.0)[0]:
            try:
                data = os.read(self._fd, 65536)
            except OSError:  # Linux says so where the other end is closed
                return False
            self.shown += ESCAPES.sub("", data.decode(errors="replace")).replace("\r", "")
            return bool(data)
        return True

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        os.close(self._fd)


def spa(*arguments: str, **size: int) -> Terminal:
    return Terminal(sys.executable, "-m", "spa_ray.cli.main", *arguments, **size)
