"""Set-up on a GPU host without a CUDA toolkit: DeepSpeed's build asks every op, and may not ask for nvcc."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from spa_ray.training import comm

SCRIPT = Path(__file__).parents[1] / "scripts" / "setup.sh"

# The loop of DeepSpeed's setup.py over its op builders, which are installed with it, on a host whose torch sees a GPU.
BUILD = """
import types, torch, torch.utils.cpp_extension as ext
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.is_initialized = lambda: True
torch.cuda.current_device = lambda: 0
torch.cuda.get_device_properties = lambda *a: types.SimpleNamespace(major=9, minor=0, name="H100")
torch.cuda.get_device_capability = lambda *a: (9, 0)
torch.version.cuda = "13.0"
ext.CUDA_HOME = None
from deepspeed.ops.op_builder.all_ops import ALL_OPS
asked = [builder.is_compatible() for builder in ALL_OPS.values()]
print("asked", len(asked))
"""


def settings() -> dict[str, str]:
    """What the script sets for DeepSpeed's build."""
    line = re.search(r"^ *((?:DS_\w+=\S+ )+)\\\n[^\n]*\$deepspeed", SCRIPT.read_text(), re.MULTILINE)
    assert line is not None
    return dict(pair.split("=", 1) for pair in line[1].split())


def build(settings: dict[str, str]) -> subprocess.CompletedProcess[str]:
    names = ("CUDA_HOME", "CUDA_PATH", "DS_IGNORE_CUDA_DETECTION", "DS_BUILD_OPS")
    clean = {k: v for k, v in os.environ.items() if k not in names}
    path = os.pathsep.join(p for p in clean["PATH"].split(os.pathsep) if not (Path(p) / "nvcc").exists())
    env = {**clean, "PATH": path, "DS_ACCELERATOR": "cuda", **settings}
    return subprocess.run([sys.executable, "-c", BUILD], env=env, capture_output=True, text=True, timeout=120)


def test_deepspeed_is_built_without_nvcc() -> None:
    pytest.importorskip("deepspeed")
    done = build(settings())
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) > 10
    refused = build({})  # so the settings are what does it
    assert refused.returncode != 0
    assert "MissingCUDAException" in refused.stderr


def test_a_gpu_set_up_takes_no_interpreter_without_c_headers(tmp_path: Path) -> None:
    """`find_python` with an interpreter that has no headers: taken for cpu, refused for gpu."""
    fake = tmp_path / "python-without-headers"
    fake.write_text('#!/bin/bash\n[ "$3" = any ] && echo "$0" || exit 1\n')
    fake.chmod(0o755)
    function = re.search(r"^find_python\(\) \{.*?^\}", SCRIPT.read_text(), re.MULTILINE | re.DOTALL)
    assert function is not None
    for device, status in (("cpu", 0), ("gpu", 1)):
        code = f"serves=x; device={device}; SPA_PYTHON={fake}; {function[0]}; find_python"
        assert subprocess.run(["bash", "-c", code], capture_output=True).returncode == status


@pytest.mark.parametrize(
    ("cuda", "backend", "kind"),
    [(True, "gloo", "cpu"), (True, "nccl", "cuda"), (True, None, "cuda"), (False, "gloo", "cpu"), (False, None, "cpu")],
)
def test_ranks_without_gpus_compute_on_the_processor_of_a_gpu_host(
    cuda: bool, backend: str | None, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comm.torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(comm.torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(comm.dist, "is_initialized", lambda: backend is not None)
    monkeypatch.setattr(comm.dist, "get_backend", lambda: backend)
    assert comm.device().type == kind
