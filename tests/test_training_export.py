"""The exported folder is the trained policy: the same log-probs, and the same files and tensors as its source."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spa_ray.config.training import Train
from spa_ray.errors import InputError
from spa_ray.training import comm
from spa_ray.training.convert import merge
from spa_ray.training.export import export_model
from spa_ray.training.policy import make_engine
from spa_ray.training.trainable import check_trainable
from tests.training_support import make_job

ENDS = ["q_proj", "lm_head", "embed_tokens"]
VOCAB = 96


def build(folder: Path, kind: str, *, dtype: str = "float32", **config: Any) -> Path:
    """A random model of two small layers, without a tokenizer."""
    import transformers

    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "dtype": dtype,
        **config,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**settings))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def headers(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """Type and shape of every tensor of a folder, from the headers of its files."""
    found: dict[str, tuple[str, list[int]]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as f:
            header = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))
        found |= {name: (h["dtype"], h["shape"]) for name, h in header.items() if name != "__metadata__"}
    return found


def export(folder: Path, model: Path, **train: Any) -> tuple[Path, torch.Tensor]:
    """Train's export of a policy whose trainable weights are random; and its log-probs of four responses."""
    job = make_job(folder, model, folder / "none.parquet", **train)
    engine = make_engine(job)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in engine.module.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape, generator=generator).to(p.dtype))
        logps, _ = engine(engine.module.collate(rows(), comm.device()))
    export_model(job, engine)
    engine.destroy()
    return job.out, logps


def rows() -> list[tuple[np.ndarray, np.ndarray]]:
    ids = np.random.default_rng(0).integers(1, VOCAB, size=(4, 20))
    return [(row[:7], row[7:]) for row in ids]


def logps_by_transformers(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids = torch.tensor(np.stack([np.concatenate(row) for row in rows()]))
    with torch.no_grad():
        logps = model(ids).logits.float().log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    return logps[:, 6:].sum(1)


@pytest.mark.engine
@pytest.mark.parametrize(
    ("kind", "tie", "targets"),
    [
        ("Llama", False, "all-linear"),
        ("Llama", False, ENDS),
        ("Llama", True, "all-linear"),
        ("Qwen2", False, ENDS),
        ("Qwen2", True, "all-linear"),
    ],
)
def test_a_merged_adapter_is_the_trained_policy(
    tmp_path: Path, one_process: None, kind: str, tie: bool, targets: Any
) -> None:
    model = build(tmp_path / "source", kind, tie_word_embeddings=tie)
    base = logps_by_transformers(model)
    out, trained = export(tmp_path, model, lora={"r": 4, "alpha": 8.0, "target_modules": targets})
    assert (trained - base).abs().max() > 0.1
    torch.testing.assert_close(logps_by_transformers(out), trained, atol=1e-4, rtol=0)
    assert headers(out) == headers(model)


@pytest.mark.engine
def test_a_tied_end_is_no_target_of_training_nor_of_a_merge(tmp_path: Path, one_process: None) -> None:
    tied = build(tmp_path / "tied", "Llama", tie_word_embeddings=True)
    untied = build(tmp_path / "untied", "Llama", tie_word_embeddings=False)
    lora = {"r": 4, "target_modules": ENDS}
    with pytest.raises(InputError, match="is tied to the other end"):
        check_trainable(tied, Train(lora=lora))
    check_trainable(untied, Train(lora=lora))
    out, _ = export(tmp_path, untied, lora=lora)
    (tied / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="one of two tied embeddings"):
        merge(tied, out / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.engine
@pytest.mark.parametrize(
    ("kind", "tie", "lora", "dtype"),
    [
        ("Llama", True, False, "bfloat16"),
        ("Llama", True, True, "bfloat16"),
        ("Qwen3", False, False, "float32"),
        ("Gemma2", True, True, "float32"),
        ("Phi3", False, True, "bfloat16"),
        ("GPTNeoX", False, False, "bfloat16"),
    ],
)
def test_the_exported_folder_has_the_tensors_and_files_of_its_source(
    tmp_path: Path, one_process: None, kind: str, tie: bool, lora: bool, dtype: str
) -> None:
    model = build(tmp_path / "source", kind, tie_word_embeddings=tie, dtype=dtype)
    kept = ["chat_template.jinja", "additional_chat_templates/tool_use.jinja", "tokenizer.model", "modeling_own.py"]
    kept += ["own_code/layers.py", "tokenizer_config.json", "LICENSE"]
    left = [
        "README.md",
        "original/consolidated.00.pth",
        "original/params.json",
        "model.onnx",
        "tf_model.h5",
        "onnx/model.onnx",
    ]
    for name in [*kept, *left]:
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(f"{name}\n")
    if tie:
        (model / "generation_config.json").unlink()
    out, _ = export(tmp_path, model, lora={"r": 4} if lora else None, dtype=dtype)
    assert headers(out) == headers(model)
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype
    files = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    source = {str(p.relative_to(model)) for p in model.rglob("*") if p.is_file()}
    assert {name for name in files if not name.startswith("adapter/")} == source - set(left)
    assert all((out / name).read_text() == f"{name}\n" for name in kept)


def test_a_merge_in_bfloat16_rounds_once(tmp_path: Path) -> None:
    """Each merged matrix is the float32 sum of base and adapter, rounded to bfloat16."""
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    base = build(tmp_path / "base", "Llama", dtype="bfloat16", tie_word_embeddings=True)
    (base / "tokenizer.json").write_text("{}")
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), settings)
    model.save_pretrained(tmp_path / "adapter")
    merged = load_file(merge(base, tmp_path / "adapter", tmp_path / "out") / "model.safetensors")
    expected = model.merge_and_unload().state_dict()
    for name, value in merged.items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, expected[name].bfloat16()), name


def test_a_merge_keeps_the_modules_that_an_adapter_holds_complete(tmp_path: Path) -> None:
    """PEFT's `modules_to_save`: the head was trained itself, not through an adapter."""
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    base = build(tmp_path / "base", "Llama", tie_word_embeddings=False)
    (base / "tokenizer.json").write_text("{}")
    settings = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    with torch.no_grad():
        model.get_output_embeddings().weight.add_(1.0)
    model.save_pretrained(tmp_path / "adapter")
    merged = load_file(merge(base, tmp_path / "adapter", tmp_path / "out") / "model.safetensors")
    torch.testing.assert_close(merged["lm_head.weight"], model.get_output_embeddings().weight.detach())
