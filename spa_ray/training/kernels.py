"""Liger's Triton kernels for a model's norms, rotary embedding and MLP, when `train.liger` asks for them.

Comes in: a loaded causal LM. Goes out: the same object with those modules' forwards exchanged. Never: Liger's losses
or its LM head (ours are exact, and hold no more logits than theirs), and never silently nothing.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from spa_ray.errors import InputError

# What of Liger is used; architectures name their MLP's kernel differently, and each takes what it knows.
USED = {"rope": True, "rms_norm": True, "layer_norm": True, "swiglu": True, "geglu": True}
UNUSED = {"cross_entropy": False, "fused_linear_cross_entropy": False}


def use_liger(model: Any) -> None:
    """Exchange the forwards. Raises: InputError without a GPU, the package, or kernels for this architecture."""
    if not torch.cuda.is_available():
        raise InputError("train.liger: Liger's kernels run on GPUs only; set train.liger=false")
    patch_liger(model)


def patch_liger(model: Any) -> None:
    """`use_liger` without looking for a GPU. Raises: InputError."""
    if find_spec("liger_kernel") is None:
        raise InputError("train.liger: the package liger-kernel is missing; pip install liger-kernel")
    from liger_kernel.transformers import monkey_patch

    kind = model.config.model_type
    if kind not in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise InputError(f"train.liger: Liger has no kernels for models of type {kind!r}; set train.liger=false")
    monkey_patch._apply_liger_kernel_to_instance(model=model, **USED, **UNUSED)
