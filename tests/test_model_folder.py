"""What a user may give in the place of a model folder: each in one line, before anything is fetched or started."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from spa_ray.config.models import Model
from spa_ray.errors import InputError
from spa_ray.pipeline.models import fetch_model, local_model
from spa_ray.storage import node_cache
from spa_ray.storage.model_folder import check_model_folder

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
Change = Callable[[Path], object]


def empty(name: str) -> Change:
    return lambda folder: (folder / name).write_bytes(b"")


def text(name: str, content: str) -> Change:
    return lambda folder: (folder / name).write_text(content)


def dangling(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to("../../blobs/abc")

    return change


def renamed(*names: str) -> Change:
    def change(folder: Path) -> None:
        for name in names[1:]:
            shutil.copy(folder / ONE, folder / name)
        (folder / ONE).rename(folder / names[0])

    return change


def indexed(weight_map: object) -> Change:
    return lambda folder: (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def both(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (empty("config.json"), r"config\.json: empty; fetch"),
        (text("config.json", "[]"), r"config\.json: holds a list"),
        (text("config.json", '{"architectures": "LlamaForCausalLM"}'), "architectures is 'LlamaForCausalLM'; write a"),
        (text("config.json", '{"architectures": [3]}'), r"architectures is \[3\]; write a list of names"),
        (empty("generation_config.json"), r"generation_config\.json: empty"),
        (text("generation_config.json", "[]"), r"generation_config\.json: holds a list"),
        (empty("tokenizer_config.json"), r"tokenizer_config\.json: empty"),
        (empty(ONE), r"model\.safetensors: empty; fetch"),
        (dangling(ONE), r"model\.safetensors: a link to \.\./\.\./blobs/abc, which is not there"),
        (dangling("config.json"), r"config\.json: a link to"),
        (dangling("tokenizer.json"), r"tokenizer\.json: a link to"),
        (renamed("weights.safetensors"), r"only weights\.safetensors; rename it to model\.safetensors"),
        (renamed("a.safetensors", "b.safetensors"), r"only a\.safetensors and 1 more; fetch model\.safetensors\.index"),
        (both(renamed("a.safetensors"), indexed({})), r"index\.json: an index without weights"),
        (both(renamed("a.safetensors"), indexed([])), r"index\.json: not an index of weights"),
        (both(renamed("a.safetensors"), empty(INDEX)), r"index\.json: not an index of weights"),
        (
            both(renamed(ONE, "a.safetensors"), indexed({"lm_head.weight": "a.safetensors"})),
            r"model\.safetensors beside an index of other files \(a\.safetensors\)",
        ),
    ],
)
def test_a_file_of_the_folder_that_is_not_what_it_should_be(
    tiny_model: Path, tmp_path: Path, change: Change, reason: str
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny_model, folder)
    check_model_folder(folder)
    change(folder)
    with pytest.raises(InputError, match=reason):
        check_model_folder(folder)


def test_an_index_of_the_one_file_is_no_contradiction(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "m")
    indexed({"lm_head.weight": ONE})(tmp_path / "m")
    check_model_folder(tmp_path / "m")


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ((), "it is empty"),
        (("adapter_config.json", "adapter_model.safetensors"), "an adapter alone; give the merged model folder"),
        (("model-Q4_K_M.gguf",), "a GGUF, which cannot be trained"),
        (("params.json", "consolidated.00.pth"), "the weights in their maker's own format; give the Hugging Face form"),
        (("model_index.json", "unet/config.json"), "a diffusers pipeline"),
        (("final/config.json",), r"there is one in \S+/m/final: give that"),
        (("snapshots/abc/config.json", "refs/main"), r"there is one in \S+/m/snapshots/abc: give that"),
        (("notes.txt",), "a model is a folder with config.json, safetensors and a tokenizer"),
    ],
)
def test_a_folder_without_a_config_says_what_it_is(tmp_path: Path, files: tuple[str, ...], reason: str) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    with pytest.raises(InputError, match=rf"no config\.json\); {reason}"):
        check_model_folder(folder)


def test_a_file_of_the_folder_in_its_place(tiny_model: Path) -> None:
    with pytest.raises(InputError, match=rf"not a folder; give {tiny_model}$"):
        check_model_folder(tiny_model / ONE)


def test_an_address_of_this_machine_is_its_folder(tiny_model: Path) -> None:
    assert local_model(Model(path=f"file://{tiny_model}")) == tiny_model.resolve()
    with pytest.raises(InputError, match="no such folder"):
        local_model(Model(path=f"file://{tiny_model}/nowhere"))


@pytest.mark.parametrize(
    "path", ["https://huggingface.co/owner/name", "https://huggingface.co/owner/name/tree/main", "hf://owner/name"]
)
def test_an_address_on_the_hub_is_told_its_name(path: str) -> None:
    with pytest.raises(InputError, match=r"is an address on the hub; give the model's name: owner/name$"):
        local_model(Model(path=path))


@pytest.mark.parametrize("path", ["x" * 300, f"./{'y/' * 3000}", "a\0b"])
def test_a_path_that_no_disk_takes_is_no_folder(path: str) -> None:
    with pytest.raises(InputError, match="no such folder"):
        local_model(Model(path=path))


def test_a_store_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: object) -> Path:
        raise ConnectionError("Name or service not known\nmore")

    monkeypatch.setattr(node_cache, "_stored", refuse)
    with pytest.raises(
        InputError, match=r"could not be fetched \(ConnectionError: Name or service not known\); look at"
    ):
        fetch_model(Model(path="memory://bucket/model"))
