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


def use_onednn_linear(model: nn.Module) -> None:
    """Give every float32 `nn.Linear` of the model oneDNN's products, forward and backward."""
    if not torch.backends.mkldnn.is_available():
        return
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype == torch.float32:
            module.forward = MethodType(_forward, module)


def _forward(self: nn.Linear, x: Float[Tensor, "... inputs"]) -> Float[Tensor, "... outputs"]:
    out = _OneDNNLinear.apply(x.flatten(0, -2), self.weight)
    out = out.unflatten(0, x.shape[:-1])
    return out if self.bias is None else out + self.bias


def _product(x: Float[Tensor, "rows k"], weight: Float[Tensor, "columns k"]) -> Float[Tensor, "rows columns"]:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


class _OneDNNLinear(torch.autograd.Function):
    """x Wᵀ and its two gradients. oneDNN takes transposed views as they are."""

    @staticmethod
    def forward(ctx: Any, x: Float[Tensor, "rows k"], weight: Float[Tensor, "columns k"]) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "rows columns"]) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight = ctx.needs_input_grad
        return (
            _product(grad, weight.t()) if for_x else None,
            _product(grad.t(), x.t()) if for_weight else None,
        )
