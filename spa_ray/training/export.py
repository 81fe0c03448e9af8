"""From a trained engine to a complete model folder that vLLM and transformers load alike.

Comes in: the engine (all ranks call), the job. Goes out: `job.out`: safetensors, config, tokenizer, generation config,
chat template, and with LoRA `adapter/` beside the merged weights; written under another name and renamed at the end.
Never: a half-written folder under the final name.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spa_ray.training import comm
from spa_ray.training.job import TrainJob
from spa_ray.training.policy import DTYPES

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.gguf")
OURS = ("config.json", "adapter_config.json")
POLICY = "model."  # where the engine's module keeps the language model


def export_model(job: TrainJob, engine: Any) -> None:
    """Write the policy as it stands. Collective: under ZeRO-3 every rank helps to gather."""
    lora = job.train.lora is not None
    state = _adapter_state(engine) if lora else _full_state(engine)
    comm.on_rank_zero(lambda: write_model(job, engine.module.model, state, lora=lora))


def write_model(job: TrainJob, model: Any, state: dict[str, Tensor], *, lora: bool) -> None:
    """Write `job.out` from a model and the tensors that it was trained to: all of them, or the adapter's alone."""
    with aside(job.out) as folder:
        if lora:
            model.save_pretrained(folder / "adapter", state_dict=state)
            model = merge_adapter(
                job.model, folder / "adapter", DTYPES[job.train.dtype], trust_remote_code=job.trust_remote_code
            )
            state = model.state_dict()
        save_complete(model, state, source=job.model, folder=folder)


@contextmanager
def aside(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out` at the end."""
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    partial.rename(out)


def save_complete(model: Any, state: dict[str, Tensor], *, source: Path, folder: Path) -> None:
    """Weights and config of the model, and everything else that a model folder holds from `source`."""
    model.generation_config = type(
        model.generation_config
    )()  # the source's own file is copied; this one always validates
    model.save_pretrained(folder, state_dict=state)
    copy_companions(source, folder)


def merge_adapter(base: Path, adapter: Path, dtype: torch.dtype, *, trust_remote_code: bool) -> Any:
    """The base model with the adapter merged in, in float32 first, so that bfloat16 rounds once."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, trust_remote_code=trust_remote_code, use_safetensors=True
    )
    return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().to(dtype)


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
    return {key.removeprefix(POLICY): value.cpu() for key, value in state.items()}


def _adapter_state(engine: Any) -> dict[str, Tensor]:
    """The adapter's tensors alone, gathered where ZeRO-3 has partitioned them."""
    import deepspeed

    trained = {k: p for k, p in engine.module.model.named_parameters() if p.requires_grad}
    if engine.zero_optimization_stage() < 3:
        return {k: p.detach().cpu() for k, p in trained.items()}
    with deepspeed.zero.GatheredParameters(list(trained.values())):
        return {k: p.detach().cpu().clone() for k, p in trained.items()}
