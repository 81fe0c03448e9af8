"""RiC, CPO and MODPO: the sequences that they train on, their prompts, MODPO's loss, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from spa_ray.config import Config, arm_configs
from spa_ray.config.training import train_section
from spa_ray.errors import InputError
from spa_ray.methods.ric import RiC
from spa_ray.pipeline.recipe import planned_stages
from spa_ray.rollout.chat import Chat
from spa_ray.training.dataset import TokenizedPairs, read_sequences, select_pairs
from spa_ray.training.method import LossInputs, Method, method_of, method_of_folder
from spa_ray.training.own_modules import Beside
from spa_ray.training.prepare import fitted
from spa_ray.training.tokenize import objectives_in, tokenize_pairs
from tests.tiny_model import build_tiny_tokenizer
from tests.training_support import OBJECTIVES, RANGES, make_job, pair_rows, write_pairs

ASKED = [{"role": "user", "content": "May I?"}]
NAMES = {"objectives": OBJECTIVES, "ranges": RANGES}


def answers(prompts: int = 3, each: int = 3) -> list[dict[str, Any]]:
    """The pairs of all answers of some prompts: in several pairs each, and alike where two answers of a prompt are."""
    base = pair_rows(2 * prompts * each)
    rows = []
    for p in range(prompts):
        mine = base[p * each : (p + 1) * each]
        for i in range(each):
            rows += [
                {
                    **mine[i],
                    "pair_id": f"p{p}:{i}:{j}",
                    "prompt_id": f"p{p}",
                    "prompt": mine[0]["prompt"],
                    "chosen_index": i,
                    "rejected_index": j,
                    "rejected_ids": mine[j]["chosen_ids"],
                    "rejected_scores": mine[j]["chosen_scores"],
                }
                for j in range(i + 1, each)
            ]
    return rows


def fitted_method(tmp_path: Path, rows: list[dict[str, Any]], name: str, **settings: Any) -> Method[Any]:
    pairs = write_pairs(tmp_path / "pairs.parquet", rows, **NAMES)
    job = make_job(tmp_path, Path("none"), pairs, method=name, **settings)
    return method_of(job.train, fitted(job))


def sequences(tmp_path: Path, method: Method[Any]) -> tuple[list[tuple[list[int], list[int]]], dict[str, int]]:
    """What is trained on: prompt and response ids, each once."""
    chat = Chat(build_tiny_tokenizer(), model="tiny")
    out = tmp_path / "tokens.arrow"
    dropped = tokenize_pairs(
        tmp_path / "pairs.parquet", out, chat, vocab_size=265, max_length=512, gap="abs_sum", method=method
    )
    data = TokenizedPairs(out)
    selection, also = select_pairs(data, method, seed=0)
    every = np.arange(len(selection.source))
    return [(p.tolist(), r.tolist()) for p, r in read_sequences(data, selection, every)], {**dropped, **also}


def completions(rows: list[dict[str, Any]]) -> dict[tuple[str, int], tuple[list[int], list[float]]]:
    return {
        (row["prompt_id"], row[f"{side}_index"]): (row[f"{side}_ids"], row[f"{side}_scores"])
        for row in rows
        for side in ("chosen", "rejected")
    }


# --- RiC ------------------------------------------------------------------------------------------------------------


def test_ric_learns_z_scores_over_each_completion_once_and_writes_them_with_one_decimal(tmp_path: Path) -> None:
    rows = answers()
    method = fitted_method(tmp_path, rows, "ric")
    scores = np.array([scores for _, scores in completions(rows).values()])
    assert len(scores) == 9
    np.testing.assert_allclose(method.state["mean"], scores.mean(axis=0))
    np.testing.assert_allclose(method.state["std"], scores.std(axis=0))
    state = {**method.state, "mean": [5.0, 4.0], "std": [2.0, 0.5]}
    assert method.render(ASKED, [6.4, 3.98], state)[0]["content"] == "May I? <rm1_score> 0.7 <rm2_score> 0.0 "
    assert method.render(ASKED, None, state) == ASKED


def test_ric_trains_on_every_completion_once_behind_its_own_scores(tmp_path: Path) -> None:
    rows = answers()
    found, dropped = sequences(tmp_path, fitted_method(tmp_path, rows, "ric"))
    tokenizer = build_tiny_tokenizer()
    assert sorted(ids for _, ids in found) == sorted(ids for ids, _ in completions(rows).values())
    assert dropped["duplicate"] == 2 * len(rows) - len(found) == 9
    assert all("<rm2_score>" in tokenizer.decode(prompt) for prompt, _ in found)
    assert len({tuple(prompt) for prompt, _ in found}) > 3  # the same question behind other scores


def test_ric_without_its_scores_is_sft_on_every_completion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = answers()
    method = fitted_method(tmp_path, rows, "ric")
    monkeypatch.setattr(RiC, "render", Method.render)
    bare, _ = sequences(tmp_path, method)
    chat = Chat(build_tiny_tokenizer(), model="tiny")
    asked = {row["prompt_id"]: chat.prompt_ids(row["prompt"]) for row in rows}
    assert sorted(bare) == sorted((asked[p], ids) for (p, _), (ids, _) in completions(rows).items())
    inputs = LossInputs(torch.tensor([-3.0, -8.0]), torch.tensor([2, 5]), torch.tensor([[1], [0]]), torch.ones(2))
    sft = method_of(train_section({"method": "sft"}))
    assert torch.equal(method.loss(inputs)[0], sft.loss(inputs)[0])


@pytest.mark.parametrize("preference", [{}, {"helpful": 3.0, "harmless": 1.0}], ids=str)
def test_ric_asks_for_each_reward_by_its_share_of_the_preference(tmp_path: Path, preference: dict[str, float]) -> None:
    method = fitted_method(tmp_path, answers(), "ric", preference=preference)
    Beside(method.state).write(tmp_path, method.config)
    loaded = method_of_folder(tmp_path)
    assert loaded is not None
    wanted = loaded.wanted()
    assert wanted is not None
    z = (np.array(wanted) - method.state["mean"]) / method.state["std"]
    draws = np.random.default_rng(0).standard_normal((50_000, 2))
    low, high = draws.min(axis=0), draws.max(axis=0)
    weights = np.array([1.0, 3.0]) if preference else np.array([1.0, 1.0])
    np.testing.assert_allclose(z, weights / np.sqrt((weights**2).sum()) * (high - low) + low)
    assert (z < high).all()


def test_an_objective_that_never_differs_and_an_unknown_preference_are_refused(tmp_path: Path) -> None:
    rows = [{**row, "chosen_scores": [5.0, 1.0 + i], "rejected_scores": [5.0, 9.0]} for i, row in enumerate(answers())]
    with pytest.raises(InputError, match=r"ric: every answer has harmless 5; leave it out"):
        fitted_method(tmp_path, rows, "ric")
    with pytest.raises(InputError, match=r"train\.preference: 'kind' is not one of the objectives"):
        fitted_method(tmp_path, answers(), "ric", preference={"kind": 1})


# --- CPO ------------------------------------------------------------------------------------------------------------


def test_cpo_writes_raw_ratings_in_front_and_asks_for_the_highest(tmp_path: Path) -> None:
    method = fitted_method(tmp_path, answers(), "cpo")
    said = method.render([*ASKED, {"role": "assistant", "content": "No."}, *ASKED], [5.0, 3.5], method.state)
    assert [turn["content"] for turn in said] == ["May I?", "No.", "< harmless: 5 > < helpful: 3.5 > May I?"]
    assert method.wanted() == [10.0, 10.0]
    assert method.render(ASKED, None, method.state) == ASKED


def test_cpo_looks_at_the_prompts_tokens_unless_it_is_told_not_to(tmp_path: Path) -> None:
    rows = answers()
    behind, _ = sequences(tmp_path, fitted_method(tmp_path, rows, "cpo", train_on_inputs=False))
    every, _ = sequences(tmp_path, fitted_method(tmp_path, rows, "cpo"))
    assert sorted(ids for _, ids in behind) == sorted(ids for ids, _ in completions(rows).values())
    assert sorted(p + r for p, r in every) == sorted(p + r for p, r in behind)
    assert {len(prompt) for prompt, _ in every} == {1}


@pytest.mark.parametrize("name", ["ric", "cpo"])
@pytest.mark.parametrize("scores", [[float("nan"), 5.0], [11.0, 5.0], [5.0]], ids=str)
def test_scores_of_either_answer_that_mean_nothing_are_refused(tmp_path: Path, name: str, scores: list[float]) -> None:
    rows = answers()
    rows[2]["rejected_scores"] = scores
    with pytest.raises(InputError, match=r"pair 'p0:1:2': rejected_scores: ") as error:
        fitted_method(tmp_path, rows, name)
    assert "\n" not in str(error.value)


def test_an_arm_of_every_completion_brings_the_pairs_that_have_them() -> None:
    raw = {"model": {"path": "org/some-8B"}, "pairs": {"order": "composite", "delta": 2}}
    arms = {"spa": {}, "ric": {"train.method": "ric"}, "cpo": {"train.method": "cpo", "pairs.delta": 1}}
    configs = arm_configs({**raw, "arms": arms}, [], where="test", stem="test")
    assert (configs["ric"].pairs.order, configs["ric"].pairs.delta) == ("lex", 1e-6)
    assert (configs["spa"].pairs.order, configs["cpo"].pairs.delta) == ("composite", 1)
    assert configs["ric"].denoise.consistency == "off"


# --- MODPO ----------------------------------------------------------------------------------------------------------

THREE = {"objectives": ["a", "b", "c"], "ranges": None}


def modpo(weights: dict[str, float], **settings: Any) -> Any:
    method: Any = method_of(train_section({"method": "modpo", "weights": weights, **settings}))
    method.state = {**THREE, "shares": method.shares(THREE["objectives"])}
    return method


def inputs_of(others: tuple[str, ...] = ()) -> LossInputs:
    torch.manual_seed(0)

    def logps() -> Tensor:
        return -20 * torch.rand(6, dtype=torch.float64)

    return LossInputs(
        logps().requires_grad_(),
        counts=torch.randint(1, 9, (6,)),
        sides=torch.tensor([[0, 1], [2, 3], [5, 4]]),
        weights=torch.ones(3, dtype=torch.float64),
        reference=logps(),
        others={name: logps() for name in others},
    )


def test_modpos_loss_and_gradient_are_those_written_out() -> None:
    method, beta = modpo({"a": 1, "b": 2, "c": 5}, beta=0.3), 0.3
    inputs = inputs_of(("margin_b", "margin_c"))
    losses, stats = method.loss(inputs)
    assert inputs.reference is not None
    wanted = []
    for chosen, rejected in inputs.sides.tolist():

        def rise(logps: Tensor, chosen: int = chosen, rejected: int = rejected) -> Tensor:
            assert inputs.reference is not None
            return beta * ((logps - inputs.reference)[chosen] - (logps - inputs.reference)[rejected])

        margin = 2 / 8 * rise(inputs.others["margin_b"]) + 5 / 8 * rise(inputs.others["margin_c"])
        wanted.append(-logsigmoid((rise(inputs.summed) - margin) / (1 / 8)))
    truth = torch.stack(wanted)
    torch.testing.assert_close(losses, truth, rtol=0, atol=1e-12)
    found, wanted_gradient = (
        torch.autograd.grad(x.sum(), inputs.summed, retain_graph=True)[0] for x in (losses, truth)
    )
    torch.testing.assert_close(found, wanted_gradient, rtol=0, atol=1e-12)
    assert set(stats) == set(method.stats)


def test_modpo_with_all_weight_on_the_first_objective_is_dpo() -> None:
    method = modpo({"a": 3.0}, beta=0.2)
    assert method.recipe(THREE["objectives"]) == {}
    inputs = inputs_of()
    dpo, _ = method_of(train_section({"method": "spa_dpo", "beta": 0.2})).loss(inputs)
    assert torch.equal(method.loss(inputs)[0], dpo)


def test_modpo_turns_a_pair_by_the_first_objective_and_leaves_out_its_ties(tmp_path: Path) -> None:
    rows = pair_rows(3)
    for row, (chosen, rejected) in zip(rows, [([5, 1], [4, 9]), ([4, 9], [5, 1]), ([5, 9], [5, 1])], strict=True):
        row["chosen_scores"], row["rejected_scores"] = chosen, rejected
    method = fitted_method(tmp_path, rows, "modpo")
    chat = Chat(build_tiny_tokenizer(), model="tiny")
    out = tmp_path / "tokens.arrow"
    dropped = tokenize_pairs(
        tmp_path / "pairs.parquet", out, chat, vocab_size=265, max_length=512, gap="abs_sum", method=method
    )
    data = TokenizedPairs(out)
    assert dropped["no_example"] == 1
    assert len(data) == 2
    assert data.ids("chosen_ids", 0).tolist() == rows[0]["chosen_ids"]
    assert data.ids("chosen_ids", 1).tolist() == rows[1]["rejected_ids"]
    assert objectives_in(tmp_path / "pairs.parquet") == list(OBJECTIVES)


def arms(**of: Any) -> dict[str, Config]:
    raw = {
        "model": {"path": "org/some-8B"},
        "arms": {name: {"train.method": "modpo", **keys} for name, keys in of.items()},
    }
    return arm_configs(raw, [], where="test", stem="test")


def test_margin_models_are_stages_that_arms_of_other_weights_share() -> None:
    half = {"train.weights": {"harmless": 1, "helpful": 1}}
    configs = arms(
        equal={},
        half=half,
        most={"train.weights": {"harmless": 9, "helpful": 1}},
        all={"train.weights": {"harmless": 1}},
    )
    stages = {
        (stage.stage, arm.partition(":")[0]): stage.key for stage in planned_stages(configs) for arm in stage.arms
    }
    margins = [stages["train:margin_helpful", arm] for arm in ("equal", "half", "most")]
    assert len(set(margins)) == 1
    assert ("train:margin_helpful", "all") not in stages
    assert len({stages["train", arm] for arm in configs}) == 4


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        ({"helpful": 1.0}, r"train\.weights: harmless, the first objective, is what is trained; give it a weight"),
        ({"harmless": 0.0, "helpful": 1.0}, r"train\.weights: harmless, the first objective"),
        ({"harmless": 1.0, "kind": 1.0}, r"train\.weights: 'kind' is not one of the objectives"),
        ({"harmless": 0.0}, r"train\.weights: all are 0"),
        ({"harmless": -1.0}, r"train\.weights.*0 or more"),
    ],
)
def test_weights_that_leave_nothing_to_train_are_refused_in_a_plan(weights: dict[str, float], told: str) -> None:
    with pytest.raises(InputError, match=told) as error:
        planned_stages(arms(main={"train.weights": weights}))
    assert "\n" not in str(error.value)
