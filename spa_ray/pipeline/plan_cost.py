"""What a stage costs: pure arithmetic from counts, sizes and assumed rates to seconds, GPU-hours and memory.

Comes in: `Work`, `ModelFacts`, a config. Goes out: plain numbers. Never: files, models, Ray. Every assumed number
stands here, with where it comes from; `assumptions` says them to the user.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from spa_ray.config.models import ANY, Config
from spa_ray.config.section import JudgeSection
from spa_ray.engine.placement import engine_world
from spa_ray.engine.vllm_start import CPU_KV_GIB
from spa_ray.pipeline.plan_memory import GPU_MEMORY_GIB, gpu_gib, training_memory
from spa_ray.pipeline.plan_model import BYTES, ModelFacts
from spa_ray.pipeline.plan_tokens import ANSWER_SHARE, CONSISTENT_SHARE, Work
from spa_ray.training.guards import HALF_STEP
from spa_ray.training.method import method_of

GIB = 1024**3
GPU_SHARE = 0.92  # of it that vLLM 0.32 takes: its default gpu_memory_utilization
ACTIVATIONS_GIB = 4.0  # of a GPU: activations and CUDA graphs beside weights and cache
ON_GPU_FROM = 1e8  # parameters: with `gpus_per_engine` null, a larger model is taken to run on GPUs
UNKNOWN_CONTEXT = 8192
LORA_SHARE = 0.01  # of the parameters that adapters train

# What the filters leave: the shares of the demo (docs/RESULTS.md: 268 of 1,500 prompts consistent, 127 of those below
# τ, 3,720 and 1,693 of the 15 pairs a prompt above δ). Another model and other prompts will differ.
BELOW_TAU_SHARE = 0.47
PAIRS_SHARE = 0.91


@dataclass(frozen=True)
class Rates:
    """What one engine or one rank is taken to do: FLOP/s, and what a request and a start cost whatever the model."""

    prefill: float  # FLOP/s of an engine, per GPU
    decode: float
    train: float  # per rank
    request: float  # seconds of an engine's own time a request
    engine_start: float  # seconds before an engine answers, its weights apart
    group_start: float  # seconds before a group of training workers trains
    overlap: bool  # whether a request's own time passes while the device computes


# GPU: 2,500 tokens/s decoded by an 8 B model; not measured here. CPU: fitted to the demo on 2 cores (docs/PLAN.md).
GPU = Rates(4e14, 4e13, 3e14, request=0.0005, engine_start=60, group_start=60, overlap=True)
CPU = Rates(2e11, 4e10, 7e10, request=0.002, engine_start=15, group_start=25, overlap=False)
WEIGHTS_PER_SECOND = 1e9  # bytes read from disk
ENDPOINT_SECONDS = 2.0  # of one request to a judge's endpoint
PASS_SECONDS = 6.0  # Ray Data: planning, workers, the last write
BUILD_SECONDS = 10.0  # the same, and reading the scores for τ
BUILD_ROWS_PER_SECOND = 5000.0  # of a core, answers of about 300 tokens


@dataclass(frozen=True)
class Devices:
    """How many, and of which kind. `assumed`: the config leaves it open."""

    gpus_per_engine: float
    gpus_per_worker: float
    engines: int
    workers: int
    assumed: bool

    @property
    def rates(self) -> Rates:
        return GPU if self.gpus_per_engine else CPU

    @property
    def train_rates(self) -> Rates:
        return GPU if self.gpus_per_worker else CPU


def devices(config: Config, parameters: float) -> Devices:
    """What `resources` names; where it leaves GPUs open, a model of 0.1 B parameters or more is taken to have them."""
    resources = config.resources
    on_gpus = parameters >= ON_GPU_FROM or config.model.tensor_parallel_size > 1
    engine, worker = resources.gpus_per_engine, resources.gpus_per_worker
    return Devices(
        gpus_per_engine=float(engine_world(config.model)) * on_gpus if engine is None else engine,
        gpus_per_worker=float(on_gpus) if worker is None else worker,
        engines=resources.engines.max,
        workers=resources.train_workers,
        assumed=engine is None or worker is None,
    )


def compute_seconds(work: Work, parameters: float, rates: Rates, *, gpus: float) -> float:
    """Of one engine for this work, start apart."""
    flops = 2 * parameters
    device = flops * (work.prefill_tokens / rates.prefill + work.generated_tokens / rates.decode) / max(1.0, gpus)
    own = work.requests * rates.request
    return max(device, own) if rates.overlap else device + own


def pass_seconds(model: ModelFacts, rates: Rates) -> float:
    """What a pass costs besides its requests: Ray Data, the engine's start, its weights."""
    return PASS_SECONDS + rates.engine_start + model.weight_bytes / WEIGHTS_PER_SECOND


