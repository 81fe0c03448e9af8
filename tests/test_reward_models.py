"""Reward models of the forms that the SGA paper uses: one model per objective, transcripts, outputs with a name."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest

from spa_ray.config import arm_configs
from spa_ray.config.judge import Reward
from spa_ray.config.models import Config
from spa_ray.errors import InputError
from spa_ray.generation.judging import Item, Judgement, Parts
from spa_ray.generation.reward_judge import RewardJudge
from spa_ray.objectives import Objective
from spa_ray.rollout.chat import Chat
from tests.tiny_model import build_tiny_tokenizer

TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "A tree?"},
]
ANSWERS = ("Oak.", "No.", "It is an oak, I believe.")

# A class of one's own with the outputs of ArmoRM: a mixed score, and a reward for each attribute beside it.
MODELING = """
from dataclasses import dataclass

from torch import nn
from transformers import LlamaModel, LlamaPreTrainedModel
from transformers.utils import ModelOutput


@dataclass
class Output(ModelOutput):
    rewards: object = None
    logits: object = None


class Gated(LlamaPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.regression_layer = nn.Linear(config.hidden_size, 19, bias=False)
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        hidden = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
        last = attention_mask.sum(dim=1) - 1
        rewards = self.regression_layer(hidden[range(len(last)), last])
        return Output(rewards=rewards, logits=rewards.mean(dim=1, keepdim=True))
"""


def items(objectives: tuple[str, ...]) -> list[Item]:
    asked = [Objective(name=name, principle="p") for name in objectives]
    return [Item(TURNS, "{}", answer, asked, lambda *_: 0) for answer in ANSWERS]


def scores(judge: Any, objectives: tuple[str, ...]) -> list[list[Judgement]]:
    async def all_of_them() -> list[list[Judgement]]:
        return list(await asyncio.gather(*(judge.score(item) for item in items(objectives))))

    return asyncio.run(all_of_them())


def judge_of(config: Config) -> Any:
    chat = Chat(build_tiny_tokenizer(), model="tiny")
    section = config.scoring.judged_by
    assert isinstance(section, Reward)
    RewardJudge.check(section, "scoring.judge")
    return RewardJudge.of(section, Parts(config, None, chat, None))  # type: ignore[arg-type]


def config(judge: dict[str, Any], **raw: Any) -> Config:
    given = {"model": {"path": "none"}, "scoring": {"judge": {"kind": "reward", **judge}, "scale": [0, 1]}, **raw}
    return arm_configs(given, (), where="test", stem="test")["main"]


@pytest.fixture(scope="module")
def gpt2_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of the class and shape of gpt2-large-harmless and -helpful: one output, no chat template, no padding token."""
    import torch
    from transformers import GPT2Config, GPT2ForSequenceClassification

    found = {}
    for seed, name in enumerate(("harmless", "helpful")):
        folder = found[name] = tmp_path_factory.mktemp(name)
        tokenizer = build_tiny_tokenizer(chat_template=None)
        tokenizer.pad_token = None
        torch.manual_seed(seed)
        shape = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=256, num_labels=1,
                           initializer_range=0.5)  # fmt: skip
        GPT2ForSequenceClassification(shape).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return found


def test_each_objective_has_a_model_of_its_own_that_reads_transcripts(gpt2_models: dict[str, Path]) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    models = {name: str(folder) for name, folder in gpt2_models.items()}
    judge = judge_of(config({"models": models, "input": "transcript", "transform": "sigmoid"}))
    found = scores(judge, ("harmless", "helpful"))
    for k, folder in enumerate(gpt2_models.values()):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        for answer, judgements in zip(ANSWERS, found, strict=True):
            asked = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: A tree? \n\nAssistant:"
            with torch.no_grad():  # as RiC's code asks them
                wanted = torch.sigmoid(model(**tokenizer(asked, answer, return_tensors="pt")).logits[0, 0])
            assert judgements[k].score == pytest.approx(float(wanted), abs=1e-5)
    assert len({judgement.score for judgements in found for judgement in judgements}) == 6


