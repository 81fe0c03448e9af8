"""DPO's reference log-probs: computed once with the policy as loaded, before step 0, and kept on disk.

Comes in: the engine before its first step, the selected pairs. Goes out: summed log-probs (chosen, rejected) a pair.
Never: a second model in memory.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from spa_ray.training import comm
from spa_ray.training.batches import Order, make_plan
from spa_ray.training.dataset import Selection, TokenizedPairs, sequences
from spa_ray.training.job import TrainJob
from spa_ray.training.prepare import model_hash
from spa_ray.training.tokenize import content_hash

Reference = tuple[Float[np.ndarray, " pairs"], Float[np.ndarray, " pairs"]]


def reference_path(job: TrainJob, selection: Selection) -> Path:
    """Where these log-probs are kept, for this job and for every other one with the same model, template and data.

    The name covers the model's files (its chat template is one of them), the chat settings, the pairs' bytes, which of
    them are trained on and in which order of preference, the dtype and QLoRA's quantisation; no learning rate, no loss.
    """
    train = job.train
    quantize = str(train.lora and train.lora.quantize)
    digest = hashlib.blake2b(digest_size=16)
    chat = "" if job.chat is None else job.chat.model_dump_json()
    for part in (model_hash(job.model), content_hash(job.pairs), train.dtype, quantize, str(train.max_length), chat):
        digest.update(part.encode() + b"\0")
    digest.update(selection.rows.astype("<i8").tobytes() + selection.swapped.astype("u1").tobytes())
    return job.shared / f"reference_{digest.hexdigest()}.npz"


def cached_reference(path: Path) -> Reference | None:
    """The cached log-probs, or None when there are none yet."""
    if not path.is_file():
        return None
    with np.load(path) as saved:
        return saved["chosen"], saved["rejected"]


def compute_reference(
    engine: Any, data: TokenizedPairs, selection: Selection, path: Path, *, micro_batch_tokens: int
) -> Reference:
    """Summed log-probs of all selected pairs, dealt to the ranks like one optimizer step, written to `path`."""
    n = len(selection)
    order = Order(np.arange(n), np.zeros(n, dtype=np.int64), np.zeros(1, dtype=np.int64))
    plan = make_plan(
        order,
        np.ones(n),
        selection.tokens,
        ranks=comm.world_size(),
        micro_batch_tokens=micro_batch_tokens,
        packed=engine.module.packed,
    )
    found = torch.zeros(2, n, dtype=torch.float64)
    for entries in plan.micro_batches(0, comm.rank()):
        mine = plan.pairs[entries]
        pairs = mine if len(mine) else plan.pairs[:1]  # ZeRO-3 gathers weights in step: every rank runs every pass
        rows = [r for chosen in (True, False) for r in sequences(data, selection, pairs, chosen=chosen)]
        with torch.no_grad():
            summed, _ = engine(engine.module.collate(rows, comm.device()))
        if len(mine):
            found[:, torch.from_numpy(pairs)] = summed.double().cpu().view(2, -1)
    chosen, rejected = comm.all_sum(found.to(comm.device())).cpu().numpy()
    comm.on_rank_zero(lambda: _save(path, chosen, rejected))
    return chosen, rejected


def _save(path: Path, chosen: np.ndarray, rejected: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.stem}.{os.getpid()}.partial.npz")
    np.savez(partial, chosen=chosen, rejected=rejected)
    os.replace(partial, path)
