"""The machine's limit beside a training benchmark: matmul FLOP/s measured on the model's shapes, and the work's FLOPs.

Goes out: plain numbers. Never: training. A ratio of two trainers says little on a processor whose matmul is slow in one
library and fast in the other; a share of what the processor can do says it on any.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import harness
import numpy as np

ROWS = 2048  # of the activations that are multiplied
SECONDS = 0.3  # a product is repeated for about this long


def matmul_rates(model: str, dtype: str) -> dict[str, Any]:
    """GFLOP/s of torch's own product and of the one that training uses, over the model's linear layers, all cores.

    Each shape counts by its FLOPs. On a GPU both are cuBLAS's. Imports torch: call it in a fresh process.
    """
    import torch
    from torch.nn import functional as F

    from spa_ray.training.linear import product

    harness.use_all_cores()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = linear_shapes(model)
    rates = {}
    for name, multiply in (("torch", F.linear), ("spa_ray", product)):
        seconds = flops = 0.0
        for (outputs, inputs), count in shapes.items():
            x = torch.randn(ROWS, inputs, device=device, dtype=getattr(torch, dtype))
            weight = torch.randn(outputs, inputs, device=device, dtype=getattr(torch, dtype))
            with torch.no_grad():
                seconds += count * _seconds(lambda x=x, w=weight, m=multiply: m(x, w))
            flops += count * 2 * ROWS * inputs * outputs
        rates[name] = flops / seconds / 1e9
    return {"gflops": rates, "best_gflops": max(rates.values())}


def _seconds(work: Any) -> float:
    """The median over repeats of one call."""
    work()
    taken = []
    until = time.perf_counter() + SECONDS
    while len(taken) < 3 or time.perf_counter() < until:
        start = time.perf_counter()
        work()
        harness.finish_queued_work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def linear_shapes(model: str) -> dict[tuple[int, int], int]:
    """(outputs, inputs) of the linear layers within the model's blocks, and how many there are of each."""
    import torch
    from torch import nn
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    head = made.get_output_embeddings()
    shapes: dict[tuple[int, int], int] = {}
    for module in made.modules():
        if isinstance(module, nn.Linear) and module is not head:
            shapes[tuple(module.weight.shape)] = shapes.get(tuple(module.weight.shape), 0) + 1
    return shapes


def training_flops(model: str, tokens: np.ndarray, responses: np.ndarray, laid_out: int) -> float:
    """FLOPs of one forward and one backward pass over sequences of these lengths: three times the forward's 2 a weight
    and token that is laid out, the head for response tokens alone, and causal attention's two products a sequence."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model).get_text_config()
    weights = sum(a * b * count for (a, b), count in linear_shapes(model).items())
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * dim
    layers = 2.0 * weights * laid_out
    head = 2.0 * config.hidden_size * config.vocab_size * responses.sum()
    attention = 2.0 * config.num_hidden_layers * width * (tokens.astype(float) ** 2).sum()
    return 3.0 * (layers + head + attention)
