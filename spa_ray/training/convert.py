"""`spa export`: a complete model folder from an adapter or from a running job's checkpoint, and its way to a hub.

Comes in: an adapter and its base model, or a job's work folder (`checkpoints/step_N`, `job.json`). Goes out: a model
folder as `export.py` writes it. Never: training, Ray, a hub that was not asked for.
"""

from __future__ import annotations

import io
import json
import pickle
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from spa_ray.errors import InputError, RunError
from spa_ray.storage.model_folder import check_model_folder
from spa_ray.training import hashes
from spa_ray.training.checkpoint import META, TAG, newest, read_meta
from spa_ray.training.export import POLICY, aside, merge_adapter, save_complete, write_model
from spa_ray.training.job import JOB, TrainJob, read_job
from spa_ray.training.own_modules import Beside
from spa_ray.training.policy import DTYPES, add_lora, load_policy, quiet_deepspeed

CHECKPOINTS = "checkpoints"
ADAPTER = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def export(
    source: Path,
    out: Path,
    *,
    adapter: Path | None = None,
    base: Path | None = None,
    step: int | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Write the model folder `out`. `source` is a model folder with `adapter` beside it, an adapter folder alone, a
    job's work folder or stage folder (its newest checkpoint, or that of `step`), or one checkpoint.

    `base` stands for the base model where it has moved. Raises: InputError.
    """
    if out.exists():
        raise InputError(f"{out}: stands already; give another --out or remove it")
    if not source.is_dir():
        raise InputError(f"{source}: no such folder; give a model folder, an adapter or a job's work folder")
    if adapter is not None:
        if base is not None or step is not None:
            raise InputError("spa export: --adapter is merged into SOURCE; --base and --step have no meaning beside it")
        return merge(source, adapter, out, trust_remote_code=trust_remote_code)
    if (source / ADAPTER).is_file():
        return merge(base or _base_of(source), source, out, trust_remote_code=trust_remote_code)
    return convert(find_checkpoint(source, step), out, base=base)


def merge(base: Path, adapter: Path, out: Path, *, trust_remote_code: bool = False) -> Path:
    """Merge a PEFT adapter into its base model, which keeps its dtype; the adapter goes along as `out/adapter`.

    Raises: InputError when either is not what it should be, or they do not fit.
    """
    import shutil

    import torch
    from transformers import AutoConfig

    check_model_folder(base)
    if not (adapter / ADAPTER).is_file():
        raise InputError(f"{adapter}: not an adapter ({ADAPTER} is missing); give the folder that PEFT wrote")
    if not (adapter / ADAPTER_WEIGHTS).is_file():
        raise InputError(
            f"{adapter}: no {ADAPTER_WEIGHTS} in it; only safetensors are read, and an adapter_model.bin is a pickle: "
            "save it anew with PEFT's save_pretrained where you trust it"
        )
    dtype = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code).dtype or torch.float32
    try:
        model = merge_adapter(base, adapter, dtype, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, RuntimeError, KeyError) as e:  # PEFT's, for weights of other names or shapes
        raise InputError(f"{adapter}: does not fit the base model {base} ({_first_line(e)})") from e
    with aside(out) as folder:
        save_complete(model, model.state_dict(), source=base, folder=folder)
        shutil.copytree(adapter, folder / "adapter")
    return out


def convert(checkpoint: Path, out: Path, *, base: Path | None = None) -> Path:
    """Write the policy as it stood at a checkpoint of any ZeRO stage and any number of ranks.

    Raises: InputError when the job is unknown, its model does not fit, or a file is not as the job wrote it; RunError
    when the checkpoint cannot be read.
    """
    job = _job_of(checkpoint, out, base)
    check_model_folder(job.model)
    check_own(checkpoint)
    found = gather(checkpoint, job)
    model = load_policy(job, DTYPES[job.train.dtype])
    lora = job.train.lora is not None
    if job.train.lora is not None:
        model = add_lora(model, job.train.lora, job.seed)
        wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    else:
        wanted = model.state_dict()
    off = [n for n, value in wanted.items() if n not in found or found[n].shape != value.shape]
    if off:
        raise InputError(f"{checkpoint}: is not of the model {job.model} ({off[0]} does not fit); give its --base")
    tensors = {name: found[name] for name in wanted}
    write_model(job, model, tensors, lora=lora, beside=Beside.at(checkpoint))
    return out


def check_own(checkpoint: Path) -> None:
    """A checkpoint is made of pickles: it is read only with the hashes that the job recorded beside its work folder.

    Raises: InputError otherwise.
    """
    record = hashes.record_of(checkpoint)
    try:
        bad = hashes.damage(checkpoint)
    except RunError as e:
        raise InputError(
            f"{e}; export where the job ran, or bring {record} along from there; if it is yours and has no such file, "
            "resume the job and export its next checkpoint"
        ) from e
    if bad:
        raise InputError(f"{checkpoint}: not as the job wrote it ({bad[0]}, by {record}); take another --step")


def gather(checkpoint: Path, job: TrainJob) -> dict[str, Tensor]:
    """The trained tensors of a checkpoint by the model's own names, whole and in the job's dtype, on the CPU.

    Under ZeRO 1-3 they are read off the optimizer's float32 master weights, as DeepSpeed's `zero_to_fp32` does.
    """
    quiet_deepspeed()
    try:
        with hashes.no_code():
            state = _whole_state(checkpoint, job)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as e:
        raise RunError(f"{checkpoint}: the checkpoint cannot be read ({_first_line(e)}); take another --step") from e
    return {name.removeprefix(POLICY): value for name, value in state.items()}


def _whole_state(checkpoint: Path, job: TrainJob) -> dict[str, Tensor]:
    import torch
    from deepspeed.utils import zero_to_fp32

    if read_meta(checkpoint).zero_stage == 0:
        states = torch.load(checkpoint / TAG / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=True)
        return states["module"]
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # it prints what it does
        lazy = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(
            str(checkpoint), TAG, exclude_frozen_parameters=job.train.lora is not None, lazy_mode=True
        )
        return zero_to_fp32.to_torch_tensor(lazy, dtype=DTYPES[job.train.dtype])


def find_checkpoint(source: Path, step: int | None) -> Path:
    """The checkpoint that is meant. Raises: InputError when there is none."""
    if (source / META).is_file() and (source / TAG).is_dir():
        return source
    for work in (source, source / "work", source / "job"):
        folder = work / CHECKPOINTS
        if not folder.is_dir():
            continue
        if step is None and (found := newest(folder)) is not None:
            return found[0]
        if step is not None and (folder / f"step_{step:08d}" / META).is_file():
            return folder / f"step_{step:08d}"
        have = sorted(int(p.parent.name.removeprefix("step_")) for p in folder.glob(f"step_*/{META}"))
        raise InputError(f"{folder}: no checkpoint{'' if step is None else f' of step {step}'}; there are {have}")
    if (source / "config.json").is_file():
        raise InputError(f"{source}: is a complete model folder; give --adapter, or --push-to-hub without --out")
    raise InputError(f"{source}: neither a model folder, an adapter nor a work folder with {CHECKPOINTS}/")


def _job_of(checkpoint: Path, out: Path, base: Path | None) -> TrainJob:
    path = checkpoint.parent.parent / JOB
    if not path.is_file():
        raise InputError(f"{path}: missing, so it is not known what this checkpoint is of")
    job = read_job(path)
    if out.resolve() == job.out.resolve():  # a resume would take it for the finished model
        raise InputError(f"{out}: is where the job itself will write its model; resume the job, or give another --out")
    return replace(job, out=out, model=base or job.model)


def _base_of(adapter: Path) -> Path:
    """The base model that an adapter names. Raises: InputError when it is not a folder here."""
    try:
        named = json.loads((adapter / ADAPTER).read_text())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError) as e:
        raise InputError(f"{adapter / ADAPTER}: names no base model ({e}); give --base") from e
    if not named or not Path(named).is_dir():
        raise InputError(f"{adapter}: its base model {named!r} is no folder here; give --base")
    return Path(named)


def _first_line(error: Exception) -> Any:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
