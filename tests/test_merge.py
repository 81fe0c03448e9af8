"""Merged models (Reward Soups): the arithmetic beside float64, what cannot be merged, and arms that are merges."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from spa_ray.config import Config, arm_configs
from spa_ray.errors import InputError
from spa_ray.pipeline.plan import make_plan
from spa_ray.pipeline.plan_print import print_plan
from spa_ray.pipeline.recipe import planned_stages
from spa_ray.storage.files import as_path, copy_files, files_under
from spa_ray.storage.model_folder import check_model_folder
from spa_ray.storage.node_cache import CACHE
from spa_ray.training.merge import merge_models, merge_stored
from tests.s3_server import BUCKET, s3_server
from tests.tiny_model import build_tiny_model

PROMPTS = "spa_ray.microworld.prompts:street"
SHARES = (0.9, 0.1)
TWO = {"harm": {"pairs.order": "only:harmless"}, "help": {"pairs.order": "only:helpful"}}


def tensors_of(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The base and two others of its kind."""
    root = tmp_path_factory.mktemp("models")
    return [build_tiny_model(root / str(seed), seed=seed) for seed in range(3)]


def save_in_shards(source: Path, target: Path, dtype: str) -> Path:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    model.save_pretrained(target, max_shard_size="100KB")
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
    assert len(list(target.glob("model-*.safetensors"))) > 2
    return target


def test_weights_are_the_mean_and_the_folder_is_complete(models: list[Path], tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, a, b = models
    merge_models(dict(zip((a, b), SHARES, strict=True)), base, tmp_path / "soup", what="weights")
    found, first, second = (tensors_of(folder) for folder in (tmp_path / "soup", a, b))
    assert found.keys() == first.keys()
    for name, tensor in found.items():
        wanted = 0.9 * first[name].double() + 0.1 * second[name].double()
        assert torch.allclose(tensor.double(), wanted, rtol=0, atol=5e-7)  # float32's own rounding
    check_model_folder(tmp_path / "soup")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "soup")
    ids = AutoTokenizer.from_pretrained(tmp_path / "soup")("Hi", return_tensors="pt").input_ids
    assert torch.isfinite(model(ids).logits).all()
    assert not (tmp_path / ".soup.partial").exists()


def test_shards_stay_shards_and_bfloat16_is_rounded_once(models: list[Path], tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    a, b = (save_in_shards(source, tmp_path / source.name, "bfloat16") for source in models[1:])
    merge_models(dict(zip((a, b), SHARES, strict=True)), models[0], tmp_path / "soup", what="weights")
    found, first, second = (tensors_of(folder) for folder in (tmp_path / "soup", a, b))
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        exact = 0.9 * first[name].double() + 0.1 * second[name].double()
        assert torch.allclose(tensor.double(), exact, rtol=2**-8, atol=5e-7)  # half a unit in the last place
    names = {file.name for file in a.glob("model*")}
    assert {file.name for file in (tmp_path / "soup").glob("model*")} == names
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "soup").dtype == torch.bfloat16


def test_of_equal_models_the_mean_is_the_model(models: list[Path], tmp_path: Path) -> None:
    import torch

    merge_stored({str(models[1]): 1.0, str(models[2]): 0.0}, str(models[0]), str(tmp_path / "soup"), "weights", False)
    assert all(torch.equal(t, tensors_of(models[1])[n]) for n, t in tensors_of(tmp_path / "soup").items())
    (tmp_path / "soup" / "leftover").write_text("of a call that did not end")
    merge_stored({str(models[2]): 1.0}, str(models[0]), str(tmp_path / "soup"), "weights", False)
    assert all(torch.equal(t, tensors_of(models[2])[n]) for n, t in tensors_of(tmp_path / "soup").items())
    assert not (tmp_path / "soup" / "leftover").exists()