def generate_seconds(work: Work, model: ModelFacts, on: Devices) -> float:
    """Wall time of a pass over `engines` engines."""
    busy = compute_seconds(work, model.parameters, on.rates, gpus=on.gpus_per_engine)
    return pass_seconds(model, on.rates) + busy / on.engines


def judged(judge: JudgeSection | None, work: Work) -> dict[str, Any]:
    """What a judge's endpoint is asked, what it costs, and how long its limits make it; empty where there is none."""
    asked = work.judged()
    if judge is None or not asked["requests"]:
        return {}
    bill = judge.bill(asked, seconds=ENDPOINT_SECONDS)
    return {**asked, "usd": bill["usd"], "seconds": round(bill["seconds"] or 0.0, 1)}


def build_seconds(rows: int) -> float:
    return BUILD_SECONDS + rows / BUILD_ROWS_PER_SECOND


def kept_shares(config: Config) -> tuple[float, float]:
    """Of the prompts, those below τ, and of these the consistent ones."""
    denoise = config.denoise
    below = BELOW_TAU_SHARE if denoise.informativeness and (denoise.tau or denoise.tau_quantile) else 1.0
    return below, 1.0 if denoise.consistency == "off" else CONSISTENT_SHARE


def pairs_of(config: Config, prompts: int) -> int:
    """Pairs that the filters leave, by the shares above; of `pairs.order: mean` one per prompt."""
    if config.pairs.order == "mean":
        return prompts
    n, include = config.sampling.n, config.pairs.include
    differ = 1.0 if config.pairs.delta == ANY else PAIRS_SHARE
    below, consistent = kept_shares(config)
    with_refined = {"all": n * (n + 1) / 2, "refined_only": n, "candidates_only": n * (n - 1) / 2}[include]
    without = 0.0
    if config.denoise.on_inconsistent == "drop_refined" and include != "refined_only":
        without = (1 - consistent) * n * (n - 1) / 2
    return round(prompts * below * differ * (consistent * with_refined + without))


def examples_of(config: Config, prompts: int, pairs: float) -> float:
    """What training runs through in an epoch: the pairs, or of a method that looks at no rejected answer each distinct
    answer of them once."""
    method, n, include = method_of(config.train), config.sampling.n, config.pairs.include
    if "rejected" in method.sides:
        return pairs
    if config.pairs.order == "mean":
        a_prompt = 2 if method.every_answer else 1
    else:
        a_prompt = n + (include != "candidates_only") - (not method.every_answer)
    return min(prompts * math.prod(kept_shares(config)) * a_prompt, pairs * (2 if method.every_answer else 1))


def sequences_a_pair(config: Config, *, pairs: float, of: float, batch: float) -> float:
    """Distinct sequences in `batch` of `pairs` pairs, drawn from the `of` that the filters leave, by their number: 2
    where no two pairs share one."""
    train, n = config.train, config.sampling.n
    sides = len(method_of(train).sides)
    if sides == 1 or not pairs or config.pairs.order == "mean":
        return float(sides)
    include = config.pairs.include
    answers = n if include == "candidates_only" else n + 1
    a_prompt = PAIRS_SHARE * {"all": n * (n + 1) / 2, "refined_only": n, "candidates_only": n * (n - 1) / 2}[include]
    batch = min(batch, pairs)

    def found(share: float) -> float:  # of a prompt's sequences, those that are in a pair of this share of them
        return answers * (1 - (1 - share) ** (2 * a_prompt / answers))

    kept = pairs / of
    if train.order == "prompts":  # half a prompt more, which the step cuts
        prompts = batch / (kept * a_prompt) + (0.5 if batch < pairs else 0.0)
        return min(2.0, prompts * found(kept) / batch)
    return min(2.0, of / a_prompt * found(kept * batch / pairs) / batch)


