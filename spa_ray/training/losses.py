"""The losses of pairwise preference training, as pure functions of tensors.

Comes in: log-probs per sequence (B,), gaps, weights. Goes out: one loss a pair (B,), never reduced here, in float32 or
better. Never: models, batches, devices, configs. γ is Eq. 3's γ itself; `gamma_from_ratio` is for those who know γ/β.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

Gap = TypeVar("Gap", np.ndarray, Tensor)

_ROUNDING = 1e-3  # how far above 0 the rounding of logits may lift a log-prob


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


def ipo_loss(
    chosen_logps: Float[Tensor, " pairs"],
    rejected_logps: Float[Tensor, " pairs"],
    ref_chosen_logps: Float[Tensor, " pairs"],
    ref_rejected_logps: Float[Tensor, " pairs"],
    *,
    beta: float,
    weights: Float[Tensor, " pairs"] | None = None,
) -> Float[Tensor, " pairs"]:
    """w · (h - 1/(2β))², h = (chosen - ref_chosen) - (rejected - ref_rejected), over length-averaged log-probs.

    IPO (Azar et al. 2023, Eq. 17); β is the paper's τ. The paper writes h over whole-answer probabilities, but its
    authors confirmed to TRL that their results average over an answer's tokens; over sums one β would ask the same
    margin of 10 tokens as of 500. No gradient flows into `weights` or the reference.
    Raises: ValueError as `simpo_loss`.
    """
    _check_beta(beta)
    chosen, rejected, ref_chosen, ref_rejected = _checked(
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        ref_chosen_logps=ref_chosen_logps.detach(),
        ref_rejected_logps=ref_rejected_logps.detach(),
    )
    return _weighted(((chosen - ref_chosen) - (rejected - ref_rejected) - 1 / (2 * beta)) ** 2, weights)


def orpo_loss(
    chosen_logps: Float[Tensor, " pairs"],
    rejected_logps: Float[Tensor, " pairs"],
    *,
    beta: float,
    weights: Float[Tensor, " pairs"] | None = None,
) -> Float[Tensor, " pairs"]:
    """w · (-chosen - β log σ(log odds ratio)) over length-averaged log-probs (ORPO, Hong et al. 2024, Eq. 6 and 7).

    β is the paper's λ, under TRL's name. -chosen is the NLL of the chosen response, the mean over its tokens; TRL's
    term also counts the prompt's tokens and averages over a batch's tokens instead of its pairs. No gradient flows into
    `weights`. Raises: ValueError as `simpo_loss`, and for a log-prob above 0.
    """
    _check_beta(beta)
    chosen, rejected = _checked(chosen_logps=chosen_logps, rejected_logps=rejected_logps)
    return _weighted(-chosen - beta * F.logsigmoid(log_odds_ratio(chosen, rejected)), weights)


def log_odds_ratio(
    chosen_logps: Float[Tensor, " pairs"], rejected_logps: Float[Tensor, " pairs"]
) -> Float[Tensor, " pairs"]:
    """log [odds(chosen) / odds(rejected)], odds = p / (1 - p), over length-averaged log-probs (ORPO, Eq. 4 and 7).

    Finite, with finite gradients, up to and at a log-prob of 0: one that is nearer to 0 than the dtype's eps is as good
    as certain, and is taken to be eps away, with no gradient. Raises: ValueError as `orpo_loss`.
    """
    chosen, rejected = _checked(chosen_logps=chosen_logps, rejected_logps=rejected_logps)
    return _log_odds(chosen) - _log_odds(rejected)


def gamma_from_ratio(gamma_beta_ratio: float, *, beta: float) -> float:
    """`train.gamma` for those who know γ/β: γ = ratio · β (SimPO's Llama-3 setting 0.55 at β = 2.5 is γ = 1.375).

    SimPO's code and open-instruct take the ratio (`gamma_beta_ratio`). TRL's `simpo_gamma` (divided by β inside, before
    all is multiplied by β) and Liger's `gamma` (subtracted from β · difference) are γ itself: pass them unchanged.
    Raises: ValueError for β ≤ 0 or a ratio that is not finite.
    """
    _check_beta(beta)
    if not np.isfinite(gamma_beta_ratio):
        raise ValueError(f"gamma_beta_ratio must be finite, got {gamma_beta_ratio}")
    return gamma_beta_ratio * beta


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


def _log_odds(logps: Tensor) -> Tensor:
    """log p - log(1 - p). `expm1` is exact where p is near 1; far from it its error stays below the dtype's eps."""
    if (logps > _ROUNDING).any():
        raise ValueError(f"a log-prob of {logps.max().item():g}: the logarithm of a probability is 0 or less")
    below_zero = logps.clamp(max=-torch.finfo(logps.dtype).eps)
    return below_zero - torch.log(-torch.expm1(below_zero))


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
