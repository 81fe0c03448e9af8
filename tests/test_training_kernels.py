"""Liger's kernels: what they replace, and that nobody gets less than was asked for. They run on GPUs only."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from spa_ray.errors import InputError
from spa_ray.training.kernels import patch_liger, use_liger


def test_without_a_gpu_they_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InputError, match=r"train\.liger: .*GPUs only; set train\.liger=false"):
        use_liger(SimpleNamespace())


def test_an_architecture_without_kernels_is_refused() -> None:
    with pytest.raises(InputError, match="no kernels for models of type 'microworld'"):
        patch_liger(SimpleNamespace(config=SimpleNamespace(model_type="microworld")))


def test_norms_and_mlps_change_and_the_heads_forward_stays(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.models.llama import modeling_llama

    # Liger exchanges this one for the whole process: put back afterwards.
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, use_safetensors=True)
    before = type(model).forward
    patch_liger(model)
    layer = model.model.layers[0]
    assert "liger_kernel" in layer.input_layernorm.forward.__func__.__module__
    assert "liger_kernel" in layer.mlp.forward.__func__.__module__
    assert type(model).forward is before
    assert "forward" not in vars(model)
