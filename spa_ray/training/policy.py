"""The policy under training: loading it, adapters, and the DeepSpeed engine around it.

Comes in: a model folder and a `Train` section. Goes out: a DeepSpeed engine whose forward answers with response
log-probs. Never: data, losses, steps.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spa_ray.config.training import Lora, Train
from spa_ray.errors import InputError
from spa_ray.training import comm
from spa_ray.training.attention import use_attention, why_not_packed
from spa_ray.training.forward import ResponseLogps
from spa_ray.training.host_memory import freed_at_once
from spa_ray.training.job import TrainJob
from spa_ray.training.kernels import use_liger
from spa_ray.training.linear import use_fast_linear
from spa_ray.training.memory import logits_mib, shape_of, step_memory
from spa_ray.training.method import method_of
from spa_ray.training.rope import pin_rope
from spa_ray.training.zero3 import gathered_at_once, partitioned

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_policy(job: TrainJob, dtype: torch.dtype) -> Any:
    """The causal LM, dropout off everywhere; on the CPU unless it is quantised or partitioned."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        job.model,
        dtype=dtype,
        trust_remote_code=job.trust_remote_code,
        use_safetensors=True,
        **_quantization(job, dtype),
    )
    disable_dropout(model)
    return model


def _quantization(job: TrainJob, dtype: torch.dtype) -> dict[str, Any]:
    """QLoRA's 4-bit NormalFloat with double quantisation (Dettmers et al. 2023, section 3)."""
    if job.train.lora is None or job.train.lora.quantize is None:
        return {}
    if find_spec("bitsandbytes") is None:
        raise InputError("train.lora.quantize: the package bitsandbytes is missing; pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=job.train.lora.quantize,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True,
    )
    return {"quantization_config": config, "device_map": {"": comm.device()}}


def disable_dropout(model: nn.Module) -> None:
    """Every dropout probability to 0. `eval()` would do it too, but would switch gradient checkpointing off as well."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def add_lora(model: Any, lora: Lora, seed: int) -> Any:
    """The model with trainable low-rank adapters, every rank with the same initial ones."""
    from peft import LoraConfig, get_peft_model

    modules = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    config = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=modules, task_type="CAUSAL_LM"
    )
    torch.manual_seed(seed)
    return get_peft_model(model, config, autocast_adapter_dtype=False)


@freed_at_once()
def make_engine(job: TrainJob) -> Any:
    """A fresh DeepSpeed engine over the job's policy; `engine(batch)` returns what `ResponseLogps` does."""
    train = job.train
    quiet_deepspeed()
    import deepspeed

    with partitioned(deepspeed_config(train)):
        model = load_policy(job, DTYPES[train.dtype])
    pin_rope(model, job.context)
    if train.liger:
        use_liger(model)
    checkpointing = _checkpointing(train, model)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if train.lora is not None:
        model = add_lora(model, train.lora, job.seed)
    if checkpointing and train.lora is not None:
        model.enable_input_require_grads()
    if not torch.cuda.is_available() and train.zero_stage < 3:
        use_fast_linear(model)
    packed = _packs(job, model)
    use_attention(model, packed=packed)
    held = logits_mib(train, torch.cuda.is_available())
    budget = None if held is None else int(held * 2**20 / 4)
    hidden = "hidden" in method_of(train).outputs
    policy = ResponseLogps(model, packed=packed, logits_budget=budget, hidden=hidden)
    engine, *_ = deepspeed.initialize(
        model=policy,
        model_parameters=[p for p in policy.parameters() if p.requires_grad],
        optimizer=lambda parameters: adamw(parameters, train, lr=train.lr),
        config=deepspeed_config(train, parameters=parameter_count(policy)),
    )
    engine.train()
    check_layout(engine, job)
    return engine


def _checkpointing(train: Train, model: Any) -> bool:
    """Whether activations are recomputed: as the config says, else where a step would not fit into this GPU without."""
    if train.gradient_checkpointing is not None or not torch.cuda.is_available():
        return bool(train.gradient_checkpointing)
    quantized = train.lora is not None and train.lora.quantize is not None  # two weights in a number
    settings = model.config.get_text_config().to_dict()
    shape = shape_of(settings, None if quantized else float(parameter_count(model)))
    if shape is None:
        return True
    limit = float(torch.cuda.get_device_properties(comm.device()).total_memory)
    decided = step_memory(train, shape, comm.world_size(), gpu=True, limit=limit).checkpointing
    return bool(comm.gather_lists(["yes"] if decided else []))  # alike on all ranks, whatever their GPUs


def _packs(job: TrainJob, model: Any) -> bool:
    """Whether sequences are packed. Raises: InputError when the job insists and the model cannot."""
    reason = why_not_packed(model)
    if job.train.packing and reason is not None:
        raise InputError(f"{job.model}: its sequences cannot be packed, {reason}; set train.packing=null or false")
    return reason is None if job.train.packing is None else job.train.packing


