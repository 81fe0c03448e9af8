"""A RAY_ADDRESS that leads nowhere is refused within seconds and by name; sockets of a local Ray fit their limit."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from spa_ray.errors import InputError
from spa_ray.pipeline import ray_address
from spa_ray.pipeline.ray_address import check_address, named_address, short_folder


def closed_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture
def mute() -> Iterator[str]:
    """Something that listens and says nothing."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(8)
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("127.0.0.1:{port}", "nothing answers at 127.0.0.1"),
        ("ray://127.0.0.1:{port}", "nothing answers at 127.0.0.1"),
        ("no-such-host.invalid:6379", "nothing answers at no-such-host.invalid:6379"),
        ("127.0.0.1", "neither host:port"),
        ("http://127.0.0.1:x", "neither host:port"),
        ("127.0.0.1:999999", "nothing answers at"),
    ],
)
def test_an_address_that_leads_nowhere_is_refused_by_name(address: str, why: str) -> None:
    address = address.format(port=closed_port())
    started = time.monotonic()
    with pytest.raises(InputError) as e:
        check_address(address)
    assert time.monotonic() - started < 15
    text = str(e.value)
    assert f"RAY_ADDRESS={address} (environment)" in text
    assert why in text
    assert "unset RAY_ADDRESS" in text
    assert "\n" not in text


def test_what_listens_and_is_no_ray_is_refused_within_fifteen_seconds(mute: str) -> None:
    started = time.monotonic()
    with pytest.raises(InputError, match="does not answer as a Ray"):
        check_address(mute)
    assert time.monotonic() - started < 15


def test_a_cluster_of_another_version_is_named(monkeypatch: pytest.MonkeyPatch, mute: str) -> None:
    monkeypatch.setattr(ray_address, "_ASK", "print('version 1.13.0 2.60.0')")
    with pytest.raises(InputError, match=r"the cluster runs Ray 1\.13\.0, this machine has Ray 2\.60\.0"):
        check_address(mute)


def test_local_and_nothing_mean_a_ray_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("", " ", "local"):
        monkeypatch.setenv("RAY_ADDRESS", text)
        assert named_address() is None


def test_the_socket_folder_is_rays_own_choice_unless_that_is_too_long_or_not_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/tmp")
    assert short_folder() is None
    long = tmp_path / ("x" * 90)
    long.mkdir()
    for folder in (str(long), "/nowhere/at/all"):
        monkeypatch.setenv("TMPDIR", folder)
        found = short_folder()
        assert found is not None
        assert ray_address._fits(found)
    monkeypatch.setattr(ray_address, "_writable", lambda folder: False)
    with pytest.raises(InputError, match="set RAY_TMPDIR to a short folder"):
        short_folder()


@pytest.mark.engine
def test_a_local_ray_starts_under_a_long_temporary_folder_and_can_be_found_by_its_address(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 90)
    long.mkdir()
    script = """
import ray
from spa_ray.pipeline.cluster import connected
from spa_ray.pipeline.ray_address import check_address
with connected(verbose=False):
    assert ray.get(ray.remote(lambda: 7).remote(), timeout=60) == 7
    check_address(ray.get_runtime_context().gcs_address)
"""
    env = {k: v for k, v in os.environ.items() if k != "RAY_TMPDIR"} | {"TMPDIR": str(long)}
    env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "logging.cc" not in done.stderr
