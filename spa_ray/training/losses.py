"""The losses of pairwise preference training, as pure functions of tensors.

Comes in: log-probs per sequence (B,), gaps, weights. Goes out: one loss a pair (B,), never reduced here, in float32 or
better. Never: models, batches, devices, configs. γ is Eq. 3's γ itself, neither γ/β (SimPO's code) nor β·γ.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

Gap = TypeVar("Gap", np.ndarray, Tensor)


def simpo_loss(
    chosen_logps: Float[Tensor, " pairs"],
    rejected_logps: Float[Tensor, " pairs"],
    *,
    beta: float,
    gamma: float,
    weights: Float[Tensor, " pairs"] | None = None,
) -> Float[Tensor, " pairs"]:
    """-w · log σ(β (chosen - rejected) - γ) over length-averaged log-probs (SimPO; with weights SPA, Eq. 3).

    No gradient flows into `weights`; None means 1. Raises: ValueError for β ≤ 0, unequal shapes, non-finite input.
    """
    _check_beta(beta)
    chosen, rejected = _checked(chosen_logps=chosen_logps, rejected_logps=rejected_logps)
    return _weighted(-F.logsigmoid(beta * (chosen - rejected) - gamma), weights)


def dpo_loss(
    chosen_logps: Float[Tensor, " pairs"],
    rejected_logps: Float[Tensor, " pairs"],
    ref_chosen_logps: Float[Tensor, " pairs"],
    ref_rejected_logps: Float[Tensor, " pairs"],
    *,
    beta: float,
    weights: Float[Tensor, " pairs"] | None = None,
) -> Float[Tensor, " pairs"]:
    """-w · log σ(β [(chosen - ref_chosen) - (rejected - ref_rejected)]) over summed log-probs (DPO, Eq. 7).

    No gradient flows into `weights` or the reference. Raises: ValueError as `simpo_loss`.
    """
    _check_beta(beta)
    chosen, rejected, ref_chosen, ref_rejected = _checked(
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        ref_chosen_logps=ref_chosen_logps.detach(),
        ref_rejected_logps=ref_rejected_logps.detach(),
    )
    return _weighted(-F.logsigmoid(beta * ((chosen - ref_chosen) - (rejected - ref_rejected))), weights)


def sft_loss(
    summed_logps: Float[Tensor, " seqs"], counts: Int[Tensor, " seqs"], *, weights: Float[Tensor, " seqs"] | None = None
) -> Float[Tensor, " seqs"]:
    """Mean cross-entropy over a sequence's response tokens: -w · logp / count, one number a sequence.

    Raises: ValueError for an empty sequence, unequal shapes, non-finite input.
    """
    (logps,) = _checked(summed_logps=summed_logps)
    if counts.shape != logps.shape:
        raise ValueError(f"counts has shape {tuple(counts.shape)}, summed_logps {tuple(logps.shape)}")
    _check_counts(counts)
    return _weighted(-logps / counts, weights)


def pair_weights(gap: Gap, *, alpha: float, mean_gap: float | None = None) -> Gap:
    """w_i = (Δ_i / Δ̄)^α (SPA, section 3.3); Δ̄ is the mean over `gap` unless `mean_gap` gives it.

    α = 0 gives ones, and so does Δ̄ = 0. The mean weight is 1 at α = 1 only. Constant: the result carries no gradient.
    Raises: ValueError for an empty, negative or non-finite gap, and for a negative α or mean.
    """
    values = gap.detach().double().cpu().numpy() if isinstance(gap, Tensor) else np.asarray(gap, dtype=np.float64)
    if not np.isfinite(alpha) or alpha < 0:
        raise ValueError(f"alpha must be 0 or more, got {alpha}")
    if values.size == 0:
        raise ValueError("no gap given: the mean over no pairs is undefined")
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError("a gap is an absolute difference: finite and 0 or more")
    mean = float(values.mean()) if mean_gap is None else float(mean_gap)
    if not np.isfinite(mean) or mean < 0:
        raise ValueError(f"mean_gap must be finite and 0 or more, got {mean_gap}")
    weights = np.ones_like(values) if mean == 0 else (values / mean) ** alpha
    if isinstance(gap, Tensor):
        return torch.from_numpy(weights).to(device=gap.device, dtype=_at_least_float32(gap.dtype))
    return weights


def sequence_logps(
    logits: Float[Tensor, "batch seq vocab"],
    labels: Int[Tensor, "batch seq"],
    *,
    average: bool,
    ignore_index: int = -100,
) -> tuple[Float[Tensor, " batch"], Int[Tensor, " batch"]]:
    """Log-probs per sequence and token counts; the logits at t predict the label at t + 1 (the shift is inside).

    `average` divides by the count. Raises: ValueError when a sequence has no label left to predict.
    """
    if logits.shape[:2] != labels.shape:
        raise ValueError(f"logits {tuple(logits.shape)} do not go with labels {tuple(labels.shape)}")
    targets = labels[:, 1:]
    scored = targets != ignore_index
    counts = scored.sum(dim=1)
    _check_counts(counts)
    logps = token_logps(logits[:, :-1], targets.masked_fill(~scored, 0))
    summed = torch.where(scored, logps, logps.new_zeros(())).sum(dim=1)
    return (summed / counts if average else summed), counts


def token_logps(logits: Float[Tensor, "*tokens vocab"], targets: Int[Tensor, "*tokens"]) -> Float[Tensor, "*tokens"]:
    """log π(target) at every position, the log-softmax in float32 or better."""
    wide = logits.to(_at_least_float32(logits.dtype))
    losses = F.cross_entropy(wide.flatten(0, -2), targets.flatten(), reduction="none")
    return -losses.view(targets.shape)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _checked(**logps: Tensor) -> list[Tensor]:
    """The tensors in float32 or better, after the checks that a wrong call would otherwise pass by silently."""
    first = next(iter(logps.values()))
    for name, value in logps.items():
        if value.dim() != 1 or value.shape != first.shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}, one number a pair is needed: {tuple(first.shape)}"
            )
        if not torch.isfinite(value).all():
            raise ValueError(f"{name} is not finite")
    return [value.to(_at_least_float32(value.dtype)) for value in logps.values()]


def _weighted(losses: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return losses
    if weights.shape != losses.shape:
        raise ValueError(
            f"weights has shape {tuple(weights.shape)}, one number a pair is needed: {tuple(losses.shape)}"
        )
    if not torch.isfinite(weights).all():
        raise ValueError("weights is not finite")
    return weights.detach().to(losses.dtype) * losses


def _check_beta(beta: float) -> None:
    if not np.isfinite(beta) or beta <= 0:
        raise ValueError(f"beta must be above 0, got {beta}")


def _check_counts(counts: Tensor) -> None:
    if (counts <= 0).any():
        raise ValueError("an empty sequence: no response token to score")