# What two sound ways of computing log-probs may differ by, root mean square over tokens: so much in any model,
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
# and so many times what transformers' own two ways differ by in this one. In bfloat16 small random models of 3 to 32
# layers differ by 0.06 to 0.74 between eager attention and sdpa; a third sound kernel by 0.4 to 1.3 times as much, and
# scores scaled by 1.25, or sequences that see each other, by 3 to 42 times as much (docs/TRAINING.md).
OWN_NOISE = 2.5


def check_layout(engine: Any, job: TrainJob) -> None:
    """Compare log-probs of short sequences with the model's plainest path, before anything is trained.

    An architecture that this package has misunderstood (what it does to its logits, or where its layers look) ends
    here and not in a wrong model. Collective under ZeRO-3. Raises: InputError.
    """
    policy = engine.module
    if not policy.packed and policy.logits_budget is None:
        return
    rows = _short_rows(policy.model.config.get_text_config().vocab_size)

    def means() -> Tensor:
        summed, counts, *_ = engine(policy.collate(rows, comm.device()))
        return summed / counts

    with torch.no_grad():
        found = means()
        packed = policy.packed
        with policy.plain():
            truth = noise = means()
            if packed:  # another attention kernel rounds otherwise, as the model's own two do
                policy.model.set_attn_implementation("eager")
                noise = means()
    off, own = (float((other - truth).square().mean().sqrt()) for other in (found, noise))
    if not off <= max(TOLERANCE[job.train.dtype], OWN_NOISE * own) < math.inf:
        raise InputError(
            f"{job.model}: its log-probs come out {off:.3g} a token off when packed or computed in chunks (rounding "
            f"alone: {own:.3g}); set train.packing=false, and if that is not enough train.logits_mib=null"
        )


def _short_rows(vocabulary: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Eight random prompts of 1 to 15 tokens, each with responses of one and of two tokens: means of nearly single
    tokens, and prompts that are shared where the layout does that."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, vocabulary, size) for size in range(1, 17, 2)]
    return [(prompt, rng.integers(0, vocabulary, size)) for prompt in prompts for size in (1, 2)]


def parameter_count(model: nn.Module) -> int:
    """Parameters of the model, those of other ranks' partitions as well."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())


def deepspeed_config(train: Train, *, parameters: int | None = None) -> dict[str, Any]:
    """DeepSpeed's own config. The loop plans and scales micro-batches itself, so the batch sizes here mean nothing.

    `parameters`: of the model, once they are known; ZeRO-3 then gathers no more than a share of them at a time.
    """
    zero: dict[str, Any] = {"stage": train.zero_stage}
    if train.zero_stage == 3 and parameters is not None:
        zero |= gathered_at_once(parameters)
    if train.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    # Micro-batches' gradients are summed in float32: in bfloat16 the later ones would be lost beside a large sum.
    # DeepSpeed can do so where it partitions gradients; ZeRO 0 and 1 sum in the model's dtype.
    summed = {"grad_accum_dtype": "fp32"} if train.dtype == "bfloat16" and train.zero_stage >= 2 else {}
    return {
        "data_types": summed,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": train.grad_clip or 0.0,
        "bf16": {"enabled": train.dtype == "bfloat16"},
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW needs no compiler
        "zero_allow_untested_optimizer": True,
    }


def quiet_deepspeed() -> None:
    """Import DeepSpeed for the device at hand, without its chatter and without its shared-memory op.

    On the CPU DeepSpeed would compile an op for collectives in shared memory (a minute, and a C++ compiler). Its ranks
    wait for each other in busy loops without a deadline: they starve each other where cores are shared, and when one is
    killed the others spin for ever. gloo does neither.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # of DeepSpeed's own calls
    import deepspeed

    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__ = {}


def adamw(parameters: list[nn.Parameter], train: Train, *, lr: float | None) -> torch.optim.Optimizer:
    groups = decay_groups(parameters, train)
    return torch.optim.AdamW(groups, lr=lr or 0.0, betas=train.adam_betas, fused=True)


def decay_groups(parameters: list[nn.Parameter], train: Train) -> list[dict[str, Any]]:
    """Weight decay on matrices only."""
    if train.weight_decay == 0:
        return [{"params": parameters, "weight_decay": 0.0}]
    return [
        {"params": [p for p in parameters if _is_matrix(p)], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if not _is_matrix(p)], "weight_decay": 0.0},
    ]


def _is_matrix(parameter: nn.Parameter) -> bool:
    shape = getattr(parameter, "ds_shape", parameter.shape)  # a ZeRO-3 parameter's own shape is its partition's
    return len(shape) >= 2
