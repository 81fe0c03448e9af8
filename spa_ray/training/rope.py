"""Rotary factors that do not change from one batch to the next, and are those of generation.

Models with longrope (Phi-3 128k, Phi-3.5, Phi-4-mini) have a set of factors for short contexts and one for long ones.
transformers chooses by the longest sequence of a batch, so that a sequence's log-probs depend on its neighbours. vLLM
chooses once: the long factors when its context exceeds the length of the original training. Training does as vLLM.
"""

from __future__ import annotations

from typing import Any

KIND = "longrope"


def long_factors(config: Any, context: int | None) -> bool | None:
    """Whether vLLM takes the long factors at `context` tokens (null: its own default); None for a model without any."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    if rope.get("rope_type") != KIND:
        return None
    # Without max_model_len vLLM keeps to the original length, and so to the short factors.
    return context is not None and context > rope["original_max_position_embeddings"]


def pin_rope(model: Any, context: int | None) -> None:
    """Fix the factors of a model that has two sets; others are left as they are."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    chosen = long_factors(model.config, context)
    if chosen is None:
        return
    for module in model.modules():
        if getattr(module, "rope_type", None) == KIND:
            original = module.config.rope_parameters["original_max_position_embeddings"]
            frequencies, module.attention_scaling = ROPE_INIT_FUNCTIONS[KIND](
                module.config, module.inv_freq.device, seq_len=original + chosen
            )
            module.register_buffer("inv_freq", frequencies, persistent=False)
            module.rope_type = "default"  # by which transformers knows that nothing is to be chosen