@dataclass(frozen=True)
class Training:
    """One job: pairs, optimizer steps, tokens through the model, seconds of its own (the group's start apart)."""

    pairs: int
    steps: int
    tokens: float
    seconds: float


def training(config: Config, model: ModelFacts, prompts: int, prompt_tokens: float, on: Devices) -> Training:
    """Forward and backward over every step's distinct sequences; a reference pass for DPO and IPO; with checkpointing
    a second forward."""
    train = config.train
    everything = pairs_of(config, prompts)
    pairs = min(everything, train.max_pairs or math.inf)
    examples = examples_of(config, prompts, pairs)
    steps = train.max_steps or math.ceil(examples / train.batch_size * train.epochs)
    seen = steps * train.batch_size if train.max_steps else examples * train.epochs
    length = min(prompt_tokens + ANSWER_SHARE * config.sampling.max_tokens, train.max_length)
    of = {"pairs": pairs, "of": everything}
    tokens = seen * sequences_a_pair(config, batch=train.batch_size, **of) * length
    referenced = pairs * sequences_a_pair(config, batch=pairs, **of) * length
    reference = referenced if method_of(train).needs_reference else 0.0
    recomputes = training_memory(train, model, config.resources, gpu=on.gpus_per_worker > 0).checkpointing
    passes = 8 if recomputes else 6
    flops = model.parameters * (passes * tokens + 2 * reference)
    return Training(int(pairs), steps, tokens, flops / on.train_rates.train / on.workers)


def memory(config: Config, model: ModelFacts, on: Devices, *, prompt_tokens: float) -> dict[str, Any]:
    """GiB per GPU (per process without one): an engine's weights and KV cache, what a training rank holds.

    `contexts`: how many of full length the cache holds at once; `prompts`: of how many prompts all n samples, each at
    its max_tokens. None where the model is not on this machine.
    """
    spread = engine_world(config.model)
    total = config.resources.gpu_memory_gib or GPU_MEMORY_GIB
    share = float(config.model.engine_kwargs.get("gpu_memory_utilization", GPU_SHARE))
    weights = model.weight_bytes / spread / GIB
    found: dict[str, Any] = {
        "engine_weights": round(weights, 3),
        **dict.fromkeys(("kv_cache_per_context", "kv_cache", "contexts", "prompts")),
        "training": training_gib(config, model, on),
        "gpu": total if on.gpus_per_engine else None,
    }
    if model.kv_bytes_per_token is None:
        return found
    token = kv_bytes_on_gpu(model, spread) / GIB
    context = (model.context or UNKNOWN_CONTEXT) * token
    cache = float(CPU_KV_GIB)
    if on.gpus_per_engine:
        mine = total * min(1.0, on.gpus_per_engine)
        cache = max(0.0, min(total * share, mine) - weights - ACTIVATIONS_GIB)
    samples = config.sampling.n * (prompt_tokens + config.sampling.max_tokens) * token
    return found | {
        "kv_cache_per_context": round(context, 3),
        "kv_cache": round(cache, 3),
        "contexts": int(cache / context),
        "prompts": int(cache / samples),
    }


def kv_bytes_on_gpu(model: ModelFacts, spread: int) -> float:
    """KV-cache bytes of a token on one of `spread` GPUs: heads are divided, down to one a GPU."""
    assert model.kv_bytes_per_token is not None
    return model.kv_bytes_per_token / min(spread, model.kv_heads or spread)


def training_gib(config: Config, model: ModelFacts, on: Devices) -> dict[str, Any]:
    """GiB of one rank at the peak of a training step, by kind; `checkpointing` as it will be."""
    found = training_memory(config.train, model, config.resources, gpu=on.gpus_per_worker > 0)
    parts = {name: round(value / GIB, 3) for name, value in asdict(found).items() if name != "checkpointing"}
    room = gpu_gib(config.resources) if on.gpus_per_worker else None
    return {**parts, "total": round(found.total / GIB, 3), "gpu": room, "checkpointing": found.checkpointing}


