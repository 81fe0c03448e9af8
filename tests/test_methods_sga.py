"""SGA: its sentence, its targets, its losses against written-out ones, its head's files, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from spa_ray.config import arm_configs
from spa_ray.config.training import train_section
from spa_ray.errors import InputError
from spa_ray.methods import sga
from spa_ray.rollout.chat import Chat
from spa_ray.training.dataset import TokenizedPairs
from spa_ray.training.method import LossInputs, Method, method_of, method_of_folder
from spa_ray.training.own_modules import Beside
from spa_ray.training.prepare import fitted
from spa_ray.training.tokenize import tokenize_pairs
from tests.tiny_model import build_tiny_tokenizer
from tests.training_support import OBJECTIVES, RANGES, make_job, pair_rows, write_pairs

METHODS = ("sga_sft", "sga_dpo")
STATE = {"objectives": list(OBJECTIVES), "ranges": [[1.0, 10.0], [0.0, 4.0]]}
NONE = Path("none")


def the_method(name: str, state: Any = STATE, **settings: Any) -> Any:
    return method_of(train_section({"method": name, **settings}), state)


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(build_tiny_tokenizer(), model="tiny")


# --- the sentence ---------------------------------------------------------------------------------------------------


def test_the_sentence_follows_the_last_turn_with_two_decimals_and_no_period() -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    said = the_method("sga_sft").render(messages, [7.0, 4.0], STATE)
    assert said[:-1] == messages[:-1]
    wanted = "c\nYour response must satisfy the following scores: <harmless_score:0.67> and <helpful_score:1.00>"
    assert said[-1] == {"role": "user", "content": wanted}
    assert the_method("sga_sft").render(messages, None, STATE) == messages


@pytest.mark.parametrize("name", METHODS)
def test_a_models_prompts_are_training_prompts_to_the_id(tmp_path: Path, chat: Chat, name: str) -> None:
    rows = pair_rows(12)
    pairs = write_pairs(tmp_path / "pairs.parquet", rows, objectives=OBJECTIVES, ranges=RANGES)
    job = make_job(tmp_path, NONE, pairs, method=name)
    method = method_of(job.train, fitted(job))
    tokenize_pairs(pairs, tmp_path / "t.arrow", chat, vocab_size=265, max_length=512, gap="abs_sum", method=method)
    data, targets = TokenizedPairs(tmp_path / "t.arrow"), TokenizedPairs(tmp_path / "t.arrow").targets()
    assert targets is not None
    Beside(method.state).write(tmp_path, job.train)
    loaded = method_of_folder(tmp_path)
    assert loaded is not None
    for i, row in enumerate(rows):
        said = loaded.render(row["prompt"], row["chosen_scores"], loaded.state)
        assert chat.prompt_ids(said) == data.ids("prompt_ids", i).tolist()
        assert data.ids("sensed_ids", i).tolist() == chat.message_ids(row["prompt"])
        assert f"<helpful_score:{targets[i][1]:.2f}>" in said[-1]["content"]
        assert targets[i].tolist() == [round((score - 1) / 9, 2) for score in row["chosen_scores"]]


# --- the losses -----------------------------------------------------------------------------------------------------


def inputs_of(method: Method[Any], *, seed: int = 0, pairs: int = 3, width: int = 6) -> LossInputs:
    """Random float64 outputs; each pair has its own sequences, in the order of the method's sides."""
    torch.manual_seed(seed)
    n = len(method.sides)
    sides = torch.arange(n * pairs).reshape(pairs, n)
    model: Any = type(
        "Model", (), {"config": type("C", (), {"get_text_config": lambda self: self, "hidden_size": width})()}
    )
    return LossInputs(
        summed=(-20 * torch.rand(n * pairs, dtype=torch.float64)).requires_grad_(),
        counts=torch.randint(1, 9, (n * pairs,)),
        sides=sides,
        weights=torch.ones(pairs, dtype=torch.float64),
        reference=-20 * torch.rand(n * pairs, dtype=torch.float64),
        hidden=torch.randn(n * pairs, width, dtype=torch.float64, requires_grad=True),
        targets=torch.rand(pairs, 2, dtype=torch.float64),
        modules=method.modules(model).double().train(),
        state=method.state,
        seeds=[11 * i for i in range(pairs)],
    )


def written_out(inputs: LossInputs, pair: int, *, dropout: float) -> Tensor:
    """The head's squared error of one pair, layer by layer."""
    assert inputs.hidden is not None
    assert inputs.targets is not None
    x = inputs.hidden[inputs.sides[pair, -1]]
    kept = torch.rand(len(x), generator=torch.Generator().manual_seed(inputs.seeds[pair])) >= dropout
    x = torch.where(kept, x / (1 - dropout), 0)
    layers = [layer for layer in inputs.modules or () if isinstance(layer, nn.Linear)]
    for layer in layers[:-1]:
        x = (layer.weight @ x + layer.bias).clamp(min=0)
    x = layers[-1].weight @ x + layers[-1].bias
    return (1 / (1 + torch.exp(-x)) - inputs.targets[pair]).square()