def test_an_objective_without_a_model_is_told_before_a_prompt(gpt2_models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"reward models: none is for helpful; give models: {helpful: FOLDER}"):
        judge_of(config({"models": {"harmless": str(gpt2_models["harmless"])}}))
    with pytest.raises(InputError, match=rf"scoring\.judge: {tmp_path}: no reward model here"):
        judge_of(config({"models": {"harmless": str(gpt2_models["harmless"]), "helpful": str(tmp_path)}}))


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({}, "scoring.judge: path: give the folder of one reward model, or models: {objective: folder}, and not both"),
        ({"path": "a", "models": {"harmless": "b"}}, "and not both"),
        ({"models": {"harmless": "b"}, "attributes": {"harmless": 0}}, "models and attributes are both given"),
    ],
)
def test_one_model_or_one_for_each_objective(keys: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=re.escape(told)):
        config(keys)


def test_a_stage_is_another_with_another_output_or_another_model(gpt2_models: dict[str, Path]) -> None:
    harmless, helpful = map(str, gpt2_models.values())
    sections: list[dict[str, Any]] = [
        {"path": harmless}, {"path": harmless, "output": "rewards"}, {"path": helpful},
        {"path": harmless, "standardize": {"helpful": [0, 2]}},
        {"models": {"harmless": harmless, "helpful": helpful}}, {"models": {"harmless": helpful, "helpful": harmless}},
    ]  # fmt: skip
    keys = [json.dumps(Reward(kind="reward", **section).key()) for section in sections]
    assert len(set(keys)) == len(sections)
    assert '"output"' not in keys[0]  # as before the key
    assert '"models"' not in keys[0]
    assert '"standardize"' not in keys[0]


@pytest.fixture(scope="module")
def gated_model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("gated")
    shape = json.loads((tiny_model / "config.json").read_text())
    shape |= {"architectures": ["Gated"], "auto_map": {"AutoModelForSequenceClassification": "modeling_gated.Gated"}}
    (folder / "config.json").write_text(json.dumps(shape))
    (folder / "modeling_gated.py").write_text(MODELING)
    build_tiny_tokenizer().save_pretrained(folder)
    torch.manual_seed(7)
    weights = load_file(tiny_model / "model.safetensors")
    weights.pop("lm_head.weight", None)
    weights["regression_layer.weight"] = torch.randn(19, shape["hidden_size"])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


NAMES = ("helpfulness", "correctness")
ARMO = {"output": "rewards", "attributes": {"helpfulness": 0, "correctness": 18}, "transform": [5, -0.5]}
TRUSTED = {"model": {"path": "none", "trust_remote_code": True}, "objectives": list(NAMES)}


def test_a_named_output_holds_an_attribute_each_and_its_scale_is_given(gated_model: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    judge = judge_of(config({"path": str(gated_model), **ARMO}, **TRUSTED))
    tokenizer = build_tiny_tokenizer()
    model = AutoModelForSequenceClassification.from_pretrained(gated_model, trust_remote_code=True).eval()
    for answer, found in zip(ANSWERS, scores(judge, NAMES), strict=True):
        said = [*TURNS, {"role": "assistant", "content": answer}]
        ids = tokenizer.apply_chat_template(said, tokenize=True, return_dict=True, return_tensors="pt")
        with torch.no_grad():
            rewards = model(**ids).rewards[0]
        wanted = [5 * float(rewards[0]) - 0.5, 5 * float(rewards[18]) - 0.5]
        assert [judgement.score for judgement in found] == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"output": "scores"}, "its output has no 'scores'; set output"),
        ({"attributes": {"helpfulness": 19, "correctness": 0}}, "no 19 of its 19 outputs"),
    ],
)
def test_an_output_that_is_not_there_is_told(gated_model: Path, keys: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=re.escape(told)):
        judge_of(config({"path": str(gated_model), **ARMO, **keys}, **TRUSTED))


def test_code_of_its_own_runs_only_where_it_is_trusted(gated_model: Path) -> None:
    with pytest.raises(InputError, match="its class is code of its own"):
        judge_of(config({"path": str(gated_model), **ARMO}, objectives=list(NAMES)))
