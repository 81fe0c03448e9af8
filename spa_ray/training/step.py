"""One optimizer step: the plan's micro-batches through the engine, one exact gradient, one log row.

Comes in: a DeepSpeed engine, prepared data, reference log-probs. Goes out: `StepLoop.train_step`. All ranks call it
together. Never: files, checkpoints, the order of steps.
"""

from __future__ import annotations

import math
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spa_ray.errors import RunError
from spa_ray.training import comm
from spa_ray.training.dataset import sequences
from spa_ray.training.forward import MicroBatch
from spa_ray.training.guards import PER_TOKEN
from spa_ray.training.job import TrainJob
from spa_ray.training.objective import OBJECTIVES, LossInputs
from spa_ray.training.prepare import Prepared
from spa_ray.training.reference import Reference
from spa_ray.training.schedule import lr_multiplier

PROC = Path("/proc/self/status")
_MEND = "lower train.lr, or look at those pairs and at the model's weights"


class StepLoop:
    """One job's steps. Every loss is scaled so that a step's gradient is that of the mean over ALL its pairs, whatever
    the number of ranks and micro-batches: never a mean of micro-batch means."""

    def __init__(self, job: TrainJob, engine: Any, prepared: Prepared, reference: Reference | None) -> None:
        self.job = job
        self.engine = engine
        self.data = prepared.data
        self.selection = prepared.selection
        self.plan = prepared.plan(job, packed=engine.module.packed)
        self.reference = reference
        self.objective = OBJECTIVES[job.train.method]

    def train_step(self, step: int) -> dict[str, float]:
        """One optimizer step (0-based) and its log row. Raises: RunError for a non-finite loss or gradient."""
        started = time.perf_counter()
        totals: dict[str, float] = {"loss": 0.0, "tokens": 0.0, "bad": 0.0}
        bad: list[str] = []
        self._seed(step)
        micro_batches = self.plan.micro_batches(step, comm.rank())
        for k, entries in enumerate(micro_batches):
            self.engine.set_gradient_accumulation_boundary(k == len(micro_batches) - 1)
            loss = self._forward(step, entries, totals, bad)
            self.engine.backward(loss, scale_wrt_gas=False)
        totals = self._sum_over_ranks(totals)
        if totals.pop("bad"):
            raise RunError(f"{self._at(step)}: non-finite log-probs on {_some(comm.gather_lists(bad))}; {_MEND}")
        lr = self._set_lr(step)
        grad_norm = self._clip_and_step()
        if not math.isfinite(grad_norm):
            raise RunError(f"{self._at(step)}: non-finite gradient; its pairs: {_some(self._pair_ids(step))}; {_MEND}")
        return self._log_row(step, totals, lr, grad_norm, time.perf_counter() - started)

    def _forward(self, step: int, entries: slice, totals: dict[str, float], bad: list[str]) -> Tensor:
        """The scaled loss of one micro-batch; adds to `totals`. An empty one is a pass at weight zero."""
        pairs = self.plan.pairs[entries]
        if len(pairs) == 0:
            any_pair = self.plan.pairs[self.plan.step_entries(step)][-1:]
            summed, _ = self.engine(self._collate(any_pair))
            return torch.nan_to_num(summed).sum() * 0.0
        batch = self._collate(pairs)
        summed, counts = self.engine(batch)
        finite = torch.isfinite(summed)
        if not finite.all():
            # Every rank must reach the end of the step, else the others wait for ever: the step fails there, on all.
            rows = (~finite).view(-1, len(pairs)).any(dim=0).cpu().numpy()
            bad += [self.data.pair_id(int(self.selection.rows[i])) for i in pairs[rows]]
            totals["bad"] += len(pairs)
            return torch.nan_to_num(summed).sum() * 0.0
        losses, stats = self.objective.loss(self._loss_inputs(entries, pairs, summed, counts), self.job.train)
        per_token = (summed / counts)[: len(pairs)].detach()  # the chosen rows come first
        for name, value in {"loss": losses.detach(), PER_TOKEN: per_token, **stats}.items():
            totals[name] = totals.get(name, 0.0) + float(value.sum())
        totals["tokens"] += batch.real_tokens
        # DeepSpeed averages over ranks, hence the factor; the divisor is the whole step's pairs.
        return losses.sum() * (comm.world_size() / int(self.plan.sizes[step]))

    def _loss_inputs(self, entries: slice, pairs: np.ndarray, summed: Tensor, counts: Tensor) -> LossInputs:
        def to_device(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values).to(summed)

        reference = self.reference and (to_device(self.reference[0][pairs]), to_device(self.reference[1][pairs]))
        return LossInputs(summed, counts, to_device(self.plan.weights[entries]), reference)

    def _collate(self, pairs: np.ndarray) -> MicroBatch:
        """The chosen sequences of these pairs, then their rejected ones where the method looks at them."""
        sides = (True, False)[: self.objective.sequences_per_pair]
        rows = [row for chosen in sides for row in sequences(self.data, self.selection, pairs, chosen=chosen)]
        return self.engine.module.collate(rows, comm.device())

    def _sum_over_ranks(self, totals: dict[str, float]) -> dict[str, float]:
        # Named up front: a rank whose step is empty has computed none.
        names = sorted({*totals, *self.objective.stats, PER_TOKEN})
        values = torch.tensor([totals.get(n, 0.0) for n in names], dtype=torch.float64, device=comm.device())
        return dict(zip(names, comm.all_sum(values).tolist(), strict=True))

    def _set_lr(self, step: int) -> float:
        train = self.job.train
        assert train.lr is not None
        lr = train.lr * lr_multiplier(step, self.plan.steps, kind=train.scheduler, warmup=train.warmup)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _clip_and_step(self) -> float:
        """Clip, step, and the gradient's norm before clipping. ZeRO 1-3 clip inside; stage 0 leaves it to us."""
        if self.job.train.zero_stage > 0:
            self.engine.step()
            return float(self.engine.get_global_grad_norm())
        trained = [p for p in self.engine.module.parameters() if p.requires_grad]
        norm = float(torch.nn.utils.clip_grad_norm_(trained, self.job.train.grad_clip or math.inf))
        self.engine.step()
        return norm

    def _log_row(
        self, step: int, totals: dict[str, float], lr: float, grad_norm: float, seconds: float
    ) -> dict[str, float]:
        size, weights = int(self.plan.sizes[step]), self.plan.weights[self.plan.step_entries(step)]
        tokens = totals.pop("tokens")
        per_epoch = max(1, int(np.count_nonzero(self.plan.epoch == self.plan.epoch[0])))
        return {
            "step": step + 1,
            "steps": self.plan.steps,
            "epoch": (step + 1) / per_epoch,
            **{name: value / size for name, value in totals.items()},
            "grad_norm": grad_norm,
            "learning_rate": lr,
            "weights/mean": float(weights.mean()),
            "weights/max": float(weights.max()),
            "weights/ess": float(weights.sum() ** 2 / max((weights**2).sum(), 1e-300)),
            "tokens/s": tokens / seconds,
            "pairs/s": size / seconds,
            "memory/peak_gib": peak_memory_gib(),
        }

    def _seed(self, step: int) -> None:
        """Adapter dropout is the only randomness left in a step; seeded by step, it survives a resume."""
        torch.manual_seed((self.job.seed * 1_000_003 + step) * 1_009 + comm.rank())

    def _pair_ids(self, step: int) -> list[str]:
        pairs = self.plan.pairs[self.plan.step_entries(step)]
        return [self.data.pair_id(int(self.selection.rows[i])) for i in pairs]

    def _at(self, step: int) -> str:
        return f"job {self.job.name}: step {step + 1} of {self.plan.steps}"


def peak_memory_gib() -> float:
    """The device's peak so far; on the CPU the process's peak resident size (Linux; elsewhere getrusage's)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    if PROC.is_file():  # getrusage's would count the parent's peak at the fork as well
        line = next(line for line in PROC.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _some(ids: list[str], most: int = 8) -> str:
    rest = len(ids) - most
    return ", ".join(ids[:most]) + (f" and {rest} more" if rest > 0 else "")
