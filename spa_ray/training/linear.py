"""float32 linear layers through oneDNN: on the CPU torch's own go through MKL, which is slow on processors not Intel's.

Comes in: a model on the CPU. Goes out: the same model, its `nn.Linear`s computing the same products. Measured on an AMD
EPYC core: 90-105 GFLOP/s by MKL, 190-240 by oneDNN; a step of a 1.6 M model takes 0.68 of the time. Never: bfloat16
(oneDNN's already), GPUs, ZeRO-3 (DeepSpeed has its own linear there).
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def use_onednn_linear(model: nn.Module) -> None:
    """Give every float32 `nn.Linear` of the model oneDNN's products, forward and backward."""
    for module in model.modules():
        if type(module) is nn.Linear and _suits(module.weight):
            module.forward = MethodType(_forward, module)


def linear(
    x: Float[Tensor, "rows inputs"], weight: Float[Tensor, "outputs inputs"], bias: Float[Tensor, " outputs"] | None
) -> Float[Tensor, "rows outputs"]:
    """`F.linear` by the fastest product at hand."""
    if not _suits(weight):
        return F.linear(x, weight, bias)
    out = _OneDNNLinear.apply(x, weight)
    return out if bias is None else out + bias


def product(x: Float[Tensor, "rows k"], weight: Float[Tensor, "columns k"]) -> Float[Tensor, "rows columns"]:
    """x Wᵀ without a gradient. oneDNN takes transposed views as they are."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "") if _suits(weight) else x @ weight.t()


def add_product(
    total: Float[Tensor, "rows columns"], x: Float[Tensor, "rows k"], weight: Float[Tensor, "columns k"]
) -> None:
    """total += x Wᵀ, without a copy of `total`'s size where a kernel adds as fast as it multiplies."""
    if _suits(weight) or total.dtype != x.dtype:
        total.add_(product(x, weight))
    else:
        total.addmm_(x, weight.t())


def _suits(weight: Tensor) -> bool:
    return weight.dtype == torch.float32 and weight.device.type == "cpu" and torch.backends.mkldnn.is_available()


def _forward(self: nn.Linear, x: Float[Tensor, "... inputs"]) -> Float[Tensor, "... outputs"]:
    return linear(x.flatten(0, -2), self.weight, self.bias).unflatten(0, x.shape[:-1])


class _OneDNNLinear(torch.autograd.Function):
    """x Wᵀ and its two gradients."""

    @staticmethod
    def forward(ctx: Any, x: Float[Tensor, "rows k"], weight: Float[Tensor, "columns k"]) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "rows columns"]) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight = ctx.needs_input_grad
        return (
            product(grad, weight.t()) if for_x else None,
            product(grad.t(), x.t()) if for_weight else None,
        )