@pytest.mark.parametrize("mse", ["mean", "sum"])
@pytest.mark.parametrize(("name", "ce"), [("sga_sft", "sum"), ("sga_sft", "token_mean"), ("sga_dpo", "sum")])
def test_losses_and_gradients_are_those_written_out(name: str, ce: str, mse: str) -> None:
    own = {"ce_reduction": ce} if name == "sga_sft" else {"beta": 0.3}
    method = the_method(name, mse_reduction=mse, mse_weight=7.0, head_widths=[5, 4], head_dropout=0.4, **own)
    inputs = inputs_of(method)
    losses, stats = method.loss(inputs)
    wanted = []
    for pair, sides in enumerate(inputs.sides):
        squared = written_out(inputs, pair, dropout=0.4)
        summed = inputs.summed[sides]
        if name == "sga_sft":
            text = -summed[0] / (inputs.counts[sides[0]] if ce == "token_mean" else 1)
        else:
            assert inputs.reference is not None
            ratio = summed - inputs.reference[sides]
            text = -logsigmoid(0.3 * (ratio[0] - ratio[1]))
        wanted.append(text + 7.0 * (squared.mean() if mse == "mean" else squared.sum()))
    torch.testing.assert_close(losses, torch.stack(wanted), rtol=0, atol=1e-12)
    assert inputs.modules is not None
    leaves = [inputs.summed, inputs.hidden, *inputs.modules.parameters()]
    found, truth = (
        torch.autograd.grad(total.sum(), leaves, retain_graph=True) for total in (losses, torch.stack(wanted))
    )
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
        assert b.abs().max() > 0
    assert set(stats) == set(method.stats)
    assert all(value.shape == (3,) and not value.requires_grad for value in stats.values())


def test_without_the_heads_weight_it_is_plain_conditional_training() -> None:
    """The prompt alone is left of SGA: the same log-probs give the loss of `sft`, and of `spa_dpo`."""
    own = {"mse_weight": 0.0, "head_widths": [4]}
    method = the_method("sga_sft", ce_reduction="token_mean", **own)
    inputs = inputs_of(method)
    plain, _ = method_of(train_section({"method": "sft"})).loss(inputs)
    torch.testing.assert_close(method.loss(inputs)[0], plain, rtol=0, atol=0)
    method = the_method("sga_dpo", beta=0.2, **own)
    inputs = inputs_of(method)
    plain, _ = method_of(train_section({"method": "spa_dpo", "beta": 0.2})).loss(inputs)
    torch.testing.assert_close(method.loss(inputs)[0], plain, rtol=0, atol=0)


def test_dropout_is_a_pairs_own_and_off_in_evaluation() -> None:
    method = the_method("sga_sft", head_dropout=0.5, head_widths=[5])
    inputs = inputs_of(method, pairs=4)
    complete, _ = method.loss(inputs)
    for pair in range(4):
        alone = LossInputs(**{**vars(inputs), "sides": inputs.sides[[pair]], "weights": inputs.weights[[pair]],
                              "targets": inputs.targets[[pair]], "seeds": [inputs.seeds[pair]]})  # fmt: skip
        torch.testing.assert_close(method.loss(alone)[0], complete[[pair]], rtol=0, atol=1e-12)
    other, _ = method.loss(LossInputs(**{**vars(inputs), "seeds": [s + 1 for s in inputs.seeds]}))
    assert not torch.equal(other, complete)
    assert inputs.modules is not None
    inputs.modules.eval()
    undropped, _ = method.loss(inputs)
    torch.testing.assert_close(undropped, the_method("sga_sft", head_dropout=0.0).loss(inputs)[0])


def test_the_head_starts_from_its_own_seed_or_the_runs() -> None:
    def first(**settings: Any) -> Tensor:
        return next(inputs_of(the_method("sga_sft", head_widths=[3], **settings), seed=1).modules.parameters())

    assert torch.equal(first(head_seed=5), first(head_seed=5))
    assert not torch.equal(first(head_seed=5), first(head_seed=6))


# --- the model folder -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A model folder as training leaves it."""
    folder = tmp_path_factory.mktemp("sga") / "model"
    shutil.copytree(tiny_model, folder)
    train = train_section({"method": "sga_sft", "head_widths": [5, 4]})
    head = inputs_of(method_of(train, STATE), width=64).modules
    Beside(STATE, dict(head.float().state_dict())).write(folder, train)
    return folder


