"""What rank 0 does alone may take longer than a collective may."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

RANK = """
import os, sys, time
from datetime import timedelta
import torch.distributed as dist
from spa_ray.errors import RunError
from spa_ray.training import comm

rank = int(sys.argv[1])
limit = timedelta(seconds=2)
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2, timeout=limit)

def slow():
    time.sleep(5)
    return "written"

def fails():
    raise RunError("a full disk")

assert comm.on_rank_zero(slow) == "written"
try:
    comm.on_rank_zero(fails)
except RunError as e:
    assert str(e) == "a full disk"
else:
    raise SystemExit("no error on rank", rank)
comm.RANK_ZERO_SECONDS = 1
try:
    comm.on_rank_zero(slow)
except RunError as e:
    assert rank == 1 and "rank 0 was not done" in str(e), e
except Exception as e:
    assert rank == 0, e  # nobody is there any more to hear it
os._exit(0)
"""


def test_the_others_wait_for_rank_zero_longer_than_for_a_collective_and_not_for_ever(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "store")], env=env, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    told = [process.communicate(timeout=120)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], told
