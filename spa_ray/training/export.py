"""From a trained engine to a complete model folder that vLLM and transformers load alike.

Comes in: the engine (all ranks call), the job. Goes out: `job.out`: safetensors, config, tokenizer, generation config,
chat template, and with LoRA `adapter/` beside the merged weights; written under another name and renamed at the end.
Never: a half-written folder under the final name.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spa_ray.training import comm
from spa_ray.training.job import TrainJob
from spa_ray.training.own_modules import Beside, files_beside
from spa_ray.training.policy import DTYPES

WEIGHTS = (
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.gguf"),
    *("*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.ot", "*.tflite", "*.nemo"),
)
OURS = ("config.json", "adapter_config.json", "README.md")  # written anew: a card is of one model
TEMPLATES = "additional_chat_templates"  # transformers' folder for templates with names
GENERATION = "generation_config.json"
NOTHING = Beside()
POLICY = "model."  # where the engine's module keeps the language model


def export_model(job: TrainJob, engine: Any, beside: Beside = NOTHING) -> None:
    """Write the policy as it stands. Collective: under ZeRO-3 every rank helps to gather."""
    lora = job.train.lora is not None
    state = _adapter_state(engine) if lora else _full_state(engine)
    comm.on_rank_zero(lambda: write_model(job, engine.module.model, state, lora=lora, beside=beside))


def write_model(job: TrainJob, model: Any, state: dict[str, Tensor], *, lora: bool, beside: Beside = NOTHING) -> None:
    """Write `job.out` from a model and the tensors that it was trained to: all of them, or the adapter's alone; and
    what its method leaves beside them."""
    with aside(job.out) as folder:
        if lora:
            model.save_pretrained(folder / "adapter", state_dict=state)
            model = merge_adapter(
                job.model, folder / "adapter", DTYPES[job.train.dtype], trust_remote_code=job.trust_remote_code
            )
            state = model.state_dict()
        save_complete(model, state, source=job.model, folder=folder)
        beside.write(folder, job.train)


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
    if not (source / GENERATION).is_file():  # an empty one would hide the end tokens that config.json names
        (folder / GENERATION).unlink(missing_ok=True)
    copy_companions(source, folder)


def merge_adapter(base: Path, adapter: Path, dtype: torch.dtype, *, trust_remote_code: bool) -> Any:
    """The base model in `dtype` with the adapter merged in.

    One matrix at a time is computed in float32, so that bfloat16 rounds once and the model is never held in float32.
    Raises: ValueError when the adapter changes an embedding that is tied to the head.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True
    )
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    tied = ends[1] is not None and ends[0].weight is ends[1].weight
    wrapped = PeftModel.from_pretrained(model, str(adapter))
    if tied and (model.get_input_embeddings(), model.get_output_embeddings()) != ends:
        raise ValueError("it changes one of two tied embeddings, and a merged model would lose the other")
    for layer in wrapped.modules():
        if isinstance(layer, BaseTunerLayer):
            inner = layer.get_base_layer().float()
            layer.merge()
            inner.to(dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="All adapters are already merged")
        return wrapped.merge_and_unload().to(dtype)  # what is left to do: modules that the adapter holds complete


def copy_companions(source: Path, target: Path) -> None:
    """All of a model folder but weights, config, card and what its method left, byte for byte: tokenizer, templates,
    generation config, code.

    Of its subfolders only templates with names and Python packages: others hold weights in other formats.
    """
    not_copied = {*OURS, *files_beside(source)}
    for file in sorted(source.iterdir()):
        if file.is_file() and file.name not in not_copied and not any(file.match(w) for w in WEIGHTS):
            shutil.copyfile(file, target / file.name)
    for file in sorted([*source.glob(f"{TEMPLATES}/*.jinja"), *source.glob("[!._]*/**/*.py")]):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)


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
