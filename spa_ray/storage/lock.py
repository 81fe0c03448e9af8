"""One driver a folder: a claim in `lock/`, kept fresh by a thread, that tells others whose the folder is.

Each claim is a file with the next free number; of several that stand, the highest is in force. It is made by an
exclusive create, and no number is used twice while the folder stands, so two can never hold one claim. What this rests
on is said at `data.files.create_text`. Never: a wait for a claim to end.
"""

from __future__ import annotations

import getpass
import json
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from spa_ray.errors import InputError, RunError
from spa_ray.storage.files import (
    AnyPath,
    as_path,
    check_writable,
    children,
    create_text,
    delete_file,
    read_json,
    write_text,
)
from spa_ray.storage.folder import LOCKS

BEAT = 10.0  # seconds between two signs of life
DEADLINE = 60.0  # without one for this long, a claim may be taken over
TRIES = 5  # when several start at once
READS = 10  # of a claim that is being made
WORD = signal.SIGUSR2  # to the main thread, when the claim is lost: SIGINT is ignored in what a script starts with «&»


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Claim:
    """Who holds a folder. `place` names kernel and process namespace: only there does `pid` mean anything.

    `born` is the process's start in the kernel's ticks (a pid may be given out again), `beat` the last sign of life.
    """

    owner: str
    user: str
    host: str
    place: str
    pid: int
    born: str
    command: str
    started: str
    beat: float
    released: bool = False

    @classmethod
    def mine(cls) -> Claim:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        pid = os.getpid()
        command = " ".join([Path(sys.argv[0]).name, *(a for a in sys.argv[1:] if "=" not in a)])  # no override's value
        return cls(
            uuid.uuid4().hex, _user(), socket.gethostname(), _place(), pid, _born(pid), command, now, time.time()
        )

    def age(self) -> float:
        """Seconds since the last sign of life, by both machines' clocks."""
        return max(0.0, time.time() - self.beat)

    def dead(self) -> bool:
        """Whether its process is known to be gone: only a process of the same machine can tell."""
        return self.place == _place() and self.born != _born(self.pid)

    def __str__(self) -> str:
        return f"{self.user}@{self.host} (pid {self.pid}, `{self.command}`, since {self.started})"


class RunLock:
    """Holds `folder` for the length of a `with` block.

    Raises on entry: InputError when another holds it, naming who and since when. A claim whose process is dead, or that
    gave no sign of life for `deadline` seconds and gives none while it is watched, is taken over with a line through
    `say`. Raises on exit: RunError when somebody took this one over; in the main thread the block is interrupted then.
    """

    def __init__(
        self,
        folder: AnyPath,
        *,
        say: Callable[[str], None] = tell,
        beat: float = BEAT,
        deadline: float = DEADLINE,
    ) -> None:
        self.folder = as_path(folder)
        self.lost: str | None = None
        self._say, self._beat, self._deadline = say, beat, deadline
        self._claim = Claim.mine()
        self._number = 0
        self._over = threading.Event()
        self._interrupts = False
        self._before: Any = None  # who heard the signal before
        self._thread = threading.Thread(target=self._keep, daemon=True, name="run-lock")

    def __enter__(self) -> RunLock:
        check_writable(self.folder)
        for _ in range(TRIES):
            top = max(self._numbers(), default=0)
            if top and (held := self._read(top)) is not None and not held.released:
                self._check_gone(held, top)
            if self._take(top + 1):
                self._interrupts = threading.current_thread() is threading.main_thread()
                if self._interrupts:
                    self._before = signal.signal(WORD, self._interrupt)
                self._thread.start()
                return self
        raise InputError(f"{self.folder}: several commands are starting on it at once; leave one of them and try again")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._over.set()
            self._thread.join()
        except KeyboardInterrupt:
            if self.lost is None:
                raise
        finally:
            if self._interrupts:
                signal.signal(WORD, self._before)
        if self.lost is not None:
            raise RunError(self.lost) from error
        try:
            self._write(replace(self._claim, beat=time.time(), released=True))
        except Exception as e:  # noqa: BLE001  # of whatever client: the work is done, or failed for a reason of its own
            self._say(f"{self.folder}: its lock could not be given back ({e}); it ends after {self._deadline:.0f} s")

    def _take(self, number: int) -> bool:
        """Make the claim; False when another was faster."""
        self._claim = replace(self._claim, beat=time.time())
        try:
            create_text(self._path(number), _text(self._claim))
        except FileExistsError:
            return False
        numbers = self._numbers()
        if max(numbers) > number:  # we saw an older state of things
            delete_file(self._path(number))
            return False
        self._number = number
        for old in numbers:
            if old < number:
                delete_file(self._path(old))
        return True

    def _check_gone(self, held: Claim, number: int) -> None:
        """Raises: InputError unless the claim's owner is gone."""
        if held.dead():
            self._say(f"{self.folder}: taken over from {held}, whose process is gone")
            return
        if held.age() >= self._deadline:
            # Clocks differ between machines: a claim that changes while we look at it is alive.
            time.sleep(1.5 * self._beat)
            if self._read(number) == held:
                self._say(f"{self.folder}: taken over from {held}, without a sign of life for {held.age():.0f} s")
                return
        raise InputError(
            f"{self.folder}: in use by {held}, last sign of life {held.age():.0f} s ago; wait for it or stop it (a "
            f"command that was killed elsewhere is forgotten after {self._deadline:.0f} s), or delete "
            f"{self.folder / LOCKS} if you know better"
        )

    def _keep(self) -> None:
        """Give signs of life until the block is over, or until the claim is lost."""
        while not self._over.wait(self._beat):
            if self.lost is None:
                self._look()
            if self.lost is not None and self._interrupts:
                signal.pthread_kill(threading.main_thread().ident or 0, WORD)

    def _interrupt(self, *_: object) -> None:
        """In the main thread."""
        if self.lost is not None:
            raise KeyboardInterrupt

    def _look(self) -> None:
        try:
            numbers = self._numbers()
            if self._number == max(numbers, default=0):
                self._write(replace(self._claim, beat=time.time()))
                return
            other = self._read(max(numbers)) if numbers else None
        except Exception:  # noqa: BLE001  # of whatever client: a store that is away keeps others from it as well
            return
        self.lost = f"{self.folder}: its lock was taken over by {other or 'nobody: it was deleted'}; this command stops"

    def _numbers(self) -> list[int]:
        return [int(path.stem) for path in children(self.folder / LOCKS) if path.stem.isdigit()]

    def _path(self, number: int) -> AnyPath:
        return self.folder / LOCKS / f"{number:08d}.json"

    def _write(self, claim: Claim) -> None:
        write_text(self._path(self._number), _text(claim))

    def _read(self, number: int) -> Claim | None:
        """The claim; None when it is gone. One that stays unreadable (a crash while it was made) counts by its age."""
        path = self._path(number)
        try:
            for _ in range(READS):
                try:
                    return Claim(**read_json(path))
                except (ValueError, TypeError):  # on a disk, a file that is being made is empty for a moment
                    time.sleep(0.1)
            return Claim("?", "somebody", "?", "?", 0, "", "?", "?", path.stat().st_mtime)
        except FileNotFoundError:
            return None


def _text(claim: Claim) -> str:
    return json.dumps(asdict(claim), indent=2) + "\n"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())


def _place() -> str:
    """The running kernel and the namespace of process ids in it; the host's name where there is no /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _born(pid: int) -> str:
    """When a process of this machine was started, empty when there is none (any more)."""
    try:
        fields: list[Any] = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else str(fields[19])
    except OSError:
        pass
    if Path("/proc/self/stat").exists():
        return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "alive"
