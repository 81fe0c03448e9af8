"""On a cluster of several nodes a folder is asked of each: one that a node does not see is refused, naming the node."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spa_ray.storage.files import children
from tests.s3_server import BUCKET, s3_server

pytestmark = pytest.mark.engine

PATIENCE = 240.0  # seconds

# A second node in a mount namespace of its own, where an empty disk lies over one folder, as on another machine.
DRIVER = """
import json, os, subprocess, sys, time
import ray
from ray.cluster_utils import Cluster
from spa_ray.storage.files import as_path
from spa_ray.errors import InputError
from spa_ray.storage.shared_folder import check_shared

hidden, *folders = sys.argv[1:]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
check_shared(as_path(hidden))  # one node: there is nobody to ask
ray_start = f"ray start --address={cluster.address} --num-cpus=1 --block"
inside = f'mount -t tmpfs none "{hidden}" && exec {ray_start}'
node = subprocess.Popen(["unshare", "-m", "sh", "-c", inside], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
try:
    until = time.monotonic() + 200
    while len([n for n in ray.nodes() if n["Alive"]]) < 2:
        assert time.monotonic() < until and node.poll() is None, "the second node did not come"
        time.sleep(0.2)
    answers = {}
    for folder in folders:
        try:
            check_shared(as_path(folder))
            answers[folder] = None
        except InputError as e:
            answers[folder] = str(e)
    print(json.dumps(answers))
finally:
    ray.shutdown()
    node.terminate()
    node.wait(30)
    cluster.shutdown()
"""


def may_unshare() -> bool:
    tool = shutil.which("unshare")
    return tool is not None and subprocess.run([tool, "-m", "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not may_unshare(), reason="needs a mount namespace of its own (root)")
@pytest.mark.long
def test_a_folder_that_one_node_does_not_see_is_refused(tmp_path: Path) -> None:
    hidden, seen = tmp_path / "hidden", tmp_path / "seen"
    hidden.mkdir()
    with s3_server() as s3:
        folders = [str(hidden), str(seen), f"s3://{BUCKET}/run"]
        answers = ask(str(hidden), folders, s3)
    assert "does not see this folder as the driver does; use a folder on a disk that all" in answers[str(hidden)]
    assert answers[str(seen)] is None
    assert answers[folders[2]] is None
    assert children(seen) == []


def ask(hidden: str, folders: list[str], s3: dict[str, str]) -> dict[str, Any]:
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, **s3, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PATH": tools}
    command = [sys.executable, "-c", DRIVER, hidden, *folders]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
