"""A local Ray is nobody else's: every port of it listens on the loopback address, and there is no dashboard."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

LISTENING = """
import json, psutil, ray
from spa_ray.pipeline.cluster import connected
with connected(verbose=False):
    ray.get(ray.remote(lambda: 1).remote(), timeout=120)
    here = psutil.Process()
    ports = [(p.name(), c.laddr.ip) for p in [here, *here.children(recursive=True)]
             for c in p.net_connections(kind="inet") if c.status == psutil.CONN_LISTEN]
    print(json.dumps({"ports": ports, "dashboard": ray._private.worker.get_dashboard_url()}))
"""


@pytest.mark.engine
def test_a_local_ray_listens_on_the_loopback_address_alone() -> None:
    unset = ("RAY_ADDRESS", "RAY_JOB_ID")
    env = {name: value for name, value in os.environ.items() if name not in unset}
    env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, "-c", LISTENING]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["ports"]) >= 5
    assert {ip for _, ip in found["ports"]} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, found["ports"]
    assert not found["dashboard"]
