"""The weighted mean of models that were tuned from one: Reward Soups (Ramé et al. 2023), θ = Σ λ_k θ_k.

Takes complete model folders and shares that sum to 1; writes a complete model folder. Means are computed in float32 and
written in the models' own dtype. The mean of complete weights is the base plus the mean of their differences from it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from spa_ray.errors import InputError
from spa_ray.storage.files import as_path, copy_files, delete_tree, files_under
from spa_ray.storage.model_folder import read_config
from spa_ray.storage.node_cache import cache_root, local_folder
from spa_ray.storage.weights import INDEX, read_header, tensors, weight_files

CONFIG, ADAPTER = "config.json", "adapter"
SAME = ("architectures", "model_type", "vocab_size", "hidden_size")  # of config.json
Shares = Mapping[Path, float]


def merge_stored(models: Mapping[str, float], base: str, out: str, what: str, trust_remote_code: bool) -> None:
    """`merge_models` on this node; all folders may be URIs, and a folder that stands at `out` is replaced."""
    target = as_path(out)
    delete_tree(target)
    here = {local_folder(as_path(folder)): share for folder, share in models.items()}
    place = target if isinstance(target, Path) else cache_root() / "scratch" / "merge" / target.parent.name
    shutil.rmtree(place, ignore_errors=True)
    merge_models(here, local_folder(as_path(base)), place, what=what, trust_remote_code=trust_remote_code)
    if place != target:
        copy_files(place, target, files_under(place))
        shutil.rmtree(place)


def merge_models(models: Shares, base: Path, out: Path, *, what: str, trust_remote_code: bool = False) -> None:
    """Write the folder `out`: the models' mean by their shares; `base`, which they were tuned from, gives all that is
    no weight. `what` adapters reads their LoRA factors (`_merge_adapters`).

    Raises: InputError for models of different tensors or configs.
    """
    from spa_ray.training.export import aside, copy_companions

    _check_alike(list(models))
    with aside(out) as folder:
        if what == "adapters":
            _merge_adapters(models, base, folder, trust_remote_code=trust_remote_code)
        else:
            _merge_weights(models, folder)
            copy_companions(base, folder)


def _check_alike(folders: list[Path]) -> None:
    first, *others = folders
    configs = {folder: read_config(folder) for folder in folders}
    shapes = {folder: _tensors(weight_files(folder)) for folder in folders}
    for other in others:
        for key in SAME:
            mine, its = configs[first].get(key), configs[other].get(key)
            if mine != its:
                raise InputError(f"merge: {other} is another model than {first} ({key}: {its}, not {mine})")
        _check_same(shapes[first], shapes[other], first, other)


def _tensors(files: list[Path]) -> dict[str, tuple[str, list[int]]]:
    return {name: (t["dtype"], t["shape"]) for file in files for name, t in tensors(read_header(file)).items()}


def _check_same(mine: dict[str, Any], its: dict[str, Any], first: Path, other: Path) -> None:
    for name in sorted({*mine, *its}):
        if mine.get(name) != its.get(name):
            raise InputError(
                f"merge: {name} is {its.get(name)} in {other} and {mine.get(name)} in {first}; merge models that were "
                "tuned from one, with the same train.dtype and train.lora"
            )


def _merge_weights(models: Shares, folder: Path) -> None:
    """One file of the first model at a time, each with the same tensors of all models."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    first = next(iter(models))
    with ExitStack() as opened:
        readers: list[tuple[float, dict[str, Any]]] = []
        for model, share in models.items():
            files = [opened.enter_context(safe_open(file, framework="pt")) for file in weight_files(model)]
            readers.append((share, {name: file for file in files for name in file.keys()}))  # noqa: SIM118
        for file in weight_files(first):
            names = tensors(read_header(file))
            state = {name: _mean([(share, of[name].get_tensor(name)) for share, of in readers]) for name in names}
            save_file(state, folder / file.name, metadata={"format": "pt"})
    for name in (CONFIG, *([INDEX] if (first / INDEX).is_file() else [])):
        shutil.copyfile(first / name, folder / name)


def _mean(shared: list[tuple[float, Any]]) -> Any:
    first = shared[0][1]
    if not first.is_floating_point():
        return first
    total = shared[0][0] * first.float()
    for share, tensor in shared[1:]:
        total += share * tensor.float()
    return total.to(first.dtype)


def _merge_adapters(models: Shares, base: Path, folder: Path, *, trust_remote_code: bool) -> None:
    """The base plus Σ λ_k s_k B_k A_k (s = alpha / r), rounded once; `folder/adapter` is the same as one adapter.

    PEFT's `cat` keeps all factors side by side, so the products are added; a mean of the A and of the B would multiply
    every A with every B.
    """
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    from spa_ray.training.export import merge_adapter, save_complete

    dtype = AutoConfig.from_pretrained(next(iter(models)), trust_remote_code=trust_remote_code).dtype
    policy = AutoModelForCausalLM.from_pretrained(
        base, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True
    )
    names = {f"model_{number}": model / ADAPTER for number, model in enumerate(models)}
    first, *others = names
    wrapped = PeftModel.from_pretrained(policy, str(names[first]), adapter_name=first)
    try:
        for name in others:
            wrapped.load_adapter(str(names[name]), adapter_name=name)
        wrapped.add_weighted_adapter(list(names), list(models.values()), ADAPTER, combination_type="cat")
    except (ValueError, RuntimeError) as e:
        raise InputError(f"merge: these adapters cannot be one ({e}); use what: weights") from e
    wrapped.save_pretrained(folder, selected_adapters=[ADAPTER])  # into a folder of its name
    merged = merge_adapter(base, folder / ADAPTER, dtype, trust_remote_code=trust_remote_code)
    save_complete(merged, merged.state_dict(), source=base, folder=folder)
