"""The LM head and its log-softmax as one function of hidden states, over a few tokens at a time.

Comes in: hidden states, the head's weight, targets. Goes out: log π(target), a number a token, in float32 or better.
Never: tokens × vocabulary logits in memory, forward or backward, once they exceed the budget: the backward pass
computes each chunk's logits again. Logits within the budget are kept, in the one tensor that becomes their gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from spa_ray.training.linear import add_product, product


@dataclass(frozen=True)
class LogitTransform:
    """What some models do to their logits: softcap · tanh(scale · z / softcap); without a softcap, scale · z."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any) -> LogitTransform:
        """As a Hugging Face text config names it: Cohere multiplies, Granite divides, Gemma caps."""
        scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        return cls(scale, getattr(config, "final_logit_softcapping", None))

    def apply(self, logits: Float[Tensor, "tokens vocab"]) -> Float[Tensor, "tokens vocab"]:
        scaled = logits if self.scale == 1.0 else logits * self.scale
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)

    def backward(
        self, grad: Float[Tensor, "tokens vocab"], out: Float[Tensor, "tokens vocab"]
    ) -> Float[Tensor, "tokens vocab"]:
        """The gradient of the logits from that of `out = apply(logits)`."""
        inner = grad if self.softcap is None else grad * (1 - (out / self.softcap) ** 2)
        return inner if self.scale == 1.0 else inner * self.scale


def head_logps(
    hidden: Float[Tensor, "tokens width"],
    weight: Float[Tensor, "vocab width"],
    bias: Float[Tensor, " vocab"] | None,
    targets: Int[Tensor, " tokens"],
    *,
    logits_budget: int,
    transform: LogitTransform = LogitTransform(),
) -> Float[Tensor, " tokens"]:
    """log π(target) at every token. At most about `logits_budget` logits exist at once (but a whole row always does).

    Matrix products run in the dtype of `hidden`, the log-softmax in float32 or better.
    """
    chunk = max(1, logits_budget // weight.shape[0])
    return _ChunkedLogps.apply(hidden, weight, bias, targets, chunk, transform)


class _ChunkedLogps(torch.autograd.Function):
    """log π(target) = z[target] - logsumexp(z) with z = transform(h Wᵀ + b), `chunk` tokens at a time. One chunk's z
    is kept until the first backward pass, which writes over it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        chunk: int,
        transform: LogitTransform,
    ) -> Tensor:
        norms, picked, z = [], [], None
        for rows in _chunks(len(hidden), chunk):
            z = _logits(hidden[rows], weight, bias, transform)
            norms.append(torch.logsumexp(z, dim=-1))
            picked.append(z.gather(1, targets[rows, None])[:, 0])
        norm = torch.cat(norms)
        ctx.save_for_backward(hidden, weight, bias, targets, norm)
        ctx.chunk, ctx.transform = chunk, transform
        ctx.kept = z if len(norms) == 1 and any(ctx.needs_input_grad) else None
        return torch.cat(picked) - norm

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, norm = ctx.saved_tensors
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if for_hidden else None
        # Summed over chunks in float32 at least: bfloat16 would lose the later chunks' small addends.
        grad_weight = torch.zeros_like(weight, dtype=norm.dtype) if for_weight else None
        grad_bias = torch.zeros_like(bias, dtype=norm.dtype) if for_bias else None
        for rows in _chunks(len(hidden), ctx.chunk):
            z, ctx.kept = ctx.kept, None
            if z is None:
                z = _logits(hidden[rows], weight, bias, ctx.transform)
            # In place where the logits are not needed again: a chunk is what the peak is made of.
            dz = (z - norm[rows, None] if ctx.transform.softcap is not None else z.sub_(norm[rows, None])).exp_()
            dz.mul_(-grad[rows, None]).scatter_add_(1, targets[rows, None], grad[rows, None])
            dz = ctx.transform.backward(dz, z).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = product(dz, weight.t())
            if grad_weight is not None:
                add_product(grad_weight, dz.t(), hidden[rows].t())
            if grad_bias is not None:
                grad_bias.add_(dz.sum(dim=0))
            del z, dz
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def _logits(
    hidden: Float[Tensor, "rows width"], weight: Tensor, bias: Tensor | None, transform: LogitTransform
) -> Float[Tensor, "rows vocab"]:
    z = product(hidden, weight)
    z = z if bias is None else z + bias
    return transform.apply(z.to(torch.promote_types(z.dtype, torch.float32)))


def _chunks(tokens: int, chunk: int) -> list[slice]:
    return [slice(i, min(i + chunk, tokens)) for i in range(0, tokens, chunk)]
