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
REPEATS = 15


def matmul_rates(model: str, dtype: str) -> dict[str, Any]:
    """GFLOP/s of torch's own product (MKL's in float32 on x86, cuBLAS's on a GPU) and of oneDNN's, over the model's
    linear layers, all cores; which of the two training takes. Medians of products in turn; each shape counts by its
    FLOPs. Imports torch: call it in a fresh process."""
    import torch
    from torch.nn import functional as F

    from spa_ray.training.linear import _onednn, onednn_pays

    harness.use_all_cores()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    products: dict[str, Any] = {"torch": F.linear}
    if device == "cpu" and dtype == "float32":
        products["oneDNN"] = _onednn
    seconds, flops = dict.fromkeys(products, 0.0), 0.0
    for (outputs, inputs), count in linear_shapes(model).items():
        x = torch.randn(ROWS, inputs, device=device, dtype=getattr(torch, dtype))
        weight = torch.randn(outputs, inputs, device=device, dtype=getattr(torch, dtype))
        taken: dict[str, list[float]] = {name: [] for name in products}
        with torch.no_grad():
            for _ in range(REPEATS):
                for name, multiply in products.items():
                    start = time.perf_counter()
                    multiply(x, weight)
                    harness.finish_queued_work()
                    taken[name].append(time.perf_counter() - start)
        for name in products:
            seconds[name] += count * statistics.median(taken[name])
        flops += count * 2 * ROWS * inputs * outputs
    rates = {name: flops / seconds[name] / 1e9 for name in products}
    return {"gflops": rates, "taken": "oneDNN" if "oneDNN" in products and onednn_pays() else "torch"}


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
