"""ZeRO-3: a model is partitioned while it is built, and is the same model as without."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.tiny_model import build_tiny_tokenizer

pytestmark = pytest.mark.engine

SHARE = 0.75  # of the model's bytes that a rank of two may come to hold; half of it stays there
LAYERS, WIDTH, INNER = 14, 1024, 4096
RANK = """
import json, sys, threading
from pathlib import Path
from contextlib import nullcontext
from spa_ray.training import comm, policy
from tests.training_support import make_job

def anonymous():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous())

if sys.argv[3] == "whole":
    policy.partitioned = lambda config: nullcontext()
job = make_job(Path(sys.argv[1]), Path(sys.argv[2]), Path("none"), zero_stage=3, lora={"r": 4})
policy.quiet_deepspeed()
import peft, transformers.integrations
with comm.process_group():
    comm.barrier()
    done, peak, before = threading.Event(), [0], anonymous()
    thread = threading.Thread(target=watch)
    thread.start()
    engine = policy.make_engine(job)
    done.set()
    thread.join()
    elements = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    print(json.dumps({"growth": peak[0] - before, "model": 4 * elements}), flush=True)
"""


@pytest.fixture(scope="module")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of more than 400 MB in bfloat16, in five files; the trained copy is float32, twice as large."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder, tokenizer = tmp_path_factory.mktemp("large") / "model", build_tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=16, num_key_value_heads=4, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0) if parameter.dim() == 1 else parameter.uniform_(-0.03, 0.03)
    model.save_pretrained(folder, max_shard_size="100MB")
    tokenizer.save_pretrained(folder)
    files = list(folder.glob("*.safetensors"))
    assert len(files) >= 4
    assert sum(file.stat().st_size for file in files) >= 400e6
    return folder


def two_ranks(folder: Path, model: Path, how: str) -> list[dict[str, int]]:
    """What two gloo ranks print at the end of building an engine over the model."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(folder), str(model), how],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    answers = [rank.communicate(timeout=240) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], answers
    return [json.loads(out.splitlines()[-1]) for out, _ in answers]


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads RssAnon from /proc")
def test_no_rank_ever_holds_the_model(tmp_path: Path, large_model: Path) -> None:
    for rank in two_ranks(tmp_path, large_model, "partitioned"):
        assert 0.5 < rank["growth"] / rank["model"] <= SHARE
    for rank in two_ranks(tmp_path, large_model, "whole"):
        assert rank["growth"] / rank["model"] > SHARE  # what the limit catches
