"""A method's own modules: trained beside the model, in float32 and outside of DeepSpeed's engine, alike on all ranks.

They have an AdamW of their own, the job's learning-rate schedule, and one gradient norm with the model. A checkpoint
holds them as `modules.pt`, a model folder as the method writes them, which an index keeps from vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from spa_ray.config.training import Train
from spa_ray.errors import InputError
from spa_ray.storage.weights import INDEX, ONE_FILE, read_header, tensors
from spa_ray.training import comm
from spa_ray.training.job import TrainJob
from spa_ray.training.method import METHOD, method_of
from spa_ray.training.policy import adamw

SAVED = "modules.pt"  # in a checkpoint


class OwnModules:
    """`modules` and their optimizer."""

    def __init__(self, job: TrainJob, modules: nn.Module, lr: float) -> None:
        self.modules = modules
        self.lr = lr
        self.parameters = [p for p in modules.parameters() if p.requires_grad]
        self._optimizer = adamw(self.parameters, job.train, lr=lr)

    @classmethod
    def of(cls, job: TrainJob, state: Any, model: Any) -> OwnModules | None:
        """Those of the job's method, which learnt `state` from the pairs; None where it has none. Every rank draws the
        same from the job's seed."""
        method = method_of(job.train, state)
        torch.manual_seed(job.seed & 0xFFFF_FFFF_FFFF_FFFF)
        modules, lr = method.modules(model), method.modules_lr
        if modules is None:
            return None
        if lr is None:
            raise InputError(f"train.method: {job.train.method} has modules and no learning rate; set train.lr")
        return cls(job, modules.to(comm.device(), torch.float32).train(), lr)

    def set_gradient(self, mine: Sequence[Tensor]) -> float:
        """Take the sum over all ranks of these gradients (none: zero), and return its norm."""
        gradients = mine or [torch.zeros_like(p) for p in self.parameters]
        total = comm.all_sum(parameters_to_vector(gradients))
        for parameter in self.parameters:
            parameter.grad = torch.empty_like(parameter)
        vector_to_parameters(total, [p.grad for p in self.parameters])
        return float(torch.linalg.vector_norm(total))

    def set_lr(self, multiplier: float) -> None:
        """`multiplier` times the peak learning rate."""
        for group in self._optimizer.param_groups:
            group["lr"] = self.lr * multiplier

    def clip(self, norm: float, limit: float | None) -> None:
        """By the norm of the whole gradient, as `torch.nn.utils.clip_grad_norm_` does."""
        if limit is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, limit, torch.tensor(norm))

    def step(self) -> None:
        self._optimizer.step()

    def save(self, checkpoint: Path) -> None:
        state = {"modules": self.modules.state_dict(), "optimizer": self._optimizer.state_dict()}
        torch.save(state, checkpoint / SAVED)

    def load(self, checkpoint: Path) -> None:
        state = torch.load(checkpoint / SAVED, map_location=comm.device(), weights_only=True)
        self.modules.load_state_dict(state["modules"])
        self._optimizer.load_state_dict(state["optimizer"])


@contextmanager
def counted_in_clipping(optimizer: Any, norm: float) -> Iterator[None]:
    """While one of DeepSpeed's ZeRO optimizers steps: it clips by its own gradient's norm and `norm` together."""
    clip = optimizer.unscale_and_clip_grads

    def clip_by_both(gradients: Any, own: Tensor) -> None:  # DeepSpeed's norm is times its loss scale
        clip(gradients, (own**2 + (norm * optimizer.loss_scale) ** 2) ** 0.5)

    optimizer.unscale_and_clip_grads = clip_by_both
    try:
        yield
    finally:
        del optimizer.unscale_and_clip_grads


@dataclass(frozen=True)
class Beside:
    """What a method leaves in a model folder beside the model: what it learnt from the pairs (`method.json`, by which
    `method_of_folder` gives the method back), and its modules' tensors, in files that it names there."""

    state: Any = None
    modules: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def at(cls, checkpoint: Path) -> Beside:
        """As it stood at a checkpoint in a job's work folder."""
        learnt, saved = checkpoint.parent.parent / METHOD, checkpoint / SAVED
        state = json.loads(learnt.read_text(encoding="utf-8"))["state"] if learnt.is_file() else None
        modules = torch.load(saved, map_location="cpu", weights_only=True)["modules"] if saved.is_file() else {}
        return cls(state, modules)

    def write(self, folder: Path, train: Train) -> None:
        method = method_of(train, self.state)
        if not method.leaves_more_than_a_model():
            return
        before = set(folder.iterdir())
        if self.modules:
            method.save(folder, {name: value.cpu().contiguous() for name, value in self.modules.items()})
        files = sorted(file.name for file in set(folder.iterdir()) - before)
        text = json.dumps({**method.about(), "files": files}, indent=2)
        (folder / METHOD).write_text(text, encoding="utf-8")
        if self.modules and not (folder / INDEX).is_file():  # without one vLLM reads every safetensors file as its own
            names = tensors(read_header(folder / ONE_FILE))
            index = {"metadata": {}, "weight_map": dict.fromkeys(sorted(names), ONE_FILE)}
            (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def files_beside(folder: Path) -> set[str]:
    """The names of the files in a model folder that are its method's, and no other model's."""
    file = folder / METHOD
    return {METHOD, *json.loads(file.read_text(encoding="utf-8")).get("files", [])} if file.is_file() else set()
