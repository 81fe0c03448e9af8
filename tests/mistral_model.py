"""A randomly initialised small model with Mistral's real tokenizer (32k words, byte fallback, "10" as two tokens).

Its chat template is of Mistral's form: no system role, `[INST]` turns. Goes out: a model folder that cannot write.
"""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] }}[/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}</s>"
    "{% else %}{{ raise_exception('only user and assistant roles are supported') }}{% endif %}{% endfor %}"
)


@cache
def _loaded() -> Any:
    import mistral_common
    from transformers import AutoTokenizer

    data = Path(mistral_common.__file__).parent / "data"
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch)
        shutil.copy(data / "mistral_instruct_tokenizer_240323.model.v3", source / "tokenizer.model")
        (source / "tokenizer_config.json").write_text(json.dumps({**settings, "add_bos_token": True}))
        return AutoTokenizer.from_pretrained(source)


def mistral_tokenizer() -> Any:
    """Mistral's real tokenizer (v3) with `CHAT_TEMPLATE`."""
    tokenizer = copy.deepcopy(_loaded())
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_mistral_like(folder: Path) -> Path:
    """Write the model folder."""
    import torch
    from transformers import GenerationConfig, MistralConfig, MistralForCausalLM

    tokenizer = mistral_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        sliding_window=None,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    model = MistralForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(folder)
    return folder
