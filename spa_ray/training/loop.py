"""The step loop: a job in, a model folder out. It knows torch and DeepSpeed and nothing of Ray.

All ranks call `run_job` together. By itself: `python -m spa_ray.training.loop --job job.json` (one process), or the
same under `torchrun`. Writes `train_log.jsonl` and checkpoints into the job's `work` folder.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spa_ray.errors import InputError, RunError
from spa_ray.training import checkpoint, comm
from spa_ray.training.dataset import sequences
from spa_ray.training.export import export_model
from spa_ray.training.forward import collate_padded
from spa_ray.training.job import Progress, TrainJob, TrainResult, read_job
from spa_ray.training.objective import OBJECTIVES, LossInputs
from spa_ray.training.policy import make_engine
from spa_ray.training.prepare import Prepared, micro_batch_tokens, prepare
from spa_ray.training.reference import Reference, cached_reference, compute_reference, reference_path
from spa_ray.training.schedule import lr_multiplier

LOG = "train_log.jsonl"
RESULT = "train_result.json"


class StepLoop:
    """One job's steps. Every loss is scaled so that a step's gradient is that of the mean over ALL its pairs, whatever
    the number of ranks and micro-batches: never a mean of micro-batch means."""

    def __init__(self, job: TrainJob, engine: Any, prepared: Prepared, reference: Reference | None) -> None:
        self.job = job
        self.engine = engine
        self.data = prepared.data
        self.selection = prepared.selection
        self.plan = prepared.plan
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
            summed, _ = self.engine(collate_padded(self._rows(any_pair), comm.device()))
            return torch.nan_to_num(summed).sum() * 0.0
        batch = collate_padded(self._rows(pairs), comm.device())
        summed, counts = self.engine(batch)
        finite = torch.isfinite(summed)
        if not finite.all():
            # Every rank must reach the end of the step, else the others wait for ever: the step fails there, on all.
            rows = (~finite).view(-1, len(pairs)).any(dim=0).cpu().numpy()
            bad += [self.data.pair_id(int(self.selection.rows[i])) for i in pairs[rows]]
            totals["bad"] += len(pairs)
            return torch.nan_to_num(summed).sum() * 0.0
        losses, stats = self.objective.loss(self._loss_inputs(entries, pairs, summed, counts), self.job.train)
        for name, value in {"loss": losses.detach(), **stats}.items():
            totals[name] = totals.get(name, 0.0) + float(value.sum())
        totals["tokens"] += batch.real_tokens
        # DeepSpeed averages over ranks, hence the factor; the divisor is the whole step's pairs.
        return losses.sum() * (comm.world_size() / int(self.plan.sizes[step]))

    def _loss_inputs(self, entries: slice, pairs: np.ndarray, summed: Tensor, counts: Tensor) -> LossInputs:
        def to_device(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values).to(summed)

        reference = self.reference and (to_device(self.reference[0][pairs]), to_device(self.reference[1][pairs]))
        return LossInputs(summed, counts, to_device(self.plan.weights[entries]), reference)

    def _rows(self, pairs: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """The chosen sequences of these pairs, then their rejected ones where the method looks at them."""
        sides = (True, False)[: self.objective.sequences_per_pair]
        return [row for chosen in sides for row in sequences(self.data, self.selection, pairs, chosen=chosen)]

    def _sum_over_ranks(self, totals: dict[str, float]) -> dict[str, float]:
        names = sorted(set(totals) | set(self._stat_names()))
        values = torch.tensor([totals.get(n, 0.0) for n in names], dtype=torch.float64, device=comm.device())
        return dict(zip(names, comm.all_sum(values).tolist(), strict=True))

    def _stat_names(self) -> tuple[str, ...]:
        """Named up front, for a rank whose step is empty has computed none."""
        if self.objective.sequences_per_pair == 1:
            return ("logps/chosen",)
        rewards = tuple(f"rewards/{n}" for n in ("chosen", "rejected", "margins", "accuracies"))
        return (*rewards, "logps/chosen", "logps/rejected")

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


_MEND = "lower train.lr, or look at those pairs and at the model's weights"


def run_job(job: TrainJob, progress: Progress | None = None) -> TrainResult:
    """Train, export, clean up. Collective. A job that is already done is handed back with `skipped`.

    Raises: InputError for bad input, a resume that cannot be honoured, or an `out` that another job wrote; RunError for
    a non-finite loss or gradient. Both on every rank.
    """
    started = time.perf_counter()
    comm.set_threads()
    prepared = prepare(job)
    done = comm.on_rank_zero(lambda: _finished(job, prepared.fingerprint))
    if done is not None:
        return done
    engine = make_engine(job)
    try:
        first = _resume(job, engine, prepared)
        loop = StepLoop(job, engine, prepared, _reference(job, engine, prepared, first))
        metrics = _run_steps(loop, prepared, first, progress)
        export_model(job, engine)
    finally:
        dispose(engine)
    result = TrainResult(
        name=job.name,
        model=job.out,
        steps=prepared.plan.steps,
        pairs=len(prepared.selection),
        dropped=prepared.dropped,
        metrics=metrics,
        seconds=time.perf_counter() - started,
        resumed_at=first,
    )
    comm.on_rank_zero(lambda: _write_json(job.work / RESULT, {"fingerprint": prepared.fingerprint, **result.to_dict()}))
    return result


def _run_steps(loop: StepLoop, prepared: Prepared, first: int, progress: Progress | None) -> dict[str, float]:
    job, steps = loop.job, prepared.plan.steps
    row: dict[str, float] = {}
    for step in range(first, steps):
        row = loop.train_step(step)
        if comm.rank() == 0:
            with (job.work / LOG).open("a") as log:
                log.write(json.dumps(row) + "\n")
            if progress is not None:
                progress({"job": job.name, **row})
        every = job.train.save_every_steps
        if every is not None and (step + 1) % every == 0 and step + 1 < steps:
            meta = _meta(job, prepared, step + 1)
            frozen_excluded = job.train.lora is not None
            checkpoint.save(
                loop.engine, _checkpoints(job), meta, keep=job.train.keep_checkpoints, frozen_excluded=frozen_excluded
            )
    return row


def _resume(job: TrainJob, engine: Any, prepared: Prepared) -> int:
    """The step to start at: 0, or where the newest checkpoint stands; the log is cut back to it."""
    found = comm.on_rank_zero(lambda: checkpoint.newest(_checkpoints(job)))
    first = 0
    if found is not None:
        path, meta = found
        first = meta.step
        expected = _meta(job, prepared, first)
        checkpoint.load(engine, path, meta, expected, frozen_excluded=job.train.lora is not None)
    comm.on_rank_zero(lambda: _cut_log(job.work / LOG, first))
    return first


def _reference(job: TrainJob, engine: Any, prepared: Prepared, first: int) -> Reference | None:
    if not OBJECTIVES[job.train.method].needs_reference:
        return None
    path = reference_path(job.work, prepared.fingerprint)
    cached = comm.on_rank_zero(lambda: cached_reference(path))
    if cached is not None:
        return cached
    if first > 0:
        raise InputError(
            f"{path}: the reference log-probs of the resumed run are gone; delete {_checkpoints(job)} to start over"
        )
    return compute_reference(
        engine, prepared.data, prepared.selection, path, micro_batch_tokens=micro_batch_tokens(job)
    )


def dispose(engine: Any) -> None:
    """Give back what an engine holds, so that the next job of this process starts clean. The process group stays.

    `destroy` alone frees little: DeepSpeed's hooks and closures keep engine, optimizer and module alive, so they are
    emptied here.
    """
    engine.destroy()
    for store in (engine.module, engine.optimizer):
        vars(store).clear()
    vars(engine).clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_memory_gib() -> float:
    """The device's peak so far; on the CPU the process's peak resident size."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _finished(job: TrainJob, mark: str) -> TrainResult | None:
    if not job.out.exists():
        return None
    try:
        raw = json.loads((job.work / RESULT).read_text())
        if raw.pop("fingerprint") == mark:
            return replace(TrainResult.from_dict(raw), skipped=True)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise InputError(f"{job.out}: stands already and is not this job's result; remove it or name another folder")


