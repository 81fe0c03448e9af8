"""Other libraries' noise stays off the terminal unless --verbose asks for it; their errors and our own lines do not."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest

from spa_ray.logs.noise import ENVIRONMENT, LIBRARIES, hush

# What the real libraries say on a machine without a GPU, and what has to be seen in any case.
SCRIPT = """
import logging, sys
from spa_ray.cli.guard import guarded

def command():
    import torch.distributed
    torch.distributed.reduce_op.SUM  # a FutureWarning
    from vllm.platforms import current_platform
    current_platform.import_kernels()
    if hasattr(torch.ops._C, "init_cpu_memory_env"):
        torch.ops._C.init_cpu_memory_env([0])  # a warning of C++ code about NUMA nodes
    from deepspeed.accelerator import get_accelerator
    get_accelerator()
    logging.getLogger("DeepSpeed").error("an error of DeepSpeed")
    logging.getLogger("transformers").error("an error of transformers")
    logging.getLogger("spa_ray.x").warning("a warning of ours")

guarded(command)
"""
NOISE = ("FutureWarning", "unable to detect", "Triton", "NUMA")


def said(*arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in {*ENVIRONMENT, "DS_ACCELERATOR", "SPA_LOG_LEVEL"}}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        env={**environment, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_the_terminal_has_errors_and_our_lines_alone() -> None:
    text = said()
    assert not [word for word in NOISE if word in text], text
    for line in ("an error of DeepSpeed", "an error of transformers", "a warning of ours"):
        assert line in text


def test_verbose_shows_the_libraries_too() -> None:
    text = said("--verbose")
    assert not [word for word in ("FutureWarning", "unable to detect") if word not in text], text


LEVEL = "[2026-11-25 15:30:18,128 I 12655 12655] logging.cc:303: Set ray log level from environment variable X to 3"
RAY = f"""
import os, subprocess, sys
from spa_ray.logs import without_rays_level
with without_rays_level():
    os.write(2, b"[2026-11-25 15:30:18,128 E 1 1] ")
    print("before", file=sys.stderr)
    os.write(2, b"{LEVEL[:40]}")
    os.write(2, b"{LEVEL[40:]}\\n[half")
    subprocess.run([sys.executable, "-c", "import sys; print(' of a child', file=sys.stderr)"])
    print("bar", end="", file=sys.stderr)
print(" after", file=sys.stderr)
"""


def test_rays_line_about_its_own_level_is_left_out_and_nothing_else() -> None:
    done = subprocess.run([sys.executable, "-c", RAY], capture_output=True, text=True, timeout=60)
    assert done.stderr == "[2026-11-25 15:30:18,128 E 1 1] before\n[half of a child\nbar after\n"


def test_a_variable_that_the_user_set_keeps_its_value() -> None:
    environment = {"TRANSFORMERS_VERBOSITY": "info"}
    hush(environment)
    assert environment == {**ENVIRONMENT, "TRANSFORMERS_VERBOSITY": "info"}


@pytest.mark.parametrize("module", [*LIBRARIES, "torch.nn.modules", "vllm.triton_utils.dispatcher"])
def test_a_librarys_warning_is_ignored(module: str, recwarn: pytest.WarningsRecorder) -> None:
    import warnings

    hush({})
    warnings.warn_explicit("of a library", UserWarning, "x.py", 1, module=module)
    assert not recwarn.list


@pytest.mark.parametrize("module", ["spa_ray.pipeline.plan", "my_judge", "torchless"])
def test_another_modules_warning_is_shown(module: str, recwarn: pytest.WarningsRecorder) -> None:
    import warnings

    hush({})
    warnings.warn_explicit("of ours", UserWarning, "x.py", 1, module=module)
    assert len(recwarn.list) == 1


def test_hush_hides_no_error_and_no_line_of_ours() -> None:
    hush({})
    hush({})
    assert len(logging.getLogger("DeepSpeed").filters) == 1
    assert logging.getLogger("transformers").isEnabledFor(logging.ERROR)
    assert logging.getLogger("spa_ray").getEffectiveLevel() <= logging.WARNING
