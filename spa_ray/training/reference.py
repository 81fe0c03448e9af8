"""DPO's reference log-probs: computed once with the policy as loaded, before step 0, and kept on disk.

Comes in: the engine before its first step, the selected pairs. Goes out: one summed log-prob a distinct sequence.
Never: a second model in memory.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from spa_ray.training import comm
from spa_ray.training.batches import Order
from spa_ray.training.dataset import Selection, TokenizedPairs, read_sequences
from spa_ray.training.deal import Plan, Sequences
from spa_ray.training.job import TrainJob
from spa_ray.training.prepare import model_hash

Reference = Float[np.ndarray, " sequences"]

AT_ONCE = 1024  # sequences that are dealt to the ranks together


def reference_path(job: TrainJob, selection: Selection) -> Path:
    """Where these log-probs are kept, for this job and for every other one with the same model and sequences.

    The name covers the model's files, the sequences, the dtype and QLoRA's quantisation; no learning rate, no loss.
    """
    train = job.train
    assert selection.keys is not None
    quantize = str(train.lora and train.lora.quantize)
    digest = hashlib.blake2b(digest_size=16)
    for part in (model_hash(job.model), train.dtype, quantize):
        digest.update(part.encode() + b"\0")
    digest.update(selection.keys.astype("<i8").tobytes())
    return job.shared / f"reference_{digest.hexdigest()}.npz"


def cached_reference(path: Path) -> Reference | None:
    """The cached log-probs, or None when there are none yet."""
    if not path.is_file():
        return None
    with np.load(path) as saved:
        return saved["summed"]


def compute_reference(
    engine: Any, data: TokenizedPairs, selection: Selection, path: Path, *, micro_batch_tokens: int
) -> Reference:
    """Summed log-probs of all distinct sequences, dealt to the ranks like training's, written to `path`."""
    n = len(selection.source)
    plan = one_by_one(selection.sequences, ranks=comm.world_size(), micro_batch_tokens=micro_batch_tokens,
                      packed=engine.module.packed)  # fmt: skip
    found = torch.zeros(n, dtype=torch.float64)
    for number in range(plan.steps):
        step = plan.step(number)
        for part in step.whole[comm.rank()]:
            mine = step.sequences[part.sequences]
            # ZeRO-3 gathers weights in step: every rank runs every pass.
            rows = read_sequences(data, selection, mine if len(mine) else step.sequences[:1])
            with torch.no_grad():
                summed, *_ = engine(engine.module.collate(rows, comm.device()))
            if len(mine):
                found[torch.from_numpy(mine)] = summed.double().cpu()
    reference = comm.all_sum(found.to(comm.device())).cpu().numpy()
    comm.on_rank_zero(lambda: _save(path, reference))
    return reference


def one_by_one(sequences: Sequences, *, ranks: int, micro_batch_tokens: int, packed: bool) -> Plan:
    """A plan of every sequence by itself, in steps of `AT_ONCE`."""
    n = len(sequences.tokens)
    step = np.arange(n) // AT_ONCE
    alone = replace(sequences, of_pair=np.arange(n)[:, None])
    order = Order(np.arange(n), step, np.zeros(int(step[-1]) + 1, dtype=np.int64))
    return Plan(order, np.ones(n), alone, ranks, micro_batch_tokens, packed)


def _save(path: Path, reference: Reference) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.stem}.{os.getpid()}.partial.npz")
    np.savez(partial, summed=reference)
    os.replace(partial, path)
