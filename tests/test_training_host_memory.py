"""What a step frees is there for the next one, with no page that the system zeroes again, and goes back at the end."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROGRAM = """
import json, resource, sys
from contextlib import nullcontext
import torch
from spa_ray.training.host_memory import kept_for_reuse

def step():
    kept = [torch.ones(4 * 2**20) for _ in range(4)]  # 16 MiB each, as activations
    torch.ones(16 * 2**20).sum()  # 64 MiB, as logits: more than glibc ever puts on its heap by itself

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) // 1024

step()
before = resident()
with kept_for_reuse() if sys.argv[1] == "kept" else nullcontext():
    for _ in range(3):  # the heap grows to what a step needs
        step()
    first = faults()
    for _ in range(5):
        step()
    inside = faults() - first
    held = resident()
print(json.dumps({"faults": inside, "held": held - before, "after": resident() - before}))
"""


def measured(how: str) -> dict[str, int]:
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_kept_memory_has_no_new_pages_and_is_given_back() -> None:
    kept, usual = measured("kept"), measured("usual")
    assert kept["faults"] < usual["faults"] / 10
    assert kept["held"] > 100  # MiB
    assert kept["after"] < 20
