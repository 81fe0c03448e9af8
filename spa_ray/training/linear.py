"""float32 linear layers by the faster of two products: torch's own, which is MKL's on x86, or oneDNN's.

Comes in: a model on the CPU. Goes out: the same model, its `nn.Linear`s computing the same products. MKL is slow on
some processors that are not Intel's: an AMD EPYC core was seen to do 90-105 GFLOP/s by MKL and 190-240 by oneDNN; two
older cores (Zen 3) do 132 and 110. A process measures once which it has, and oneDNN must be far ahead, so that noise
decides nothing. Never: bfloat16 (oneDNN's already), GPUs, ZeRO-3 (DeepSpeed has its own linear there).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import cache, partial
from types import MethodType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

AHEAD = 1.4  # how many times as fast oneDNN must be
SIZE, REPEATS = 384, 15  # of the product that is measured


def use_fast_linear(model: nn.Module) -> None:
    """Give every float32 `nn.Linear` of the model oneDNN's products, forward and backward, where they are faster."""
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
    return _onednn(x, weight) if _suits(weight) else x @ weight.t()


def add_product(
    total: Float[Tensor, "rows columns"], x: Float[Tensor, "rows k"], weight: Float[Tensor, "columns k"]
) -> None:
    """total += x Wᵀ, without a copy of `total`'s size where a kernel adds as fast as it multiplies."""
    if _suits(weight) or total.dtype != x.dtype:
        total.add_(product(x, weight))
    else:
        total.addmm_(x, weight.t())


def _suits(weight: Tensor) -> bool:
    return weight.dtype == torch.float32 and weight.device.type == "cpu" and onednn_pays()


@cache
def onednn_pays() -> bool:
    """Whether oneDNN multiplies `AHEAD` times as fast as torch on one core: each one's fastest of products in turn."""
    if not torch.backends.mkldnn.is_available():
        return False
    x = torch.ones(SIZE, SIZE)
    fastest = dict.fromkeys(("torch", "oneDNN"), math.inf)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several threads wait for each other, and longest where other work has the cores
    try:
        for _ in range(REPEATS):
            for name, multiply in (("torch", x.matmul), ("oneDNN", partial(_onednn, x))):
                fastest[name] = min(fastest[name], _seconds(multiply, x))
    finally:
        torch.set_num_threads(threads)
    return fastest["torch"] > AHEAD * fastest["oneDNN"]


def _seconds(multiply: Callable[[Tensor], Tensor], x: Tensor) -> float:
    start = time.perf_counter()
    multiply(x)
    return time.perf_counter() - start


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return result


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
