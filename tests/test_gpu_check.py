"""The script for machines with a GPU: a check that fails, dies or hangs costs only itself, and the JSON says so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "gpu_check.py"
BROKEN = """
import os, sys, time
sys.path.insert(0, {scripts!r})
import gpu_check

def fails(scratch, size):
    raise ValueError("measured 3, expected 2")

def dies(scratch, size):
    os._exit(7)

def hangs(scratch, size):
    time.sleep(600)

def works(scratch, size):
    return {{"figure": 4}}

gpu_check.__file__ = __file__
gpu_check.CHECKS = {{
    "fails": (fails, 60, False), "dies": (dies, 60, False), "hangs": (hangs, 3, False),
    "needs_gpu": (works, 60, True), "works": (works, 60, False),
}}
sys.exit(gpu_check.main())
"""


def test_each_check_costs_only_itself(tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text(BROKEN.format(scripts=str(SCRIPT.parent)))
    out = tmp_path / "found.json"
    done = subprocess.run(
        [sys.executable, str(script), "--out", str(out), "--size", "tiny"],
        capture_output=True,
        text=True,
        timeout=120,
        env={"PATH": "", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 1, done.stderr
    found = json.loads(out.read_text())["checks"]
    assert found["fails"]["error"] == "ValueError: measured 3, expected 2"
    assert found["dies"]["error"].startswith("exit 7")
    assert found["hangs"]["error"] == "not done after 3 s"
    assert found["needs_gpu"]["skipped"] == "no GPU here"
    assert found["works"]["figure"] == 4


def test_a_check_that_does_not_exist_is_named(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--only", "device,warp"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "no check 'warp'" in done.stderr
    assert not (tmp_path / "gpu_check.json").exists()
