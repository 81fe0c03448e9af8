"""What cannot be trained is refused from the folder alone, before anything is generated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from spa_ray.config.training import Train
from spa_ray.errors import InputError
from spa_ray.training.trainable import check_trainable
from tests.tiny_model import build_tiny_model


@pytest.fixture(scope="module")
def tied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("tied") / "model", tie=True)


def changed(model: Path, to: Path, **config: Any) -> Path:
    shutil.copytree(model, to)
    settings = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**settings, **config}))
    return to


def lora(targets: Any) -> Train:
    return Train(lora={"target_modules": targets})


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, r"quantized \(awq\)"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"quantized \(fp8\)"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"architectures": ["BertForMaskedLM"]}, "BertForMaskedLM"),
    ],
)
def test_a_folder_that_cannot_be_trained_says_why(
    tiny_model: Path, tmp_path: Path, config: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        check_trainable(changed(tiny_model, tmp_path / "m", **config), Train())


def test_an_adapter_left_beside_complete_weights_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = changed(tiny_model, tmp_path / "m")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"adapter_config\.json beside complete weights"):
        check_trainable(folder, Train())


@pytest.mark.parametrize("text", ["[]", '"llama"', "{", ""])
def test_a_config_of_another_type_is_one_line(tiny_model: Path, tmp_path: Path, text: str) -> None:
    folder = changed(tiny_model, tmp_path / "m")
    (folder / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json"):
        check_trainable(folder, Train())


@pytest.mark.parametrize(
    "targets", ["all-linear", ["q_proj", "v_proj"], r".*\.(q|k)_proj", ["lm_head", "embed_tokens"]]
)
def test_targets_that_exist_pass(tiny_model: Path, targets: Any) -> None:
    check_trainable(tiny_model, Train())
    check_trainable(tiny_model, lora(targets))


@pytest.mark.parametrize("targets", [["q_proj", "c_attn"], r".*\.c_attn", ["proj"]])
def test_targets_that_match_nothing_are_named_with_what_there_is(tiny_model: Path, targets: Any) -> None:
    with pytest.raises(InputError, match=r"matches no module of .*; there are .*down_proj.*q_proj"):
        check_trainable(tiny_model, lora(targets))


def test_a_pattern_that_is_no_expression_is_one_line(tiny_model: Path) -> None:
    with pytest.raises(InputError, match="no regular expression"):
        check_trainable(tiny_model, lora("*_proj"))


@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj", "embed_tokens"], r".*(embed_tokens|q_proj)", "lm_head"])
def test_a_tied_end_is_no_target(tied_model: Path, targets: Any) -> None:
    with pytest.raises(InputError, match="is tied to the other end"):
        check_trainable(tied_model, lora(targets))
    check_trainable(tied_model, lora("all-linear"))


def test_a_pattern_of_complete_names_is_known_where_the_file_leaves_the_first_part_out(
    tiny_model: Path, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    folder = changed(tiny_model, tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    save_file({k.removeprefix("model."): v for k, v in weights.items()}, folder / "model.safetensors")
    check_trainable(folder, lora(r"model\.layers\.\d+\..*q_proj"))


def test_preflight_and_training_both_ask(tiny_model: Path, tmp_path: Path) -> None:
    from spa_ray.config import arm_configs
    from spa_ray.pipeline.preflight import check_run
    from spa_ray.training.prepare import _tokenize
    from tests.training_support import make_job

    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "?"}) + "\n")
    raw = {
        "model": {"path": str(tiny_model)},
        "prompts": {"source": str(tmp_path / "p.jsonl")},
        "train": {"lora": {"target_modules": ["c_attn"]}},
        "scoring": {"max_tokens": 8},
        **{key: {"max_tokens": 16} for key in ("sampling", "refine")},
    }
    with pytest.raises(InputError, match="'c_attn' matches no module"):
        check_run(arm_configs(raw, [], where="test", stem="test"), tiny_model)
    job = make_job(tmp_path, tiny_model, tmp_path / "none.parquet", lora={"target_modules": ["c_attn"]})
    with pytest.raises(InputError, match="'c_attn' matches no module"):
        _tokenize(job)