def _meta(job: TrainJob, prepared: Prepared, step: int) -> checkpoint.CheckpointMeta:
    return checkpoint.CheckpointMeta(step, prepared.fingerprint, comm.world_size(), job.train.zero_stage)


def _checkpoints(job: TrainJob) -> Path:
    return job.work / "checkpoints"


def _cut_log(path: Path, steps: int) -> None:
    rows = path.read_text().splitlines()[:steps] if path.is_file() else []
    partial = path.with_suffix(".partial")
    partial.write_text("".join(row + "\n" for row in rows))
    os.replace(partial, path)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=2))
    os.replace(partial, path)


def _some(ids: list[str], most: int = 8) -> str:
    rest = len(ids) - most
    return ", ".join(ids[:most]) + (f" and {rest} more" if rest > 0 else "")


def main() -> int:
    """The command behind `python -m spa_ray.training.loop`; exit status as DESIGN.md."""
    parser = argparse.ArgumentParser(prog="python -m spa_ray.training.loop", description=__doc__)
    parser.add_argument("--job", type=Path, nargs="+", required=True, help="JSON of a TrainJob; several run in order")
    arguments = parser.parse_args()
    try:
        jobs = [read_job(path) for path in arguments.job]
        with comm.process_group():
            for job in jobs:
                result = run_job(job, lambda row: print(json.dumps(row), flush=True))
                if comm.rank() == 0:
                    print(json.dumps(result.to_dict()), flush=True)
    except InputError as e:
        print(e, file=sys.stderr)
        return 2
    except RunError as e:
        print(e, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
