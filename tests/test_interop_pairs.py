"""Exported pairs through the code of other trainers, in the environment that `scripts/interop.sh` makes. TRL, which
is in this one, reads them in `test_exports.py`."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from spa_ray.data.pair_formats import write_pairs
from tests.test_exports import built, config  # noqa: F401 fixtures
from tests.test_interop import HARNESS

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not HARNESS.exists(), reason="`make interop` installs the trainers"),
]


def read_by(trainer: str, pairs: Path, out: Path, model: Path) -> list[dict[str, Any]]:
    write_pairs(pairs, out / trainer, trainer)
    command = [HARNESS, Path(__file__).with_name("interop_trainers.py"), trainer, out / trainer, model]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(out / "home"), "PYTHONPATH": ""}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, env=environment, cwd=out, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_axolotl_renders_every_pair(built: Path, tmp_path: Path, tiny_model: Path) -> None:  # noqa: F811
    pairs = pq.read_table(built / "pairs").to_pylist()
    found = read_by("axolotl", built / "pairs", tmp_path, tiny_model)
    assert [(row["chosen"], row["rejected"]) for row in found] == [
        (f"{row['chosen'][0]['content']}<|end|>", f"{row['rejected'][0]['content']}<|end|>") for row in pairs
    ]
    assert found[0]["prompt"] == "<|bos|><|user|>question p<|end|><|assistant|>"
    assert found[-1]["prompt"] == "<|bos|><|system|>Be kind.<|end|><|user|>question r<|end|><|assistant|>"


def test_llama_factory_aligns_every_pair(built: Path, tmp_path: Path, tiny_model: Path) -> None:  # noqa: F811
    pairs = pq.read_table(built / "pairs").to_pylist()
    found = read_by("llama_factory", built / "pairs", tmp_path, tiny_model)
    assert [row["chosen"] for row in found] == [row["chosen"][0] for row in pairs]
    assert [row["rejected"] for row in found] == [row["rejected"][0] for row in pairs]
    assert found[0]["prompt"] == [{"role": "user", "content": "question p"}]
    assert (found[-1]["system"], found[-1]["prompt"]) == ("Be kind.", [{"role": "user", "content": "question r"}])
