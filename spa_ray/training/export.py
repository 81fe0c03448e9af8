"""From a trained engine to a complete model folder that vLLM and transformers load alike.

Comes in: the engine (all ranks call), the job. Goes out: `job.out`: safetensors, config, tokenizer, generation config,
chat template, and with LoRA `adapter/` beside the merged weights; written under another name and renamed at the end.
Never: a half-written folder under the final name.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spa_ray.training import comm
from spa_ray.training.job import TrainJob
from spa_ray.training.policy import DTYPES

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.gguf")
OURS = ("config.json", "adapter_config.json")


def export_model(job: TrainJob, engine: Any) -> None:
    """Write the policy as it stands. Collective: under ZeRO-3 every rank helps to gather."""
    lora = job.train.lora is not None
    state = _adapter_state(engine) if lora else _full_state(engine)
    comm.on_rank_zero(lambda: _write(job, engine.module.model, state, lora=lora))


def _write(job: TrainJob, model: Any, state: dict[str, Tensor], *, lora: bool) -> None:
    partial = job.out.with_name(f".{job.out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if lora:
        model.save_pretrained(partial / "adapter", state_dict=state)
        model = _merged(job, partial / "adapter")
        state = model.state_dict()
    model.generation_config = type(
        model.generation_config
    )()  # the source's own file is copied; this one always validates
    model.save_pretrained(partial, state_dict=state)
    copy_companions(job.model, partial)
    partial.rename(job.out)


def _merged(job: TrainJob, adapter: Path) -> Any:
    """The base model with the adapter merged in, in float32 first, so that bfloat16 rounds once."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32, trust_remote_code=job.trust_remote_code)
    return PeftModel.from_pretrained(base, str(adapter)).merge_and_unload().to(DTYPES[job.train.dtype])


def copy_companions(source: Path, target: Path) -> None:
    """All of a model folder but weights and config, byte for byte: tokenizer, template, generation config, code."""
    for file in sorted(source.iterdir()):
        if file.is_file() and file.name not in OURS and not any(file.match(w) for w in WEIGHTS):
            shutil.copyfile(file, target / file.name)


def _full_state(engine: Any) -> dict[str, Tensor]:
    """The whole model's state on the CPU of rank 0, nothing elsewhere."""
    if engine.zero_optimization_stage() == 3:
        state = engine._zero3_consolidated_16bit_state_dict() or {}
    else:
        state = engine.module.state_dict() if comm.rank() == 0 else {}
    return {key.removeprefix("model."): value.cpu() for key, value in state.items()}


def _adapter_state(engine: Any) -> dict[str, Tensor]:
    """The adapter's tensors alone, gathered where ZeRO-3 has partitioned them."""
    import deepspeed

    trained = {k: p for k, p in engine.module.model.named_parameters() if p.requires_grad}
    if engine.zero_optimization_stage() < 3:
        return {k: p.detach().cpu() for k, p in trained.items()}
    with deepspeed.zero.GatheredParameters(list(trained.values())):
        return {k: p.detach().cpu().clone() for k, p in trained.items()}