def does_it_fit(config: Config, found: dict[str, Any]) -> list[str]:
    """Notes on a plan's memory: what does not fit, and where requests will wait."""
    notes = []
    if found["gpu"] and found["engine_weights"] + ACTIVATIONS_GIB > found["gpu"]:
        notes.append(
            f"memory: {found['engine_weights']} GiB of weights a GPU do not fit into {found['gpu']:g} GiB; raise "
            "model.tensor_parallel_size"
        )
    elif found["contexts"] == 0:
        notes.append(
            f"memory: one context of {found['kv_cache_per_context']} GiB does not fit into the {found['kv_cache']} GiB "
            "that the weights leave to the cache; raise model.tensor_parallel_size, or lower model.max_model_len"
        )
    elif found["prompts"] is not None and found["prompts"] < config.resources.concurrency:
        notes.append(
            f"memory: the cache holds the samples of {found['prompts']:,} prompts at their longest, "
            f"resources.concurrency is {config.resources.concurrency}; where answers are that long, requests wait "
            "inside the engine"
        )
    return notes


def model_bytes(config: Config, model: ModelFacts) -> float:
    """Bytes of a trained model's folder: weights are written in the type that they are trained in."""
    return model.parameters * BYTES[config.train.dtype]


def checkpoint_bytes(config: Config, model: ModelFacts) -> float:
    """Bytes of the checkpoints that one job keeps while it trains: weights, master copy, moments."""
    train = config.train
    if not (train.save_every_steps or train.save_every_minutes):
        return 0.0
    trainable = model.parameters if train.lora is None else model.parameters * LORA_SHARE
    return (train.keep_checkpoints + 1) * trainable * (14 if train.dtype == "bfloat16" else 12)


def stage_bytes(rows: int, generated_tokens: float) -> float:
    """Bytes of a stage's episodes: each token's id and about four characters, and a row's own 2 KB."""
    return generated_tokens * 8 + rows * 2000


def assumptions(config: Config, on: Devices, *, endpoint: bool = False) -> list[str]:
    """What the numbers rest on, in words."""
    rates, train = on.rates, on.train_rates
    kind = "GPU" if on.gpus_per_engine else "CPU engine of two cores"
    said = [
        f"an answer uses {ANSWER_SHARE:.0%} of its max_tokens; nothing is asked twice",
        f"a {kind}: {rates.prefill:.0e} FLOP/s of prefill, {rates.decode:.0e} of decoding, {rates.request * 1000:g} ms "
        f"a request; it starts in {rates.engine_start:g} s and reads weights at {WEIGHTS_PER_SECOND / 1e9:g} GB/s",
        f"a training rank: {train.train:.0e} FLOP/s; its group starts in {train.group_start:g} s",
        f"a prompt's common prefixes are computed once; all {on.engines} engines are there from the start",
        f"of the prompts {CONSISTENT_SHARE:.0%} are consistent, {BELOW_TAU_SHARE:.0%} of those are below τ, and "
        f"{PAIRS_SHARE:.0%} of their pairs pass δ (the demo's shares)",
    ]
    if endpoint:
        said.append(
            f"a judge's endpoint answers in {ENDPOINT_SECONDS:g} s, uses all of scoring.max_tokens, and counts tokens "
            "as the policy's tokenizer does"
        )
    if config.train.dtype == "bfloat16":
        said.append(
            "movement: lr × the sum of its schedule, what Adam moves a weight by at most; half of the distance between "
            f"bfloat16 numbers at a typical weight of 0.02 is {HALF_STEP:.1e}"
        )
    if on.gpus_per_engine:
        total = config.resources.gpu_memory_gib
        named = "resources.gpu_memory_gib" if total else "set resources.gpu_memory_gib"
        said.append(
            f"a GPU has {total or GPU_MEMORY_GIB:g} GiB ({named}); vLLM takes {GPU_SHARE:.0%} of it unless "
            f"engine_kwargs.gpu_memory_utilization says otherwise, {ACTIVATIONS_GIB:g} GiB of it for activations"
        )
    if on.assumed:
        where = "GPUs are taken to be there" if on.gpus_per_engine else "no GPU is taken to be there"
        said.append(f"resources.gpus_per_engine or gpus_per_worker is null: {where} (by the model's size)")
    return said
