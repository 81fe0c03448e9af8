"""What is measured of one family. Each function returns plain numbers; the test holds them against the tolerances.

The truth is always transformers alone with eager attention: one sequence at a time, no padding, its own logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spa_ray.training.forward import ResponseLogps, Rows
from tests.families.build import ablated
from tests.families.table import Ablation, Family

LAYOUT = 1e-3  # a token's log-prob may differ by so much between two layouts in float32
SERVED = 5e-3  # and between vLLM and transformers
MARGIN = 10 * SERVED  # above this lead over the second token, greedy tokens must be equal


def true_logps(model: Any, rows: Rows) -> list[Tensor]:
    """Log-probs of each row's response tokens."""
    found = []
    with torch.no_grad():
        for prompt, response in rows:
            ids = torch.tensor([[*prompt.tolist(), *response.tolist()]])
            logps = model(ids, use_cache=False).logits[0].float().log_softmax(-1)
            at = torch.arange(len(prompt), ids.shape[1])
            found.append(logps[at - 1, ids[0, at]])
    return found


def plain_model(folder: Path) -> Any:
    return ablated(folder, Ablation())


def bites(family: Family, folder: Path, rows: Rows, truth: Tensor) -> dict[str, float]:
    """Per ablation, the mean absolute change of a response token's log-prob when it is taken away."""
    return {
        name: float((torch.cat(true_logps(ablated(folder, ablation), rows)) - truth).abs().mean())
        for name, ablation in family.ablations.items()
    }


def margins(folder: Path, rows: Rows) -> float:
    """The share of response positions at which the first token leads the second by more than 0.1."""
    model, leads = plain_model(folder), []
    with torch.no_grad():
        for prompt, response in rows:
            ids = torch.tensor([[*prompt.tolist(), *response.tolist()]])
            top = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].topk(2, -1).values
            leads.append(top[:, 0] - top[:, 1])
    return float((torch.cat(leads) > 0.1).float().mean())


def layout(policy: ResponseLogps, rows: Rows, truth: Tensor, gradients: dict[str, Tensor]) -> tuple[float, float]:
    """The largest difference of a token's log-prob from the truth; and of the gradient of their mean from the truth's,
    relative to the largest entry of the parameter's."""
    policy.zero_grad()
    logps = policy.token_logps(policy.collate(rows, "cpu"))
    logps.mean().backward()
    got = {n.removeprefix("model."): p.grad for n, p in policy.named_parameters() if p.grad is not None}
    assert got.keys() == gradients.keys()
    worst = max(float((got[n] - g).abs().max() / (g.abs().max() + 1e-6)) for n, g in gradients.items())
    return float((logps.detach() - truth).abs().max()), worst


def true_gradients(model: Any, rows: Rows) -> dict[str, Tensor]:
    tokens = sum(len(response) for _, response in rows)
    for prompt, response in rows:
        ids = torch.tensor([[*prompt.tolist(), *response.tolist()]])
        logps = model(ids, use_cache=False).logits[0].float().log_softmax(-1)
        at = torch.arange(len(prompt), ids.shape[1])
        (logps[at - 1, ids[0, at]].sum() / tokens).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def greedy_agreement(folder: Path, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> dict[str, int]:
    """Of the tokens that vLLM took greedily: how many transformers leads with by more than `MARGIN`, at how many of
    these another token was taken, and how many were too close to say. A difference ends the comparison of its answer.
    """
    model = plain_model(folder)
    counts = {"equal": 0, "different": 0, "close": 0}
    with torch.no_grad():
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = torch.tensor([[*prompt, *answer]])
            top = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].topk(2, -1)
            for (first, second), best, taken in zip(
                top.values.tolist(), top.indices[:, 0].tolist(), answer, strict=True
            ):
                sure = first - second > MARGIN
                counts["equal" if best == taken and sure else "different" if sure else "close"] += 1
    return counts


def ends_met(answers: Sequence[tuple[list[int], str]], ends: Sequence[int]) -> dict[str, int]:
    """How many of the end ids closed an answer, and how many answers break the rule: finished answers have one end id,
    the last; cut ones have none."""
    met, wrong = set(), 0
    for ids, reason in answers:
        closed = reason == "stop"
        right = sum(token in ends for token in ids) == closed and (ids[-1] in ends) == closed
        wrong += not right
        met |= {ids[-1]} & set(ends)
    return {"met": len(met), "of": len(ends), "finished": sum(r == "stop" for _, r in answers), "wrong": wrong}


def tensors(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the folder's safetensors files."""
    from safetensors import safe_open

    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as f:
            found |= {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}  # noqa: SIM118
    return found