def test_the_head_comes_back_in_one_call_and_senses_in_the_unit_interval(folder: Path) -> None:
    about = json.loads((folder / "sga.json").read_text())
    assert about["attributes"] == list(OBJECTIVES)
    assert (about["widths"], about["hidden_size"], about["ranges"]) == ([5, 4], 64, STATE["ranges"])
    assert about["sentence"] + about["between"].join(
        about["score"].format(name=name, value=1) for name in about["attributes"]
    ) == the_method("sga_sft").render([{"role": "user", "content": ""}], [10.0, 4.0], STATE)[0]["content"]  # fmt: skip
    head, method = sga.load(folder), method_of_folder(folder)
    assert method is not None
    hidden = torch.randn(7, 64)
    sensed = method.sense(head, hidden)
    assert sensed.shape == (7, 2)
    assert ((sensed > 0) & (sensed < 1)).all()
    assert torch.equal(sensed, method.sense(method.load(folder), hidden))
    assert not head.training
    assert "sga_head.safetensors" not in json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def test_a_folder_without_its_head_or_with_anothers_is_refused(folder: Path, tmp_path: Path) -> None:
    def broken(name: str) -> Path:
        shutil.copytree(folder, tmp_path / name)
        return tmp_path / name

    gone = broken("gone")
    (gone / "sga_head.safetensors").unlink()
    for look in (sga.load, method_of_folder):
        with pytest.raises(InputError, match=r"sga_head\.safetensors"):
            look(gone)
    narrow = broken("narrow")
    tensors = {name: value[..., :3].contiguous() for name, value in load_file(narrow / "sga_head.safetensors").items()}
    save_file(tensors, narrow / "sga_head.safetensors")
    with pytest.raises(InputError, match=r"sga_head\.safetensors: not the head of sga\.json \(size mismatch") as error:
        sga.load(narrow)
    assert "\n" not in str(error.value)
    other = broken("other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "hidden_size": 128}))
    with pytest.raises(InputError, match=r"reads 64 numbers, and this model's states have 128"):
        sga.load(other)
    torn = broken("torn")
    (torn / "sga_head.safetensors").write_bytes(b"no tensors")
    with pytest.raises(InputError, match=r"not the head of sga\.json"):
        sga.load(torn)


def test_an_arm_brings_its_pairs_and_no_other_arm_has_them() -> None:
    raw = {"model": {"path": "org/some-8B"}, "arms": {"spa": {}, "sga": {"train.method": "sga_dpo"}}}
    configs = arm_configs({**raw, "pairs": {"order": "pareto", "delta": 3}}, [], where="test", stem="test")
    assert (configs["sga"].pairs.order, configs["sga"].pairs.delta) == ("mean", 1e-6)
    assert (configs["spa"].pairs.order, configs["spa"].pairs.delta) == ("pareto", 3)


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("scores", "metadata", "told"),
    [
        ([11.0, 5.0], {}, r"pair 'p00000:1:5': chosen_scores: harmless is outside of its range, 1 to 10"),
        ([5.0, 0.5], {}, r"pair 'p00000:1:5': chosen_scores: helpful is outside of its range"),
        ([5.0, float("nan")], {}, r"pair 'p00000:1:5': chosen_scores: helpful has no score"),
        ([None, 5.0], {}, r"pair 'p00000:1:5': chosen_scores: harmless has no score"),
        ([5.0], {}, r"pair 'p00000:1:5': chosen_scores: one score each is needed of harmless, helpful"),
        ([5.0, 5.0], {"ranges": None}, r"needs the scores' ranges.*set episodes\.ranges, say \{harmless: \[0, 4\]\}"),
        ([5.0, 5.0], {"objectives": None}, r"needs scores with names"),
        ([5.0, 5.0], {"ranges": [[1, 10], [4, 4]]}, r"episodes\.ranges: helpful: 4 to 4 is no range"),
    ],
)
def test_scores_that_mean_nothing_are_refused_in_one_line(
    tmp_path: Path, name: str, scores: list[Any], metadata: dict[str, Any], told: str
) -> None:
    rows = pair_rows(4)
    rows[1]["chosen_scores"] = scores
    given = {"objectives": OBJECTIVES, "ranges": RANGES} | metadata
    pairs = write_pairs(tmp_path / "p.parquet", rows, **{k: v for k, v in given.items() if v is not None})
    with pytest.raises(InputError, match=told) as error:
        fitted(make_job(tmp_path, NONE, pairs, method=name))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("scores", [[11.0, 2.0], [5.0, -0.1], [5.0, float("nan")]])
def test_a_score_that_steering_makes_up_is_held_to_its_range_too(scores: list[float]) -> None:
    with pytest.raises(InputError, match="outside of its range"):
        the_method("sga_dpo").render([{"role": "user", "content": "a"}], scores, STATE)
