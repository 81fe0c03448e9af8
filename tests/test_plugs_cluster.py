"""A method in a file of the user's own reaches the nodes of a cluster, which do not see the file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos_cluster import NODE_CPUS, town
from tests.test_methods import EXAMPLE, METHOD

pytestmark = [pytest.mark.engine, pytest.mark.long]


def test_two_nodes_train_by_a_method_that_only_the_driver_has(tmp_path: Path, tiny_model: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(EXAMPLE, home)
    rows = [{"prompt": f"question {k}?", "chosen": f"yes {k}", "rejected": f"no, not {k}"} for k in range(12)]
    (home / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = {"method": METHOD, "margin": 0.5, "dtype": "float32", "batch_size": 4, "max_length": 64, "lr": 1e-4}
    resources = {"train_workers": 2, "cpus_per_worker": NODE_CPUS}  # so that each has a node of its own
    raw = {"model": {"path": str(tiny_model)}, "train": train, "resources": resources}
    (home / "c.yaml").write_text(json.dumps(raw))
    command = [sys.executable, "-m", "spa_ray.cli.main", "train", "mine.jsonl", "--config", "c.yaml", "--out", "model"]
    with town(2) as nodes:
        done = subprocess.run(
            command,
            cwd=home,
            env={**os.environ, "RAY_ADDRESS": nodes.address},
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        sessions = {Path(node.get_session_dir_path()) for node in [nodes.cluster.head_node, *nodes.nodes]}
        copies = {file for session in sessions for file in session.rglob("slic.py")}
    assert done.returncode == 0, done.stderr[-2000:]
    log = [json.loads(line) for line in (home / "model.work" / "job" / "train_log.jsonl").read_text().splitlines()]
    assert "hinge/active" in log[-1]
    # On one machine the workers find the driver's own file as well: what counts is the copy that Ray handed out, into
    # the session folder that the nodes of one machine share.
    assert len(copies) == 1
