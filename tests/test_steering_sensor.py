"""Sensed scores: those of transformers and of vLLM, whatever the batch, its padding or the layout."""

from __future__ import annotations

import random
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.sensing_work import pooled_scores
from spa_ray.config.models import Model
from spa_ray.errors import InputError
from spa_ray.rollout.chat import open_chat
from spa_ray.steering import sensor as module
from spa_ray.steering.asking import conditioning
from spa_ray.steering.sensor import Sensor, load_backbone
from tests.steering_support import sga_folder

EMBEDDED = Path(__file__).parents[1] / "spa_ray" / "microworld" / "model"
WORDS = ("ward", "charm", "rune", "lamp", "river", "salt", "moon", "owl")
ROUNDING = 2e-5


def conversations(count: int = 17) -> list[list[dict[str, str]]]:
    draw = random.Random(3)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 40))) for _ in range(count)]
    said = [[{"role": "user", "content": text}] for text in texts]
    more = [{"role": "assistant", "content": "It is."}, {"role": "user", "content": "Why?"}]
    return [*said[:-1], [*said[-1], *more]]


def section(folder: Path, dtype: str = "float32") -> Model:
    return Model(path=str(folder), dtype=dtype)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sga_folder(EMBEDDED, tmp_path_factory.mktemp("sensor") / "sga")


def sensor_of(folder: Path, dtype: str = "float32") -> Sensor:
    method = conditioning(folder)
    assert method is not None
    return Sensor(section(folder, dtype), folder, method)


@pytest.fixture(scope="module")
def sensed(folder: Path) -> np.ndarray:
    found = np.array(sensor_of(folder).sense(conversations()))
    assert found.std(axis=0).min() > 0.01  # prompts differ
    assert ((found > 0) & (found < 1)).all()
    return found


@pytest.mark.parametrize("tokens", [1, 100, 400])
def test_scores_are_the_same_in_whatever_batch_and_order(
    folder: Path, sensed: np.ndarray, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TOKENS", tokens)
    found = np.array(sensor_of(folder).sense(conversations()[::-1]))[::-1]
    np.testing.assert_allclose(found, sensed, rtol=0, atol=ROUNDING)


def prompts_of(folder: Path) -> list[list[int]]:
    chat = open_chat(section(folder), folder)
    return [chat.message_ids(messages) for messages in conversations()]


@pytest.mark.parametrize("side", ["left", "right"])
def test_they_are_transformers_last_state_after_the_final_norm_on_either_side_of_the_padding(
    folder: Path, sensed: np.ndarray, side: str
) -> None:
    prompts = prompts_of(folder)
    width = max(map(len, prompts))
    ids, mask = np.zeros((2, len(prompts), width), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        at = slice(width - len(prompt), None) if side == "left" else slice(len(prompt))
        ids[row, at], mask[row, at] = prompt, 1
    positions = (mask.cumsum(axis=1) - 1).clip(min=0)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    with torch.inference_mode():
        states = model(**{name: torch.tensor(v) for name, v in given.items()}, output_hidden_states=True).hidden_states
        last = [-1] * len(prompts) if side == "left" else [len(prompt) - 1 for prompt in prompts]
        method = conditioning(folder)
        assert method is not None
        found = method.sense(method.load(folder), states[-1][torch.arange(len(prompts)), last])
    np.testing.assert_allclose(found.numpy(), sensed, rtol=0, atol=ROUNDING)


def test_they_are_those_of_the_packed_layout_that_training_reads(folder: Path, sensed: np.ndarray) -> None:
    from spa_ray.training.attention import use_packed_attention
    from spa_ray.training.forward import ResponseLogps

    backbone = load_backbone(section(folder), folder)
    use_packed_attention(backbone)
    policy = ResponseLogps(backbone, packed=True, hidden=True)
    rows = [(np.array(prompt), np.zeros(0, dtype=np.int64)) for prompt in prompts_of(folder)]
    method = conditioning(folder)
    assert method is not None
    with torch.inference_mode():
        *_, hidden = policy(policy.collate(rows, "cpu"))
        found = method.sense(method.load(folder), hidden)
    np.testing.assert_allclose(found.numpy(), sensed, rtol=0, atol=ROUNDING)


@pytest.mark.engine
@pytest.mark.long
@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-3), ("bfloat16", 1e-2)])
def test_vllms_pooling_senses_the_same(tmp_path: Path, dtype: str, most: float) -> None:
    """In a process of its own, whose engine ends with it; a head as it is drawn, without the other tests' scale."""
    folder = sga_folder(EMBEDDED, tmp_path / "sga", scale=1.0)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pooled = np.array(pool.submit(pooled_scores, folder, dtype, prompts_of(folder)).result(timeout=300))
    ours = np.array(sensor_of(folder, dtype).sense(conversations()))
    assert np.abs(pooled - ours).max() <= most
    assert ours.std(axis=0).min() > 0


def test_a_prompt_that_cannot_be_read_says_why_and_the_others_are_sensed(folder: Path, sensed: np.ndarray) -> None:
    told = conversations()
    long: list[Mapping[str, str]] = [{"role": "user", "content": "salt " * 5000}]
    found = sensor_of(folder).sense([told[0], long, [], told[1]])
    np.testing.assert_allclose(np.array([found[0], found[3]]), sensed[:2], rtol=0, atol=ROUNDING)
    assert "tokens exceed the context of" in str(found[1])
    assert "without messages" in str(found[2])


def test_a_head_whose_weights_are_no_numbers_senses_nothing(folder: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, tmp_path / "nan")
    tensors = load_file(folder / "sga_head.safetensors")
    tensors["0.bias"][0] = torch.nan
    save_file(tensors, tmp_path / "nan" / "sga_head.safetensors")
    with pytest.raises(InputError, match="senses scores that are no numbers"):
        sensor_of(tmp_path / "nan").sense(conversations(2))
