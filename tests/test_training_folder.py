"""A folder's weights are held against its config.json before anything is paid: names, shapes, ties, and what it is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from spa_ray.config import arm_configs
from spa_ray.config.training import Train
from spa_ray.errors import InputError, RunError
from spa_ray.pipeline import plan_folder
from spa_ray.pipeline.plan import make_plan
from spa_ray.pipeline.plan_folder import _kept, _place
from spa_ray.training.folder import check_weights
from spa_ray.training.trainable import check_trainable
from tests.families.table import FAMILIES
from tests.tiny_model import build_tiny_model

Weights = dict[str, torch.Tensor]
Change = Callable[[Weights], object]


@pytest.fixture(scope="module")
def tied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("tied") / "model", tie=True)


def changed(model: Path, to: Path, change: Change | None = None, **config: Any) -> Path:
    """A copy of a model folder with other values in its config.json and other weights."""
    shutil.copytree(model, to)
    settings = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**settings, **config}))
    if change is not None:
        weights = load_file(to / "model.safetensors")
        change(weights)
        save_file(weights, to / "model.safetensors")
    return to


def shard(folder: Path) -> Path:
    """The folder's weights in two files and an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, keys in halves.items():
        save_file({key: weights[key] for key in keys}, folder / file)
    index = {"weight_map": {key: file for file, keys in halves.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def without_prefix(weights: Weights) -> None:
    for name in list(weights):
        weights[name.removeprefix("model.")] = weights.pop(name)


def without(name: str) -> Change:
    return lambda weights: weights.pop(name)


def added(name: str, *shape: int) -> Change:
    return lambda weights: weights.update({name: torch.ones(shape)})


def test_complete_folders_pass(tiny_model: Path, tied_model: Path, tmp_path: Path) -> None:
    assert check_weights(tiny_model) == []
    assert check_weights(tied_model) == []
    assert check_weights(shard(changed(tiny_model, tmp_path / "shards"))) == []
    assert check_weights(changed(tiny_model, tmp_path / "older names", without_prefix)) == []


def test_tied_ends_that_are_both_stored_pass_when_they_are_alike(tied_model: Path, tmp_path: Path) -> None:
    def both(weights: Weights) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()

    assert check_weights(changed(tied_model, tmp_path / "m", both)) == []


def test_a_config_that_ties_two_matrices_that_differ_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"ties lm_head\.weight and model\.embed_tokens\.weight.*different values"):
        check_weights(changed(tiny_model, tmp_path / "m", tie_word_embeddings=True))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"vocab_size": 300}, r"model\.safetensors: lm_head\.weight has the shape 265 x 64, .* promises 300 x 64"),
        ({"intermediate_size": 96}, r"mlp\.\w+_proj\.weight has the shape .*128.* promises .*96"),
        ({"hidden_size": 128}, r"has the shape 265 x 64, config.json promises 265 x 128 \(and 2\d? more\)"),
        ({"num_hidden_layers": 3}, r"no weight model\.layers\.2\.\S+ \(64\) \(and 8 more\)"),
        ({"attention_bias": True}, r"no weight model\.layers\.0\.self_attn\.\w_proj\.bias"),
        ({"num_hidden_layers": 1}, r"model\.layers\.1\.\S+ \(and 8 more\) has no place in the LlamaForCausalLM"),
        ({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}, r"no weight \S+k_norm.* \(Qwen3ForCausalLM\)"),
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "not those of the GPT2LMHeadModel"),
        ({"model_type": "qwen2"}, "architectures says LlamaForCausalLM and model_type qwen2"),
        ({"model_type": "nobody"}, "does not know its model_type; upgrade transformers"),
        ({"num_attention_heads": 3}, r"config\.json: transformers \S+ cannot read it: .*multiple of the number"),
    ],
)
def test_a_config_that_promises_another_model_is_refused(
    tiny_model: Path, tmp_path: Path, config: dict[str, Any], reason: str
) -> None:
    folder = changed(tiny_model, tmp_path / "m", **config)
    with pytest.raises(InputError, match=reason) as caught:
        check_trainable(folder, Train())
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without("lm_head.weight"), r"no weight lm_head\.weight \(265 x 64\)"),
        (without("model.layers.1.self_attn.q_proj.weight"), r"no weight \S+q_proj\.weight \(64 x 64\)"),
        (added("model.layers.1.self_attn.q_norm.weight", 32), r"safetensors: \S+q_norm\.weight has no place"),
        (added("model.layers.2.mlp.up_proj.weight", 128, 64), r"layers\.2\.mlp\.up_proj\.weight has no place"),
        (added("model.norm.weight", 65), r"model\.norm\.weight has the shape 65, config.json promises 64"),
    ],
)
@pytest.mark.parametrize("sharded", [False, True])
def test_weights_that_are_not_what_the_config_promises_are_refused(
    tiny_model: Path, tmp_path: Path, change: Change, reason: str, sharded: bool
) -> None:
    folder = changed(tiny_model, tmp_path / "m", change)
    with pytest.raises(InputError, match=reason):
        check_weights(shard(folder) if sharded else folder)


