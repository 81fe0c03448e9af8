"""The five plugs on two Ray nodes, which get the files from the driver."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.chaos_cluster import NODE_CPUS, town
from tests.plug_files import PLUGS, plug_config
from tests.test_plugs import check_run, spa_run

pytestmark = [pytest.mark.engine, pytest.mark.long]


def test_two_nodes_run_plugs_that_only_the_driver_has(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    # Two engines and two workers, so large that no node holds both of a kind.
    engines = {"engines": {"min": 2, "max": 2}, "cpus_per_engine": NODE_CPUS - 1}
    plug_config(home, train_workers=2, cpus_per_worker=NODE_CPUS, **engines)
    with town(2) as nodes:
        done = spa_run(home, env={**os.environ, "RAY_ADDRESS": nodes.address})
        sessions = {Path(node.get_session_dir_path()) for node in [nodes.cluster.head_node, *nodes.nodes]}
        shipped = [name for name in PLUGS if name != "questions"]  # a source is read by the driver alone
        copies = {name: {file for s in sessions for file in s.rglob(f"{name}.py")} for name in shipped}
    check_run(home, done)
    # On one machine workers find the driver's own files as well: what counts is the copy that Ray handed out, into the
    # session folder that the nodes of one machine share.
    assert {name: len(files) for name, files in copies.items()} == dict.fromkeys(shipped, 1)
