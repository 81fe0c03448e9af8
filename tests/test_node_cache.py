"""A node's copy of a stored folder: an interrupted fetch goes on with the files that it lacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from upath import UPath

from spa_ray.pipeline.models import is_hub_id
from spa_ray.storage import node_cache
from spa_ray.storage.node_cache import HUB_FILES, HUB_UNREAD, local_folder


def test_an_interrupted_fetch_keeps_its_whole_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(node_cache.CACHE, str(tmp_path))
    folder = UPath("memory://bucket-of-copies/model")
    for name in ("a.safetensors", "b.safetensors", "inner/c.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode() * 10)
    real, asked = folder.fs.get_file, []

    def get(name: str, to: str, **more: Any) -> None:
        asked.append(name.rsplit("/", 1)[1])
        if len(asked) == 2:
            Path(to).write_bytes(b"half")
            raise OSError("the line broke")
        real(name, to, **more)

    monkeypatch.setattr(node_cache, "FETCH_THREADS", 1)
    monkeypatch.setattr(type(folder.fs), "get_file", lambda self, name, to, **more: get(name, to, **more))
    with pytest.raises(OSError, match="broke"):
        local_folder(folder)
    first = asked[0]
    copy = local_folder(folder)
    assert asked.count(first) == 1
    found = {str(p.relative_to(copy)): p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    assert found == {n: n.encode() * 10 for n in ("a.safetensors", "b.safetensors", "inner/c.json")}


def test_a_hubs_second_copy_of_the_weights_is_not_fetched_and_its_code_is() -> None:
    from huggingface_hub.utils import filter_repo_objects

    there = [
        "model-00001-of-00002.safetensors", "config.json", "tokenizer.json", "tokenizer.model.v3", "modeling_own.py",
        "chat_template.jinja", "consolidated.safetensors", "consolidated-00001.safetensors",
        "original/consolidated.00.pth", "original/params.json", "onnx/model.onnx", "pytorch_model.bin",
    ]  # fmt: skip
    found = filter_repo_objects(there, allow_patterns=list(HUB_FILES), ignore_patterns=list(HUB_UNREAD))
    assert list(found) == there[:6]


@pytest.mark.parametrize("name", ["no such/model", "owner/na--me", "owner/", "a/b/c", "../x/y", "owner/name.git"])
def test_what_is_no_hubs_name_is_a_folder_that_is_missing(name: str) -> None:
    assert not is_hub_id(name)


def test_a_hubs_name() -> None:
    assert is_hub_id("HuggingFaceTB/SmolLM2-135M-Instruct")
