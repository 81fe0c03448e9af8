"""Where Ray is and where a local one keeps its sockets, found out before it is started or waited for.

`check_address` says within seconds when the address that the environment names leads nowhere, instead of Ray's own
minute of silence. `short_folder` gives a local Ray a folder whose sockets' paths are short enough.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from spa_ray.errors import InputError

VARIABLE = "RAY_ADDRESS"
CONNECT_SECONDS = 3.0
ANSWER_SECONDS = 9.0  # with the connection, below 15 s
SOCKET_PATH = 107  # bytes of the longest path of a socket
# What Ray adds to its temporary folder, at its longest.
SOCKET_BELOW = len("/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.00")
GO_ON = f"unset {VARIABLE} to run on a Ray of this machine, or give the host:port of a running head"

# Asks the head what it is. In a process of its own: Ray's client cannot be told how long to wait.
_ASK = """
import sys
import ray
from ray._common.usage import usage_lib
from ray._raylet import GcsClient
told = usage_lib.get_cluster_metadata(GcsClient(address=sys.argv[1])) or {}
print("version", told.get("ray_version"), ray.__version__)
"""


def named_address() -> str | None:
    """The address that the environment names, None where a local Ray is wanted."""
    address = os.environ.get(VARIABLE, "").strip()
    return None if address in ("", "local") else address


def check_address(address: str) -> None:
    """Whether a Ray answers at the address, within 15 s. Raises: InputError naming the address and the variable."""
    target = _resolved(address)
    host, _, port = target.rpartition(":")
    if not host or not port.isdigit():
        raise refused(address, "it is neither host:port, auto nor ray://host:port")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as e:
        raise refused(address, f"nothing answers at {target} ({_reason(e)})") from e
    if not address.startswith("ray://"):
        _ask(address, target)


def refused(address: str, why: str) -> InputError:
    """What to say of an address that cannot be used."""
    return InputError(f"{VARIABLE}={address} (environment): {why}; {GO_ON}")


def _resolved(address: str) -> str:
    """host:port of an address as Ray understands it."""
    if address.startswith("ray://"):
        return address.removeprefix("ray://").partition("/")[0].partition("?")[0]
    if address != "auto":
        return address.removeprefix("ray+")
    from ray._private import services

    try:
        found = services.canonicalize_bootstrap_address("auto")
    except (ConnectionError, OSError, ValueError, RuntimeError) as e:
        raise refused(address, "no Ray runs on this machine") from e
    if found is None or found == "auto":
        found = _running()
    if found is None:
        raise refused(address, "no Ray runs on this machine")
    return found


def _running() -> str | None:
    """The address of a Ray that runs on this machine; `auto` in the environment hides it from Ray's own search."""
    from ray._private import services

    found = services.find_gcs_addresses()
    return sorted(found)[0] if found else None


def _ask(address: str, target: str) -> None:
    try:
        done = subprocess.run(
            [sys.executable, "-c", _ASK, target],
            env={**os.environ, "RAY_BACKEND_LOG_LEVEL": "fatal"},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            timeout=ANSWER_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as e:
        raise refused(address, f"what listens at {target} does not answer as a Ray in {ANSWER_SECONDS:g} s") from e
    told = done.stdout.split()
    if done.returncode or len(told) < 3:
        raise refused(address, f"what listens at {target} does not answer as a Ray of this version")
    theirs, mine = told[1], told[2]
    if theirs not in (mine, "None"):
        raise refused(address, f"the cluster runs Ray {theirs}, this machine has Ray {mine}; install the same")


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def short_folder() -> str | None:
    """Where a local Ray is to keep its sockets: None for its own choice, else a shorter folder.

    Raises: InputError when the folder that the environment names is too long, or cannot be written, and no other can.
    """
    named = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    if _fits(f"{named}/ray") and _writable(Path(named)):
        return None
    for folder in ("/tmp", "/var/tmp", "/dev/shm"):
        if _writable(Path(folder)):
            return f"{folder}/ray-{os.getuid()}"
    raise InputError(
        f"{named}: Ray cannot keep its sockets there (a socket's path has at most {SOCKET_PATH} bytes, and the folder "
        "must be writable); set RAY_TMPDIR to a short folder that can be written"
    )


def _fits(folder: str) -> bool:
    return len(os.path.abspath(folder).encode()) + SOCKET_BELOW <= SOCKET_PATH


def _writable(folder: Path) -> bool:
    """Whether a file can be made there: the permission bits do not say it of a read-only or full disk."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder):
            return True
    except OSError:
        return False