def test_a_part_of_its_own_that_the_model_does_not_have_is_a_note(tiny_model: Path, tmp_path: Path) -> None:
    folder = changed(tiny_model, tmp_path / "m", added("mtp.layers.0.norm.weight", 64))
    (note,) = check_trainable(folder, Train())
    assert "LlamaForCausalLM has no place for mtp.layers.0.norm.weight" in note


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}, "a vision-language model"),
        ({"model_type": "qwen2_5_vl", "architectures": None}, "a vision-language model"),
        ({"model_type": "voxtral", "architectures": ["VoxtralForConditionalGeneration"]}, "a speech model"),
        ({"model_type": "qwen2_audio", "architectures": ["A"]}, "a model of sound and text"),
        ({"model_type": "modernbert", "architectures": ["ModernBertModel"]}, "an encoder, which writes no text"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "an encoder-decoder"),
        ({"model_type": "clip", "architectures": ["CLIPModel"]}, "a vision model"),
        ({"model_type": "time_series_transformer", "architectures": ["X"]}, "a model of type time_series_transformer"),
    ],
)
def test_a_folder_of_another_kind_says_what_it_is_and_what_to_give(
    tiny_model: Path, tmp_path: Path, config: dict[str, Any], what: str
) -> None:
    folder = changed(tiny_model, tmp_path / "m")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=rf"{what}.*cannot be trained as a causal language model; give one that can"):
        check_trainable(folder, Train())
    assert check_weights(folder, served_only=True) == []


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_no_family_of_the_table_is_refused(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    config = f"{family.kind}TextConfig" if family.kind == "Gemma3" else f"{family.kind}Config"
    built = getattr(transformers, config)(**family.config, vocab_size=320, pad_token_id=0)
    folder = save(getattr(transformers, f"{family.kind}ForCausalLM")(built), tmp_path / "m")
    assert check_weights(folder) == []


TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 64}
TINY |= {"intermediate_size": 48, "pad_token_id": 0}
EXPERTS = {**TINY, "head_dim": 16, "moe_intermediate_size": 16}


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64}),
        ("GPTNeoXForCausalLM", TINY),
        ("FalconForCausalLM", TINY),
        ("MixtralForCausalLM", {**TINY, "num_local_experts": 4}),
        ("Qwen3MoeForCausalLM", {**EXPERTS, "num_experts": 4}),
        ("OlmoeForCausalLM", {**TINY, "num_experts": 4}),
    ],
)
def test_weights_that_transformers_renames_or_joins_pass(kind: str, config: dict[str, Any], tmp_path: Path) -> None:
    model = getattr(transformers, kind)
    folder = save(model(model.config_class(**config)), tmp_path / "m")
    assert check_weights(folder) == []


