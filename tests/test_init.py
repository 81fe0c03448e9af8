"""`spa init`: the config that it writes loads and is planned, whatever the model and the machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from spa_ray.config import load_config
from spa_ray.config.models import Config
from spa_ray.errors import InputError
from spa_ray.pipeline.init import Machine, config_text
from spa_ray.pipeline.plan import make_plan
from tests.mistral_model import build_mistral_like
from tests.tiny_model import CHAT_TEMPLATE, build_tiny_tokenizer

EMBEDDED = "package://spa_ray.microworld/model"
CPU = Machine(gpus=0, gpu_gib=0.0, bfloat16=False, ram_gib=24.0)
H100S = Machine(gpus=8, gpu_gib=79.6, bfloat16=True, ram_gib=1000.0)
ONE_24 = Machine(gpus=1, gpu_gib=23.6, bfloat16=True, ram_gib=64.0)
ONE_T4 = Machine(gpus=1, gpu_gib=15.0, bfloat16=False, ram_gib=64.0)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / 'my "prompts": #1.jsonl'  # what YAML would read otherwise
    file.write_text('{"prompt": "How?"}\n{"prompt": "Why?"}\n')
    return file


def written(tmp_path: Path, model: str | Path, prompts: Path, machine: Machine) -> Config:
    file = tmp_path / "mine.yaml"
    file.write_text(config_text(str(model), str(prompts), machine))
    return load_config(file)["main"]


def test_the_embedded_models_config_is_written_and_planned(spa: Any, tmp_path: Path, prompts: Path) -> None:
    out = tmp_path / "mine.yaml"
    status, said, _ = spa("init", "--model", EMBEDDED, "--prompts", prompts, "--out", out)
    assert status == 0
    assert f"spa plan {out}" in said
    status, plan, _ = spa("plan", out, "--json")
    assert status == 0
    assert json.loads(plan.splitlines()[-1])["arms"]["main"]["prompts"]["count"] == 2
    assert "2 prompts" in out.read_text()
    before = out.read_text()
    status, _, error = spa("init", "--model", EMBEDDED, "--prompts", prompts, "--out", out)
    assert (status, error.count("\n")) == (2, 1)
    assert "exists already" in error
    assert out.read_text() == before


def test_a_model_that_can_think_is_told_not_to(tmp_path: Path, tiny_model: Path, prompts: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    assert written(tmp_path, folder, prompts, CPU).model.chat_template_kwargs == {}
    build_tiny_tokenizer(f"{CHAT_TEMPLATE}{{% if enable_thinking %}}{{% endif %}}").save_pretrained(folder)
    config = written(tmp_path, folder, prompts, CPU)
    assert config.model.chat_template_kwargs == {"enable_thinking": False}
    assert not any("thinking" in note for note in make_plan({"main": config})["notes"])


def test_a_dash_prints_the_config_alone(spa: Any, prompts: Path, tmp_path: Path) -> None:
    status, said, _ = spa("init", "--model", EMBEDDED, "--prompts", prompts, "--out", "-")
    assert status == 0
    (tmp_path / "printed.yaml").write_text(said)
    assert load_config(tmp_path / "printed.yaml")["main"].prompts.source == str(prompts)


@pytest.mark.parametrize(("model", "source"), [("/no/such/model", None), (EMBEDDED, "none.jsonl")])
def test_a_wrong_model_or_prompts_leave_no_file(
    spa: Any, tmp_path: Path, prompts: Path, model: str, source: str | None
) -> None:
    out = tmp_path / "mine.yaml"
    status, _, error = spa("init", "--model", model, "--prompts", source or prompts, "--out", out)
    assert (status, error.count("\n")) == (2, 1)
    assert not out.exists()


def test_single_digits_are_scored_from_1_to_9_in_mode_expected(tmp_path: Path, prompts: Path) -> None:
    scoring = written(tmp_path, build_mistral_like(tmp_path / "model"), prompts, CPU).scoring
    assert (scoring.mode, scoring.scale) == ("expected", (1, 9))


def test_a_tokenizer_with_10_as_one_token_is_scored_from_1_to_10(
    tmp_path: Path, tiny_model: Path, prompts: Path
) -> None:
    config = written(tmp_path, tiny_model, prompts, CPU)
    assert (config.scoring.mode, config.scoring.scale) == ("expected", (1, 10))
    assert (config.train.dtype, config.train.lora, config.resources.gpus_per_engine) == ("float32", None, 0)
    assert (config.sampling.temperature, config.sampling.min_p) == (1.0, 0.1)


@pytest.mark.parametrize(
    ("model", "machine", "lora"),
    [
        ("org/Some-8B-Instruct", H100S, "none"),
        ("org/Some-8B-Instruct", ONE_24, "lora"),
        ("org/Some-1B-Instruct", ONE_24, "none"),
        ("org/Some-3B-Instruct", ONE_24, "lora"),
        ("org/Some-1B-Instruct", ONE_T4, "any"),
    ],
)
def test_what_is_trained_follows_the_memory(
    tmp_path: Path, prompts: Path, model: str, machine: Machine, lora: str
) -> None:
    config = written(tmp_path, model, prompts, machine)
    found = "none" if config.train.lora is None else config.train.lora.quantize or "lora"
    assert lora in (found, "any")
    assert config.train.dtype == ("bfloat16" if machine.bfloat16 else "float32")
    assert config.model.dtype == ("bfloat16" if machine.bfloat16 else "float16")
    assert config.resources.train_workers == machine.gpus
    plan = make_plan({"main": config})
    assert plan["refusal"] is None
    assert not [
        note for note in plan["arms"]["main"]["notes"] if note.startswith("train.lr") and " is far " in note
    ]  # two prompts make one step


def test_a_model_that_no_engine_here_holds_is_refused(prompts: Path) -> None:
    with pytest.raises(InputError, match="do not fit into an engine"):
        config_text("org/Some-70B-Instruct", str(prompts), ONE_24)


def test_an_engine_takes_as_many_gpus_as_its_weights_need(tmp_path: Path, prompts: Path) -> None:
    config = written(tmp_path, "org/Some-70B-Instruct", prompts, H100S)
    assert config.model.tensor_parallel_size == 4
    assert config.resources.engines.max == 2


@pytest.mark.parametrize(
    ("model", "machine"), [("org/Some-8B", H100S), ("org/Some-8B", ONE_24), ("org/Some-3B", ONE_24)]
)
def test_a_few_hundred_prompts_move_weights_by_more_than_bfloat16_rounds(
    tmp_path: Path, model: str, machine: Machine
) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(f'{{"prompt": "How, {i}?"}}\n' for i in range(400)))
    plan = make_plan({"main": written(tmp_path, model, prompts, machine)})
    assert not [note for note in plan["arms"]["main"]["notes"] if note.startswith("train.lr")]
