"""The families: per family the small random model of its real architecture, its tokenizer and its template.

A `Family` is data. `build.py` makes the folder, `checks.py` measures. Sizes are small, everything else is as the
family's published config has it: norms, biases, ties, caps, windows and their order, rope scaling, head sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

WINDOW = 48  # tokens; the checks' sequences are two to four times as long

CONTEXT = 768  # tokens that vLLM gives each model


@dataclass(frozen=True)
class Ablation:
    """One thing of the architecture switched off: config values, or modules replaced by the identity, or zeroed."""

    config: Mapping[str, Any] = field(default_factory=dict)
    identity: tuple[str, ...] = ()  # ends of module names
    zero: tuple[str, ...] = ()  # ends of parameter names


@dataclass(frozen=True)
class Family:
    """`kind` names transformers' classes. `specials` are the control tokens in the order of their ids; `ends` are those
    that generation_config.json lists as ends. `system` is what becomes of a system turn: own, first, last (user turn)
    or dropped, as the family's template does it; `refused` templates get it folded into the first user turn.
    """

    title: str
    kind: str
    config: Mapping[str, Any]
    tokenizer: str  # bytes, pieces, pieces-prefix, or a file of mistral_common
    template: str
    specials: tuple[str, ...]
    roles: Mapping[str, str]
    ends: tuple[str, ...]
    system: str
    ablations: Mapping[str, Ablation]
    scores: float = 2.0  # the spread of q and k: how far attention scores reach
    logits: float = 4.0  # the standard deviation of the logits
    post: float = 1.0  # the mean weight of norms behind attention and MLP: how much a layer adds to the stream
    spare_rows: int = 0  # rows of the embedding beyond the tokenizer's ids, as many families have
    eos_gain: float = 1.6
    lora: bool = False
    dated: bool = False  # the template shows today's date
    thinking: bool = False  # the template knows enable_thinking and drops earlier thoughts
    backend: str = ""  # "transformers" where vLLM runs the family through transformers' code


SMALL: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CHATML = ("<|im_start|>", "<|im_end|>")
CHATML_ROLES = {"eos_token": "<|im_end|>"}
LLAMA3_SPECIALS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|finetune_right_pad_id|>",
)
GEMMA_SPECIALS = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
GEMMA_ROLES = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
QK_NORMS = Ablation(identity=("q_norm", "k_norm"))
NO_WINDOW = Ablation(config={"sliding_window": None})


def _rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


PLAIN_ROPE = Ablation(config={"rope_parameters": _rope(10000.0)})
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(16)],
    "long_factor": [1.5 + 0.5 * i for i in range(16)],
    "original_max_position_embeddings": 64,
}


def _llama3(title: str, *, tied: bool, factor: float) -> Family:
    return Family(
        title=title,
        kind="Llama",
        config={**SMALL, "tie_word_embeddings": tied, "rope_parameters": {**LLAMA3_ROPE, "factor": factor}},
        tokenizer="bytes",
        template="llama3",
        specials=LLAMA3_SPECIALS,
        roles={
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|eot_id|>",
            "pad_token": "<|finetune_right_pad_id|>",
        },
        ends=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
        system="own",
        ablations={"llama3 rope scaling": Ablation(config={"rope_parameters": _rope(500000.0)})},
        dated=True,
        lora=tied,
    )


def _mistral(title: str, *, file: str, template: str, theta: float, window: int | None, system: str) -> Family:
    config = {**SMALL, "hidden_size": 64, "sliding_window": window, "rope_parameters": _rope(theta)}
    return Family(
        title=title,
        kind="Mistral",
        config={**config, "tie_word_embeddings": False},
        tokenizer=file,
        template=template,
        specials=(),
        roles={},
        ends=("</s>",),
        system=system,
        ablations={"sliding window": NO_WINDOW} if window else {"rope theta": PLAIN_ROPE},
        eos_gain=2.5,
    )


FAMILIES: dict[str, Family] = {
    "llama-3.1": _llama3("Llama-3.1 (untied)", tied=False, factor=8.0),
    "llama-3.2": _llama3("Llama-3.2 (tied)", tied=True, factor=32.0),
    "mistral-7b-v0.1": _mistral(
        "Mistral-7B v0.1",
        file="tokenizer.model.v1",
        template="mistral_v1",
        theta=10000.0,
        window=WINDOW,
        system="refused",
    ),
    "mistral-7b-v0.2": _mistral(
        "Mistral-7B v0.2", file="tokenizer.model.v1", template="mistral_v1", theta=1e6, window=None, system="refused"
    ),
    "mistral-7b-v0.3": _mistral(
        "Mistral-7B v0.3",
        file="mistral_instruct_tokenizer_240323.model.v3",
        template="mistral_v3",
        theta=1e6,
        window=None,
        system="last",
    ),
    "mistral-nemo": Family(
        title="Mistral Nemo",
        kind="Mistral",
        config={
            **SMALL,
            "hidden_size": 40,
            "sliding_window": None,
            "rope_parameters": _rope(1e6),
            "tie_word_embeddings": False,
        },
        tokenizer="tekken_240718.json",
        template="nemo",
        specials=(),
        roles={},
        ends=("</s>",),
        system="last",
        ablations={"rope theta": PLAIN_ROPE},
        eos_gain=2.5,
    ),
    "qwen2.5": Family(
        title="Qwen2.5",
        kind="Qwen2",
        config={
            **{key: value for key, value in SMALL.items() if key != "head_dim"},
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "rope_parameters": _rope(1e6),
        },
        tokenizer="bytes",
        template="qwen25",
        specials=("<|endoftext|>", *CHATML),
        roles={**CHATML_ROLES, "pad_token": "<|endoftext|>"},
        ends=("<|im_end|>", "<|endoftext|>"),
        system="own",
        ablations={"q, k, v biases": Ablation(zero=("q_proj.bias", "k_proj.bias", "v_proj.bias"))},
        spare_rows=24,
    ),
    "qwen3": Family(
        title="Qwen3",
        kind="Qwen3",
        config={**SMALL, "hidden_size": 96, "tie_word_embeddings": True, "rope_parameters": _rope(1e6)},
        tokenizer="bytes",
        template="qwen3",
        specials=("<|endoftext|>", *CHATML, "<think>", "</think>"),
        roles={**CHATML_ROLES, "pad_token": "<|endoftext|>"},
        ends=("<|im_end|>", "<|endoftext|>"),
        system="own",
        ablations={"q and k norms": QK_NORMS},
        spare_rows=24,
        thinking=True,
        lora=True,
    ),
    "gemma-2": Family(
        title="Gemma-2",
        kind="Gemma2",
        config={
            **SMALL,
            "num_hidden_layers": 4,
            "query_pre_attn_scalar": 24,
            "sliding_window": WINDOW,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "tie_word_embeddings": True,
        },
        tokenizer="pieces",
        template="gemma2",
        specials=GEMMA_SPECIALS,
        roles=GEMMA_ROLES,
        ends=("<eos>", "<end_of_turn>"),
        system="refused",
        ablations={
            "attention soft-cap": Ablation(config={"attn_logit_softcapping": None}),
            "logit soft-cap": Ablation(config={"final_logit_softcapping": None}),
            "sliding window": Ablation(config={"layer_types": ["full_attention"] * 4}),
            "post norms": Ablation(identity=("post_attention_layernorm", "post_feedforward_layernorm")),
            "query scale": Ablation(config={"query_pre_attn_scalar": 32}),
        },
        scores=6.0,
        logits=20.0,
        post=12.0,
    ),
    "gemma-3": Family(
        title="Gemma-3 (text)",
        kind="Gemma3",
        config={
            **SMALL,
            "num_hidden_layers": 6,
            "query_pre_attn_scalar": 24,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
            "rope_parameters": {
                "sliding_attention": _rope(10000.0),
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            },
            "tie_word_embeddings": True,
        },
        tokenizer="pieces",
        template="gemma3",
        specials=GEMMA_SPECIALS,
        roles=GEMMA_ROLES,
        ends=("<eos>", "<end_of_turn>"),
        system="first",
        ablations={
            "sliding window": Ablation(config={"layer_types": ["full_attention"] * 6}),
            "q and k norms": QK_NORMS,
            "rope scaling of full layers": Ablation(
                config={
                    "rope_parameters": {"sliding_attention": _rope(10000.0), "full_attention": _rope(1e6)},
                }
            ),
            "post norms": Ablation(identity=("post_attention_layernorm", "post_feedforward_layernorm")),
        },
        post=6.0,
    ),
    "phi-3": Family(
        title="Phi-3-mini (4k)",
        kind="Phi3",
        config={
            **{key: value for key, value in SMALL.items() if key != "head_dim"},
            "num_key_value_heads": 4,
            "sliding_window": WINDOW,
            "rope_parameters": _rope(10000.0),
            "tie_word_embeddings": False,
        },
        tokenizer="pieces-prefix",
        template="phi3",
        specials=("<s>", "</s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"),
        roles={"bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        ends=("<|endoftext|>", "<|end|>", "<|assistant|>"),
        system="dropped",
        ablations={"sliding window": NO_WINDOW},
        spare_rows=24,
    ),
    "phi-3-128k": Family(
        title="Phi-3-mini (128k), Phi-3.5",
        kind="Phi3",
        config={
            **{key: value for key, value in SMALL.items() if key != "head_dim"},
            "num_key_value_heads": 4,
            "sliding_window": None,
            "original_max_position_embeddings": 64,
            "rope_parameters": LONGROPE,
            "tie_word_embeddings": False,
        },
        tokenizer="pieces-prefix",
        template="phi3",
        specials=("<s>", "</s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"),
        roles={"bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        ends=("<|endoftext|>", "<|end|>", "<|assistant|>"),
        system="dropped",
        ablations={"longrope": Ablation(config={"rope_parameters": _rope(10000.0)})},
    ),
    "phi-4": Family(
        title="Phi-4",
        kind="Phi3",
        config={
            **{key: value for key, value in SMALL.items() if key != "head_dim"},
            "sliding_window": None,
            "rope_parameters": _rope(250000.0),
            "tie_word_embeddings": False,
        },
        tokenizer="bytes",
        template="phi4",
        specials=("<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>"),
        roles={"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        ends=("<|endoftext|>", "<|im_end|>"),
        system="own",
        ablations={"rope theta": PLAIN_ROPE},
        spare_rows=24,
    ),
    "phi-4-mini": Family(
        title="Phi-4-mini",
        kind="Phi3",
        config={
            **{key: value for key, value in SMALL.items() if key != "head_dim"},
            "sliding_window": None,
            "original_max_position_embeddings": 64,
            "partial_rotary_factor": 0.75,
            "rope_parameters": {
                **LONGROPE,
                "short_factor": LONGROPE["short_factor"][:12],
                "long_factor": LONGROPE["long_factor"][:12],
                "partial_rotary_factor": 0.75,
            },
            "tie_word_embeddings": True,
        },
        tokenizer="bytes",
        template="phi4_mini",
        specials=("<|endoftext|>", "<|assistant|>", "<|end|>", "<|user|>", "<|system|>"),
        roles={"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        ends=("<|endoftext|>", "<|end|>"),
        system="own",
        ablations={
            "longrope": Ablation(
                config={"rope_parameters": {**_rope(10000.0), "partial_rotary_factor": 0.75}},
            )
        },
    ),
    "phi-2": Family(
        title="Phi-2",
        kind="Phi",
        config={
            **{key: value for key, value in SMALL.items() if key != "head_dim"},
            "num_key_value_heads": 4,
            "partial_rotary_factor": 0.5,
            "rope_parameters": {**_rope(10000.0), "partial_rotary_factor": 0.5},
            "tie_word_embeddings": False,
        },
        tokenizer="bytes",
        template="phi2",
        specials=("<|endoftext|>",),
        roles={"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        ends=("<|endoftext|>",),
        system="refused",
        ablations={"biases": Ablation(zero=("q_proj.bias", "k_proj.bias", "v_proj.bias", "lm_head.bias"))},
        backend="transformers",
    ),
    "smollm2": Family(
        title="SmolLM2",
        kind="Llama",
        config={**SMALL, "hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 1}
        | {"tie_word_embeddings": True, "rope_parameters": _rope(100000.0)},
        tokenizer="bytes",
        template="smollm2",
        specials=("<|endoftext|>", *CHATML),
        roles={"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
        ends=("<|im_end|>",),
        system="own",
        ablations={"rope theta": PLAIN_ROPE},
    ),
    "olmo-2": Family(
        title="OLMo-2",
        kind="Olmo2",
        config={
            **{key: value for key, value in SMALL.items() if key != "head_dim"},
            "num_key_value_heads": 4,
            "rope_parameters": _rope(500000.0),
            "tie_word_embeddings": False,
        },
        tokenizer="bytes",
        template="olmo2",
        specials=("<|endoftext|>", "<|pad|>"),
        roles={"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>"},
        ends=("<|endoftext|>",),
        system="own",
        ablations={
            "q and k norms": QK_NORMS,
            "post norms": Ablation(identity=("post_attention_layernorm", "post_feedforward_layernorm")),
        },
        backend="transformers",
    ),
    "olmo-3": Family(
        title="OLMo-3",
        kind="Olmo3",
        config={
            **{key: value for key, value in SMALL.items() if key != "head_dim"},
            "num_hidden_layers": 4,
            "num_key_value_heads": 4,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
            "rope_parameters": {
                "sliding_attention": _rope(500000.0),
                "full_attention": {
                    "rope_type": "yarn",
                    "rope_theta": 500000.0,
                    "factor": 8.0,
                    "attention_factor": 1.2079441541679836,
                    "beta_fast": 32.0,
                    "beta_slow": 1.0,
                    "original_max_position_embeddings": 128,
                },
            },
            "tie_word_embeddings": False,
        },
        tokenizer="bytes",
        template="olmo3",
        specials=("<|endoftext|>", *CHATML, "<|pad|>"),
        roles={"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>"},
        ends=("<|im_end|>", "<|endoftext|>"),
        system="own",
        ablations={
            "sliding window": Ablation(config={"layer_types": ["full_attention"] * 4}),
            "q and k norms": QK_NORMS,
            "post norms": Ablation(identity=("post_attention_layernorm", "post_feedforward_layernorm")),
            "yarn": Ablation(
                config={
                    "rope_parameters": {"sliding_attention": _rope(500000.0), "full_attention": _rope(500000.0)},
                }
            ),
        },
        backend="transformers",
    ),
}
