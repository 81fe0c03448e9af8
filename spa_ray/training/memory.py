"""Memory of one training step on one rank, as arithmetic over a model's shape and the `train` section.

Takes a `Shape`, a `Train` section and the number of ranks; returns bytes by kind. The counts follow what autograd saves
in one decoder layer as this package runs it; a test compares them with measured saved tensors. Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from spa_ray.config.training import Train
from spa_ray.training.method import method_of

GIB = 1024**3
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
NF4_BYTES = 0.516  # a weight in 4 bits; with double quantisation its scales add 0.127 bits (Dettmers et al. 2023)
BUCKET = 500_000_000  # elements: DeepSpeed's default reduce_bucket_size
LIVE_SHARE = 32  # ZeRO-3 keeps a 32nd of the model gathered (`zero3.gathered_at_once`)
LOGITS_MIB = {False: 128.0, True: 512.0}  # of `logits_mib: auto`, by whether there is a GPU
RESERVE = 2.5 * GIB  # CUDA context, NCCL, cuBLAS workspaces, fragmentation


@dataclass(frozen=True)
class Shape:
    """What decides the sizes of a decoder's tensors. `intermediate` is the width that one token sees."""

    parameters: float
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    norms: int = 2  # of one layer, over the hidden width
    qk_norm: bool = False
    wide_norms: bool = False  # Gemma's norms multiply by their weight in float32
    eager: bool = False  # attention scores exist as a tensor (capped scores)
    capped: bool = False  # logits are capped

    @property
    def queries(self) -> int:
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of one layer's linear modules, by their usual names."""
        return {
            "q_proj": (self.hidden, self.queries),
            "k_proj": (self.hidden, self.keys),
            "v_proj": (self.hidden, self.keys),
            "o_proj": (self.queries, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def ends(self) -> float:
        """Parameters of the embedding (and of a head of its own): all that is in no layer."""
        inside = self.layers * sum(a * b for a, b in self.linears.values())
        table = float(self.vocab * self.hidden)
        return 2 * table if self.parameters - inside > 1.5 * table else table


def shape_of(settings: Mapping[str, Any], parameters: float | None = None) -> Shape | None:
    """The shape by config.json's settings of the language model; None where they do not say it.

    `parameters` null: counted for a dense decoder with an untied head unless the settings tie it.
    """
    hidden, layers = settings.get("hidden_size") or settings.get("n_embd"), settings.get("num_hidden_layers")
    layers = layers or settings.get("n_layer")
    heads = settings.get("num_attention_heads") or settings.get("n_head")
    if not (hidden and layers and heads and settings.get("vocab_size")):
        return None
    experts = settings.get("num_experts_per_tok") or 0
    wide = settings.get("intermediate_size") or settings.get("n_inner") or 4 * hidden
    kind = str(settings.get("model_type"))
    shape = Shape(
        parameters=parameters or 0.0,
        layers=layers,
        hidden=hidden,
        intermediate=experts * (settings.get("moe_intermediate_size") or wide) if experts else wide,
        heads=heads,
        kv_heads=settings.get("num_key_value_heads") or heads,
        head_dim=settings.get("head_dim") or hidden // heads,
        vocab=settings["vocab_size"],
        norms=4 if kind.startswith(("gemma2", "gemma3")) else 2,
        qk_norm=kind.startswith(("qwen3", "gemma3", "olmo2", "olmo3")),
        wide_norms=kind.startswith("gemma"),
        eager=bool(settings.get("attn_logit_softcapping")),
        capped=bool(settings.get("final_logit_softcapping")),
    )
    if parameters:
        return shape
    dense = layers * sum(a * b for a, b in shape.linears.values())
    tables = 1 if settings.get("tie_word_embeddings") else 2
    return Shape(**{**asdict(shape), "parameters": float(dense + tables * shape.vocab * shape.hidden)})


def layer_bytes(shape: Shape, size: int, *, flash: bool, frozen: bool = False, longest: int = 0) -> float:
    """Bytes per token that one decoder layer saves for its backward pass. `size`: of one number of the forward.

    `flash`: packed rows on a GPU in bfloat16; else keys and values are repeated for every head and copied once.
    `frozen`: norms are not trained (LoRA). `longest`: the longest sequence, which counts where scores are a tensor.
    """
    return (
        _norm_bytes(shape, size, frozen) + _attention_bytes(shape, size, flash, longest) + 4 * size * shape.intermediate
    )


def _norm_bytes(shape: Shape, size: int, frozen: bool) -> float:
    """A norm saves its input in float32 and, for its weight's gradient, the normalised values; Gemma saves those in
    float32. The output of a norm before a block is saved once, as the input of the linear layers behind it."""
    normalised = 0 if frozen else 4 if shape.wide_norms else size
    per_norm = (4 + normalised) * shape.hidden
    outputs = 2 * size * shape.hidden
    of_heads = (4 + normalised) * (shape.queries + shape.keys) if shape.qk_norm else 0
    return shape.norms * per_norm + outputs + of_heads


def _attention_bytes(shape: Shape, size: int, flash: bool, longest: int) -> float:
    """q, k, v, the output (which is the input of o_proj as well) and a float32 log-sum per head.

    Without flash attention over packed rows: q, k, v and the output have all heads, and the output exists twice.
    Scores that are a tensor are saved after the cap, after the softmax in float32, and in the forward's type.
    """
    if shape.eager:
        return size * (2 * shape.queries + 2 * shape.queries) + shape.heads * longest * (4 + 2 * size)
    if flash:
        return size * 2 * (shape.queries + shape.keys) + 4 * shape.heads
    return size * 5 * shape.queries + 4 * shape.heads


@dataclass(frozen=True)
class StepMemory:
    """Bytes on one rank. `offloaded` is in the host's memory and not part of `total`."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    gathered: float  # ZeRO-3's gathered parameters
    buckets: float  # gradients on their way to other ranks
    step: float  # copies that exist while the optimizer steps, when activations are gone
    reserve: float
    offloaded: float
    checkpointing: bool

    @property
    def total(self) -> float:
        """The peak: either in the backward pass or in the optimizer's step."""
        backward = self.activations + self.logits + self.gathered + self.buckets
        return self.weights + self.gradients + self.optimizer + max(backward, self.step) + self.reserve


def step_memory(train: Train, shape: Shape, world: int, *, gpu: bool, limit: float | None = None) -> StepMemory:
    """Memory of one step of the largest micro-batch. `limit`: bytes of the GPU, by which a null
    `train.gradient_checkpointing` is decided; without a limit null is off."""
    given = train.gradient_checkpointing
    found = _step_memory(train, shape, world, gpu, checkpointing=bool(given))
    if given is None and limit is not None and found.total > limit:
        return _step_memory(train, shape, world, gpu, checkpointing=True)
    return found


def _step_memory(train: Train, shape: Shape, world: int, gpu: bool, *, checkpointing: bool) -> StepMemory:
    size, tokens = BYTES[train.dtype], micro_batch(train, world)
    trained = lora_parameters(train, shape) if train.lora is not None else shape.parameters
    by_weights, by_gradients, by_state = _shards(train.zero_stage, world)
    # bfloat16 under ZeRO 2 and 3 sums gradients in float32 (`policy.deepspeed_config`).
    gradients = trained * (4 if train.zero_stage >= 2 else size) / by_gradients
    # Adam's two moments, and a float32 copy of the weights: ZeRO keeps one even of float32 weights.
    master = 4 if train.dtype == "bfloat16" or train.zero_stage else 0
    optimizer = trained * (8 + master) / by_state
    offloaded = train.offload and train.zero_stage > 0
    bucket = min(float(BUCKET), trained) * size if world > 1 or train.zero_stage else 0.0
    gathered = 0.0
    if train.zero_stage == 3:
        live = min(1e9, shape.parameters / LIVE_SHARE)
        gathered = size * (max(live, float(shape.vocab * shape.hidden)) + min(5e7, live / 2))
    return StepMemory(
        weights=_weights(train, shape) / by_weights,
        gradients=0.0 if offloaded else gradients,
        optimizer=0.0 if offloaded else optimizer,
        activations=_activations(train, shape, tokens, gpu, checkpointing),
        logits=_head(train, shape, tokens, gpu),
        gathered=gathered,
        buckets=bucket,
        step=0.0 if offloaded or train.zero_stage == 3 else 4 * trained / by_state,  # one flat float32 gradient
        reserve=RESERVE if gpu else 0.0,
        offloaded=gradients + optimizer if offloaded else 0.0,
        checkpointing=checkpointing,
    )


def micro_batch(train: Train, world: int) -> int:
    """Tokens of the largest micro-batch: the config's limit, or all of a rank's step; one sequence at least."""
    sequences = len(method_of(train).sides) * train.batch_size
    most = math.ceil(sequences / world) * train.max_length
    return max(min(train.micro_batch_limit, most), train.max_length)


def lora_parameters(train: Train, shape: Shape) -> float:
    """Parameters of the adapters: r · (inputs + outputs) of every targeted linear module."""
    assert train.lora is not None
    names = train.lora.target_modules
    wanted = [io for name, io in shape.linears.items() if isinstance(names, str) or name in names]
    return float(train.lora.r * shape.layers * sum(a + b for a, b in wanted or shape.linears.values()))


def _shards(stage: int, world: int) -> tuple[int, int, int]:
    """Over how many ranks ZeRO divides weights, gradients and the optimizer's state."""
    return {0: (1, 1, 1), 1: (1, 1, world), 2: (1, world, world), 3: (world, world, world)}[stage]


def _weights(train: Train, shape: Shape) -> float:
    size = BYTES[train.dtype]
    if train.lora is None:
        return size * shape.parameters
    adapters = size * lora_parameters(train, shape)
    if train.lora.quantize is None:
        return size * shape.parameters + adapters
    ends = shape.ends  # embeddings and head stay in the forward's type
    largest = max(a * b for a, b in shape.linears.values())  # unpacked while it is multiplied with
    return NF4_BYTES * max(0.0, shape.parameters - ends) + size * (ends + largest) + adapters


def _activations(train: Train, shape: Shape, tokens: int, gpu: bool, checkpointing: bool) -> float:
    """Saved tensors of all layers (with checkpointing: each layer's input, and all of one layer), embeddings, the last
    norm, and the gradients that are alive while one layer's backward pass runs."""
    size = BYTES[train.dtype]
    flash = gpu and train.dtype == "bfloat16" and train.packing is not False
    layer = layer_bytes(shape, size, flash=flash, frozen=train.lora is not None, longest=train.max_length)
    if train.lora is not None:  # each adapter saves its r numbers
        layer += size * train.lora.r * len(shape.linears)
    layers = shape.layers * size * shape.hidden + layer if checkpointing else shape.layers * layer
    ends = (4 + 3 * size) * shape.hidden
    alive = size * (3 * shape.intermediate + 2 * shape.hidden)
    return tokens * (layers + ends + alive)


def logits_mib(train: Train, gpu: bool) -> float | None:
    """`train.logits_mib` in MiB, None for a whole micro-batch's.

    On a GPU every chunk adds a gradient of the head's size (2 GiB for 128,256 tokens of 4,096), whatever its rows: few
    and large chunks cost less.
    """
    if train.logits_mib == "auto":
        return LOGITS_MIB[gpu]
    return train.logits_mib


def _head(train: Train, shape: Shape, tokens: int, gpu: bool) -> float:
    """Logits that exist at once, and the head's gradient summed over chunks in float32.

    A chunk exists as the product in the forward's type, in float32, and its gradient; a cap needs the float32 twice.
    """
    size = BYTES[train.dtype]
    every = 4.0 * tokens * shape.vocab
    held = logits_mib(train, gpu)
    if held is None:
        return every * (2 + size / 4)
    chunk = min(max(held * 2**20, 4.0 * shape.vocab), every) * (2 if shape.capped else 1)
    summed = shape.vocab * shape.hidden * (4 + size) if train.lora is None else 0.0
    return chunk * (1 + size / 4) + summed
