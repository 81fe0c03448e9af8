"""A family's model folder: random weights, scaled so that what its architecture does to them can be seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spa_ray.training.rope import pin_rope
from tests.families import tokenizers
from tests.families.table import CONTEXT, Ablation, Family

TEMPLATES = Path(__file__).parent / "templates"


def build_family(family: Family, folder: Path, *, seed: int = 0) -> Path:
    """Write the folder of a float32 model with tokenizer, chat template and generation config."""
    import torch
    import transformers
    from transformers import GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = _tokenizer(family, folder.with_name(f"{folder.name}_tokenizer"))
    tokenizer.chat_template = (TEMPLATES / f"{family.template}.jinja").read_text()
    ends = tokenizer.convert_tokens_to_ids(list(family.ends))
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    name = f"{family.kind}TextConfig" if family.kind == "Gemma3" else f"{family.kind}Config"
    config = getattr(transformers, name)(
        **{**family.config, **ids}, vocab_size=len(tokenizer) + family.spare_rows, dtype="float32"
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, f"{family.kind}ForCausalLM")(config).float()
        _scale(model, family, ends)
    model.generation_config = GenerationConfig(
        bos_token_id=ids["bos_token_id"], eos_token_id=ends if len(ends) > 1 else ends[0]
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer(family: Family, scratch: Path) -> Any:
    if family.tokenizer == "bytes":
        return tokenizers.byte_level(family.specials, dict(family.roles))
    if family.tokenizer.startswith("pieces"):
        return tokenizers.pieces(family.specials, dict(family.roles), prefix=family.tokenizer == "pieces-prefix")
    if family.tokenizer.startswith("tekken"):
        return tokenizers.mistral_tekken(family.tokenizer, scratch)
    return tokenizers.mistral_sentencepiece(family.tokenizer, scratch)


def _scale(model: Any, family: Family, ends: list[int]) -> None:
    """Every layer's output is as large as the residual stream, norms and biases differ from their neutral values,
    attention scores reach the caps, logits lie far apart, and end tokens are likely enough to be met."""
    import torch

    head = model.get_output_embeddings().weight
    embedding = model.get_input_embeddings().weight
    centre = 0.0 if family.kind.startswith("Gemma") else 1.0  # Gemma's norms multiply by 1 + weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                norm = name.endswith("norm.weight")
                middle = centre + (family.post - 1 if "post_" in name else 0.0) if norm else 0.0
                parameter.normal_(0, 0.3 if norm else 0.5).add_(middle)
            elif parameter is embedding and parameter is not head:
                parameter.normal_(0, 1.0)
            elif parameter is head:
                parameter.normal_(0, family.logits / parameter.shape[1] ** 0.5)
            else:
                gain = family.scores if any(p in name for p in ("q_proj", "k_proj", "qkv_proj")) else 1.5
                parameter.normal_(0, gain / parameter.shape[1] ** 0.5)
        head[ends] *= family.eos_gain


def ablated(folder: Path, ablation: Ablation) -> Any:
    """The folder's model without the thing that the ablation takes away."""
    import torch
    from torch import nn
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    for key, value in ablation.config.items():
        setattr(config, key, value)
    model = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, attn_implementation="eager"
    )
    for name, _ in [(n, m) for n, m in model.named_modules() if n.endswith(ablation.identity or ("\0",))]:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Identity())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(ablation.zero or ("\0",)):
                parameter.zero_()
    pin_rope(model, CONTEXT)
    return model.eval()
