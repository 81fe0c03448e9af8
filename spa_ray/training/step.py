"""One optimizer step: the plan's micro-batches through the engine, one exact gradient, one log row.

Comes in: a DeepSpeed engine, prepared data, reference log-probs. Goes out: `StepLoop.train_step`. All ranks call it
together. Never: files, checkpoints, the order of steps.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spa_ray.errors import RunError
from spa_ray.training import comm
from spa_ray.training.dataset import read_sequences
from spa_ray.training.deal import Part, Step
from spa_ray.training.guards import PER_TOKEN
from spa_ray.training.job import TrainJob
from spa_ray.training.method import LossInputs, method_of
from spa_ray.training.own_modules import OwnModules, counted_in_clipping
from spa_ray.training.prepare import Prepared
from spa_ray.training.reference import Reference
from spa_ray.training.schedule import lr_multiplier

PROC = Path("/proc/self/status")
Outputs = tuple[Tensor, ...]  # of a micro-batch's sequences: summed log-probs, and hidden states if the method asks
MASK = 0xFFFF_FFFF_FFFF_FFFF  # the seeds that torch takes
LOSS = 2_048  # losses draw apart from the micro-batch's forward pass
_MEND = "lower train.lr, or look at those pairs and at the model's weights"


class StepLoop:
    """One job's steps. Every sequence of a step is computed once, in however many pairs it is, and every loss is scaled
    so that the step's gradient is that of the mean over ALL its pairs, whatever the number of ranks and micro-batches:
    never a mean of micro-batch means."""

    def __init__(
        self,
        job: TrainJob,
        engine: Any,
        prepared: Prepared,
        reference: Reference | None,
        own: OwnModules | None = None,
        others: Mapping[str, Reference] | None = None,
    ) -> None:
        self.job = job
        self.engine = engine
        self.own = own
        self.data = prepared.data
        self.selection = prepared.selection
        self.plan = prepared.plan(job, packed=engine.module.packed)
        self.reference = reference
        self.others = others or {}
        self.method = method_of(job.train, prepared.state)
        self._passes_left = 0  # backward passes of the running step

    def train_step(self, number: int) -> dict[str, float]:
        """One optimizer step (from 0) and its log row. Raises: RunError for a non-finite loss or gradient."""
        started = time.perf_counter()
        step = self.plan.step(number)
        sums = Sums()
        shared, whole = step.shared[comm.rank()], step.whole[comm.rank()]
        self._passes_left = len(shared) + len(whole)
        if shared:
            self._shared(number, step, shared, sums)
        for k, part in enumerate(whole, len(shared)):
            found = self._forward(number, step, part, k)
            if self.own is not None:
                self._seed(number, LOSS + k)
            self._backward(
                found, self._gradient(number, step, part.pairs, part.sequences, tuple(x.detach() for x in found), sums)
            )
        totals = self._sum_over_ranks(sums.totals)
        if totals.pop("bad"):
            raise RunError(
                f"{self._at(number)}: non-finite log-probs on {_some(comm.gather_lists(sums.bad_pairs))}; {_MEND}"
            )
        lr = self._set_lr(number)
        norms = self._clip_and_step(sums.own)
        if not math.isfinite(norms["grad_norm"]):
            raise RunError(
                f"{self._at(number)}: non-finite gradient; its pairs: {_some(self._pair_ids(step))}; {_MEND}"
            )
        return self._log_row(number, step, totals, lr, norms, time.perf_counter() - started)

    def _shared(self, number: int, step: Step, parts: list[Part], sums: Sums) -> None:
        """Micro-batches whose pairs have a sequence in another one: outputs of all ranks' first, then gradients. The
        last one keeps its graph, the others run forward again."""
        everyones: list[Tensor] = []
        found: Outputs = ()
        last = len(parts) - 1
        for k, part in enumerate(parts):
            with torch.set_grad_enabled(k == last):
                found = self._forward(number, step, part, k)
            everyones = everyones or [
                x.new_zeros(len(step.sequences), *x.shape[1:], dtype=torch.float64) for x in found
            ]
            for all_of, mine in zip(everyones, found, strict=True):
                all_of[torch.from_numpy(part.sequences)] = mine.detach().double()[: len(part.sequences)]
        outputs = tuple(comm.all_sum(x).to(found[0]) for x in everyones)
        # Every rank finds the same, with the same dropout; one of them counts it.
        if self.own is not None:
            self._seed(number, LOSS, rank=0)
        counted = sums if comm.rank() == 0 else Sums()
        gradients = self._gradient(number, step, step.shared_pairs, np.arange(len(step.sequences)), outputs, counted)

        def of(part: Part) -> Outputs:
            return tuple(x[torch.from_numpy(part.sequences)] for x in gradients)

        self._backward(found, of(parts[last]))
        for k, part in enumerate(parts[:last]):
            self._backward(self._forward(number, step, part, k), of(part))

    def _forward(self, number: int, step: Step, part: Part, k: int) -> Outputs:
        """A micro-batch's outputs; those of any one sequence where it is empty, since all ranks run every pass."""
        which = step.sequences[part.sequences] if len(part.sequences) else step.sequences[:1]
        self._seed(number, k)
        batch = self.engine.module.collate(read_sequences(self.data, self.selection, which), comm.device())
        summed, _, *hidden = self.engine(batch)
        return summed, *hidden

    def _gradient(
        self, number: int, step: Step, pairs: np.ndarray, sequences: np.ndarray, outputs: Outputs, sums: Sums
    ) -> Outputs:
        """∂(the step's loss)/∂(outputs) of `sequences`, by the loss of `pairs`; adds to `sums`."""
        if len(pairs) == 0:
            return tuple(map(torch.zeros_like, outputs))
        finite = torch.stack([torch.isfinite(x.flatten(1) if x.dim() > 1 else x[:, None]).all(dim=1) for x in outputs])
        if not finite.all():
            # Every rank must reach the end of the step, else the others wait for ever: the step fails there, on all.
            self._bad(step, pairs, sequences[(~finite.all(dim=0)).cpu().numpy()], sums)
            return tuple(map(torch.zeros_like, outputs))
        place = np.zeros(len(step.sequences), dtype=np.int64)
        place[sequences] = np.arange(len(sequences))
        leaves = [x.requires_grad_() for x in outputs]
        inputs = self._loss_inputs(step, pairs, step.sequences[sequences], place[step.sides[pairs]], leaves)
        if self.own is not None:
            inputs = replace(inputs, seeds=[self._seed_of_pair(number, int(pair)) for pair in step.pairs[pairs]])
        losses, stats = self.method.loss(inputs)
        sums.add({"loss": losses.detach(), PER_TOKEN: inputs.mean_logps()[0].detach(), **stats})
        own = [] if self.own is None else self.own.parameters
        gradients = torch.autograd.grad(losses.sum(), [*leaves, *own], materialize_grads=True)
        # The divisor is the whole step's pairs. DeepSpeed averages over ranks, hence the factor; own modules' gradients
        # are summed over them.
        sums.add_own([gradient / len(step.pairs) for gradient in gradients[len(leaves) :]])
        scale = comm.world_size() / len(step.pairs)
        return tuple(gradient * scale for gradient in gradients[: len(leaves)])

    def _bad(self, step: Step, pairs: np.ndarray, sequences: np.ndarray, sums: Sums) -> None:
        hit = pairs[np.isin(step.sides[pairs], sequences).any(axis=1)]
        sums.bad_pairs += [self.data.pair_id(int(self.selection.rows[i])) for i in step.pairs[hit]]
        sums.totals["bad"] += len(hit)

    def _backward(self, outputs: Outputs, gradients: Outputs) -> None:
        self._passes_left -= 1
        self.engine.set_gradient_accumulation_boundary(self._passes_left == 0)
        # An output that is not finite has no gradient, and the step fails when all ranks are done with it.
        loss, *rest = [
            (torch.nan_to_num(x)[: len(gradient)] * gradient).sum()
            for x, gradient in zip(outputs, gradients, strict=True)
        ]
        self.engine.backward(sum(rest, loss), scale_wrt_gas=False)

    def _loss_inputs(
        self, step: Step, pairs: np.ndarray, sequences: np.ndarray, sides: np.ndarray, outputs: list[Tensor]
    ) -> LossInputs:
        summed, *hidden = outputs

        def to_device(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values).to(summed.device)

        targets = self.selection.targets
        return LossInputs(
            summed,
            counts=to_device(self.selection.sequences.responses[sequences]),
            sides=to_device(sides),
            weights=to_device(step.weights[pairs]).to(summed),
            reference=None if self.reference is None else to_device(self.reference[sequences]).to(summed),
            others={name: to_device(logps[sequences]).to(summed) for name, logps in self.others.items()},
            hidden=hidden[0] if hidden else None,
            targets=None if targets is None else to_device(targets[step.pairs[pairs]]).to(summed),
            modules=None if self.own is None else self.own.modules,
            state=self.method.state,
        )

    def _sum_over_ranks(self, totals: dict[str, float]) -> dict[str, float]:
        # Named up front: a rank whose step is empty has computed none.
        names = sorted({*totals, *self.method.stats, PER_TOKEN})
        values = torch.tensor([totals.get(n, 0.0) for n in names], dtype=torch.float64, device=comm.device())
        return dict(zip(names, comm.all_sum(values).tolist(), strict=True))

    def _set_lr(self, step: int) -> float:
        train = self.job.train
        assert train.lr is not None
        multiplier = lr_multiplier(step, self.plan.steps, kind=train.scheduler, warmup=train.warmup)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = train.lr * multiplier
        if self.own is not None:
            self.own.set_lr(multiplier)
        return train.lr * multiplier

    def _clip_and_step(self, own_gradient: list[Tensor]) -> dict[str, float]:
        """Clip, step, and the norms before clipping: of the whole gradient, and of the model's and the method's own
        modules' parts of it. ZeRO 1-3 clip inside; stage 0 leaves it to us."""
        own, limit = self.own, self.job.train.grad_clip
        own_norm = 0.0 if own is None else own.set_gradient(own_gradient)
        if self.job.train.zero_stage > 0:
            with nullcontext() if own is None else counted_in_clipping(self.engine.optimizer, own_norm):
                self.engine.step()
            model_norm = float(self.engine.get_global_grad_norm())
            norm = math.hypot(model_norm, own_norm)
        else:
            trained = [p for p in self.engine.module.parameters() if p.requires_grad]
            model_norm = float(torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None]))
            norm = math.hypot(model_norm, own_norm)
            if limit is not None:
                torch.nn.utils.clip_grads_with_norm_(trained, limit, torch.tensor(norm))
            self.engine.step()
        if own is None:
            return {"grad_norm": norm}
        own.clip(norm, limit)
        own.step()
        return {"grad_norm": norm, "grad_norm/model": model_norm, "grad_norm/modules": own_norm}

    def _log_row(
        self, number: int, step: Step, totals: dict[str, float], lr: float, norms: dict[str, float], seconds: float
    ) -> dict[str, float]:
        size, weights = len(step.pairs), step.weights
        prompts = np.unique(self.selection.sequences.prompt[step.sequences[step.sides[:, 0]]], return_inverse=True)[1]
        of_prompts = np.bincount(prompts, weights)
        tokens = int(self.selection.sequences.tokens[step.sequences].sum())
        epochs = self.plan.order.epoch
        per_epoch = max(1, int(np.count_nonzero(epochs == epochs[0])))
        return {
            "step": number + 1,
            "steps": self.plan.steps,
            "epoch": (number + 1) / per_epoch,
            **{name: value / size for name, value in totals.items()},
            **norms,
            "learning_rate": lr,
            "weights/mean": float(weights.mean()),
            "weights/max": float(weights.max()),
            "weights/ess": _effective(weights),
            "weights/ess_prompts": _effective(of_prompts),
            "prompts": len(of_prompts),
            "sequences": len(step.sequences),
            "tokens/s": tokens / seconds,
            "pairs/s": size / seconds,
            "memory/peak_gib": peak_memory_gib(),
        }

    def _seed(self, number: int, k: int, rank: int | None = None) -> None:
        """Dropout, of adapters and of a method's own modules, is the only randomness left in a step. Seeded by step and
        micro-batch, it survives a resume, and a second pass over the same micro-batch drops the same."""
        mixed = ((self.job.seed * 1_000_003 + number) * 1_009 + (comm.rank() if rank is None else rank)) * 4_093 + k
        torch.manual_seed(mixed & MASK)

    def _seed_of_pair(self, number: int, pair: int) -> int:
        return int(np.random.SeedSequence([self.job.seed & MASK, number, pair]).generate_state(1, np.uint64)[0])

    def _pair_ids(self, step: Step) -> list[str]:
        return [self.data.pair_id(int(self.selection.rows[i])) for i in step.pairs]

    def _at(self, step: int) -> str:
        return f"job {self.job.name}: step {step + 1} of {self.plan.steps}"


@dataclass
class Sums:
    """What a step adds up over its micro-batches, and the pairs whose outputs are not finite."""

    totals: dict[str, float] = field(default_factory=lambda: {"loss": 0.0, "bad": 0.0})
    bad_pairs: list[str] = field(default_factory=list)
    own: list[Tensor] = field(default_factory=list)  # gradients of the method's own modules

    def add(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.totals[name] = self.totals.get(name, 0.0) + float(value.double().sum())

    def add_own(self, gradients: list[Tensor]) -> None:
        self.own = [a + b for a, b in zip(self.own, gradients, strict=True)] if self.own else gradients


def _effective(weights: np.ndarray) -> float:
    """The effective sample size of weights: their number where all are alike."""
    return float(weights.sum() ** 2 / max((weights**2).sum(), 1e-300))


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