def test_a_multimodal_checkpoint_that_loads_as_a_causal_model_passes(tmp_path: Path) -> None:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config={**TINY, "head_dim": 16},
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    folder = save(transformers.Gemma3ForConditionalGeneration(config), tmp_path / "m")
    assert check_weights(folder) == []


def test_a_judge_that_is_only_served_may_be_quantized(tiny_model: Path, tmp_path: Path) -> None:
    quantized = changed(tiny_model, tmp_path / "q", without_prefix, quantization_config={"quant_method": "awq"})
    assert check_weights(quantized, served_only=True) == []
    broken = changed(tiny_model, tmp_path / "b", without("lm_head.weight"))
    with pytest.raises(InputError, match="no weight lm_head"):
        check_weights(broken, served_only=True)


def test_a_plan_says_it(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "?"}) + "\n")

    def plan(folder: Path) -> dict[str, Any]:
        raw = {"model": {"path": str(folder)}, "prompts": {"source": str(tmp_path / "p.jsonl")}}
        return make_plan(arm_configs(raw, [], where="test", stem="test"))

    with pytest.raises(InputError, match="no weight lm_head"):
        plan(changed(tiny_model, tmp_path / "broken", without("lm_head.weight")))
    noted = plan(changed(tiny_model, tmp_path / "noted", added("mtp.norm.weight", 64)))
    assert any("has no place for mtp.norm.weight" in note for note in noted["notes"])


def ask(folder: Path, cache: Path, interpreter: str = sys.executable) -> subprocess.CompletedProcess[str]:
    """The verdict in a process without torch, which asks `interpreter`."""
    script = (
        "import sys\nfrom pathlib import Path\nfrom spa_ray.pipeline.plan_folder import weights_checked\n"
        "sys.executable = sys.argv[2]\n"
        "try:\n    with weights_checked(Path(sys.argv[1]), trust_remote_code=False) as notes:\n"
        "        print(notes())\n"
        "finally:\n    print('torch' in sys.modules)\n"
    )
    environment = {**os.environ, "SPA_RAY_CACHE": str(cache)}
    command = [sys.executable, "-c", script, str(folder), interpreter]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def test_a_process_without_torch_asks_another_one(tiny_model: Path, tmp_path: Path) -> None:
    broken = changed(tiny_model, tmp_path / "broken", without("lm_head.weight"))
    done = ask(broken, tmp_path / "cache")
    assert done.stdout == "False\n"
    assert f"InputError: {broken}: no weight lm_head.weight" in done.stderr
    assert not (tmp_path / "cache").exists()


def test_a_folder_that_passed_is_asked_about_once(tiny_model: Path, tmp_path: Path) -> None:
    folder, cache = changed(tiny_model, tmp_path / "m"), tmp_path / "cache"
    _kept(["a note"], _place_in(cache, folder))
    assert ask(folder, cache, "/bin/false").stdout == "['a note']\nFalse\n"
    os.utime(folder / "config.json", ns=(1, 1))
    assert "ended with status 1" in ask(folder, cache, "/bin/false").stderr


def _place_in(cache: Path, folder: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPA_RAY_CACHE", str(cache))
        return _place(folder)


def test_the_other_process_prints_notes(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan_folder.main(str(changed(tiny_model, tmp_path / "noted", added("mtp.norm.weight", 64))), "0")
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "has no place for mtp.norm.weight" in said["notes"][0]
    assert said["error"] is None


def test_a_check_that_dies_is_no_verdict(tmp_path: Path) -> None:
    command, pipe = ["sh", "-c", "echo no memory >&2; exit 3"], subprocess.PIPE
    with (
        subprocess.Popen(command, stdout=pipe, stderr=pipe) as process,
        pytest.raises(RunError, match="status 3: no memory"),
    ):
        plan_folder.answer(process, tmp_path)