def test_models_on_an_object_store_are_merged_there(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    with s3_server() as environment:
        for key, value in {**environment, CACHE: str(tmp_path / "cache")}.items():
            monkeypatch.setenv(key, value)
        root = as_path(f"s3://{BUCKET}/run")
        for source in models[1:]:
            copy_files(source, root / source.name, files_under(source))
        shares = {str(root / source.name): share for source, share in zip(models[1:], SHARES, strict=True)}
        merge_stored(shares, str(models[0]), str(root / "stages" / "merge-1" / "model"), "weights", False)
        stored = root / "stages" / "merge-1" / "model"
        copy_files(stored, tmp_path / "back", files_under(stored))
    check_model_folder(tmp_path / "back")
    found, first, second = (tensors_of(folder) for folder in (tmp_path / "back", *models[1:]))
    assert all(torch.allclose(t, 0.9 * first[n] + 0.1 * second[n], atol=1e-6) for n, t in found.items())
    assert not list((tmp_path / "cache" / "scratch" / "merge").iterdir())


def lora_model(base: Path, folder: Path, *, seed: int, r: int) -> Path:
    """A model folder as a LoRA arm leaves it: merged weights, and the adapter beside them."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from spa_ray.training.convert import merge

    torch.manual_seed(seed)
    config = LoraConfig(r=r, lora_alpha=3 * r, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(folder.with_name(f"{folder.name}-adapter"))
    return merge(base, folder.with_name(f"{folder.name}-adapter"), folder)


def test_adapters_are_merged_by_their_products(models: list[Path], tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    from spa_ray.training.convert import merge

    base = models[0]
    arms = [lora_model(base, tmp_path / f"arm{r}", seed=r, r=r) for r in (2, 4)]
    soup = tmp_path / "soup"
    merge_models(dict(zip(arms, SHARES, strict=True)), base, soup, what="adapters")
    found, start = tensors_of(soup), tensors_of(base)
    name = "model.layers.1.mlp.down_proj"
    wanted = start[f"{name}.weight"].double()
    for arm, share in zip(arms, SHARES, strict=True):
        state = load_file(arm / "adapter" / "adapter_model.safetensors")
        a, b = (state[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
        wanted = wanted + share * 3 * b @ a
    assert torch.allclose(found[f"{name}.weight"].double(), wanted, rtol=0, atol=1e-5)
    assert torch.equal(found["model.embed_tokens.weight"], start["model.embed_tokens.weight"])
    weights = tmp_path / "by_weights"  # of float32 models both ways are one
    merge_models(dict(zip(arms, SHARES, strict=True)), base, weights, what="weights")
    assert all(torch.allclose(t, found[n], atol=1e-5) for n, t in tensors_of(weights).items())
    again = merge(base, soup / "adapter", tmp_path / "again")  # its one adapter is the soup too
    assert all(torch.allclose(t, found[n], atol=1e-6) for n, t in tensors_of(again).items())
    assert json.loads((soup / "adapter" / "adapter_config.json").read_text())["r"] == 6
    check_model_folder(soup)


def test_models_of_other_shapes_kinds_or_dtypes_are_refused_and_nothing_is_written(
    models: list[Path], tmp_path: Path
) -> None:
    half = save_in_shards(models[2], tmp_path / "half", "bfloat16")
    with pytest.raises(InputError, match=r"tuned from one, with the same train\.dtype"):
        merge_models({models[1]: 0.5, half: 0.5}, models[0], tmp_path / "soup", what="weights")
    config = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps({**config, "model_type": "qwen2"}))
    with pytest.raises(InputError, match=r"another model than .* \(model_type: qwen2, not llama\)"):
        merge_models({models[1]: 0.5, half: 0.5}, models[0], tmp_path / "soup", what="weights")
    assert [path.name for path in tmp_path.iterdir()] == ["half"]


def arms(merges: dict[str, Any], **train: Any) -> dict[str, Config]:
    raw = {"model": {"path": "org/some-8B"}, "prompts": {"source": PROMPTS}, "train": train, "arms": {**TWO, **merges}}
    return arm_configs(raw, [], where="c.yaml", stem="test")


def soup(what: str = "weights", **of: float) -> dict[str, Any]:
    return {"merge": {"of": of, "what": what}}


@pytest.mark.parametrize(
    ("merges", "told"),
    [
        ({"s": soup(harm=1, hlep=1)}, r"arms: s: merge.of: there is no arm 'hlep'; one of harm, help, s"),
        ({"s": soup(harm=1, s=1)}, r"arms: s: merge: made of itself"),
        ({"s": soup(t=1), "t": soup(s=1)}, r"merge: made of itself \((s of t of s|t of s of t)\)"),
        ({"s": soup(harm=-1, help=2)}, r"c.yaml \(arm s\): merge.of.harm: must be"),
        ({"s": soup(harm=0, help=0)}, r"merge.of: all weights are 0"),
        ({"s": soup("adapters", harm=1, help=1)}, r"merge.what: adapters: harm has no LoRA adapter"),
        ({"s": soup("mean", harm=1)}, r"merge.what: must be one of weights, adapters"),
        ({"s": {"merge": {"of": {}}}}, r"merge.of: "),
    ],
)
def test_what_is_no_merge_is_told_in_one_line(merges: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told) as e:
        planned_stages(arms(merges))
    assert "\n" not in str(e.value)


def test_a_merge_belongs_to_an_arm() -> None:
    with pytest.raises(InputError, match="merge: belongs to one arm"):
        arm_configs({"model": {"path": "m"}}, ["merge.of={a: 1}"], where="c.yaml", stem="c")


def test_adapters_of_later_iterations_have_no_common_base() -> None:
    lora = {"lora": {"r": 4}}
    planned_stages(arms({"s": soup("adapters", harm=1, help=1), "t": soup("adapters", s=1, harm=3)}, **lora))
    two = {"s": soup("adapters", harm=1, late=1), "late": {"iterations.count": 2}}
    with pytest.raises(InputError, match="late has no LoRA adapter of the run's model"):
        planned_stages(arms(two, **lora))


def test_a_model_with_a_head_of_its_own_is_not_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "docs" / "examples"))
    monkeypatch.setitem(sys.modules, "dual_head", None)  # what is imported here is forgotten afterwards
    monkeypatch.delitem(sys.modules, "dual_head")
    merges = {"h": {"train.method": "dual_head:DualHead"}, "s": soup(harm=1, h=1)}
    with pytest.raises(InputError, match="h: dual_head:DualHead has more than a model, which has no mean"):
        planned_stages(arms(merges))


def stages(configs: dict[str, Config]) -> dict[tuple[str, str], str]:
    return {(stage.stage, arm): stage.key for stage in planned_stages(configs) for arm in stage.arms}


def test_a_merge_is_a_stage_that_follows_its_models() -> None:
    merges = {"first": soup(even=1, help=3), "s91": soup(harm=9, help=1), "even": soup(harm=1, help=1)}
    found = stages(arms(merges))
    assert [key for key in found if key[0] == "merge"] == [("merge", "s91"), ("merge", "even"), ("merge", "first")]
    assert not {key for key in found if key[1] in merges and key[0] != "merge"}
    same = stages(arms({**merges, "s91": soup(harm=18, help=2)}))
    assert same == found
    other = stages(arms({**merges, "even": soup(harm=1, help=1.5)}))
    assert {key for key in found if found[key] != other[key]} == {("merge", "even"), ("merge", "first")}
    retrained = stages(arms(merges, lr=1e-7))
    assert {key[1] for key in found if key[0] == "merge" and found[key] != retrained[key]} == {*merges}


def test_a_plan_names_merges_and_counts_their_models(capsys: pytest.CaptureFixture[str]) -> None:
    without, with_soup = make_plan(arms({})), make_plan(arms({"s": soup(harm=9, help=1)}))
    assert with_soup["arms"]["s"]["merge"]["of"] == {"harm": 9, "help": 1}
    assert with_soup["output_gib"]["models"] == pytest.approx(1.5 * without["output_gib"]["models"], abs=0.01)
    (stage,) = [stage for stage in with_soup["stages"] if stage["stage"] == "merge"]
    assert stage["arms"] == ["s"]
    assert 0 < stage["seconds"] < 600
    print_plan(with_soup)
    assert "merge of harm 9, help 1" in capsys.readouterr().out
