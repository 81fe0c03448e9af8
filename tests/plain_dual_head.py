"""The documented method with a head of its own (docs/examples/dual_head.py), for tests in this process and in others;
and the same training written out in plain torch.

As a program it trains jobs with plain SGD in the place of AdamW, whose updates hardly show a gradient's size.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spa_ray.training.job import TrainJob

FOLDER = Path(__file__).parents[1] / "docs" / "examples"
METHOD = "dual_head:DualHead"


def sgd(parameters: Any, lr: float, **_: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr)


@dataclass
class Plain:
    """What plain torch makes of a job's model and head: their tensors at the end, and every step's gradient norms."""

    model: dict[str, Tensor]
    head: dict[str, Tensor]
    norms: list[tuple[float, float]]  # of everything, of the head


def plain_run(job: TrainJob) -> Plain:
    """SGD over the mean loss of each step's pairs, one sequence at a time, one gradient norm for model and head."""
    from spa_ray.training.method import method_of
    from spa_ray.training.policy import add_lora, load_policy
    from spa_ray.training.prepare import prepare
    from spa_ray.training.schedule import lr_multiplier

    prepared, train = prepare(job), job.train
    plan, data = prepared.plan(job, packed=False), prepared.data
    method: Any = method_of(train, prepared.state)
    model = load_policy(job, torch.float32)
    if train.lora is not None:
        model = add_lora(model, train.lora, job.seed)
    torch.manual_seed(job.seed)
    head = method.modules(model)

    def read(prompt: Any, response: Any) -> tuple[Tensor, Tensor]:
        """The response's summed log-prob, and the last hidden state at the prompt's end."""
        ids = torch.tensor([[*prompt.tolist(), *response.tolist()]])
        output = model(ids, output_hidden_states=True)
        logps = torch.log_softmax(output.logits[0, :-1].float(), dim=-1).gather(1, ids[0, 1:, None])[:, 0]
        return logps[len(prompt) - 1 :].sum(), output.hidden_states[-1][0, len(prompt) - 1]

    none = torch.empty(0, dtype=torch.int64)
    rows = [int(row) for row in prepared.selection.rows]
    with torch.no_grad():
        reference = {
            (row, side): read(data.ids("prompt_ids", row), data.ids(f"{side}_ids", row))[0]
            for row in rows
            for side in ("chosen", "rejected")
        }
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": trained}, {"params": [*head.parameters()]}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    norms = []
    for number in range(plan.steps):
        step = plan.step(number)
        total = torch.zeros(())
        for pair in step.pairs:
            row = rows[pair]
            prompt, raw = data.ids("prompt_ids", row), data.ids("sensed_ids", row)
            chosen, rejected = (
                read(prompt, data.ids(f"{side}_ids", row))[0] - reference[row, side] for side in ("chosen", "rejected")
            )
            sensed = head(read(raw, none)[1])
            target = torch.tensor(prepared.selection.targets[pair]).float()
            loss = -F.logsigmoid(train.beta * (chosen - rejected))
            total = total + loss + train.head_weight * F.mse_loss(sensed, target)
        optimizer.zero_grad()
        (total / len(step.pairs)).backward()
        of_head = float(nn.utils.get_total_norm([p.grad for p in head.parameters()]))
        norms.append((float(nn.utils.clip_grad_norm_([*trained, *head.parameters()], train.grad_clip)), of_head))
        for group, lr in zip(optimizer.param_groups, (train.lr, train.head_lr), strict=True):
            group["lr"] = lr * lr_multiplier(number, plan.steps, kind=train.scheduler, warmup=train.warmup)
        optimizer.step()
    if train.lora is not None:
        model = model.merge_and_unload()
    return Plain(model.state_dict(), head.state_dict(), norms)


if __name__ == "__main__":
    from spa_ray.training.loop import main
    from spa_ray.training.policy import quiet_deepspeed

    quiet_deepspeed()  # it derives classes from AdamW when it is imported
    torch.optim.AdamW = sgd  # type: ignore[misc, assignment]
    sys.exit(main())
