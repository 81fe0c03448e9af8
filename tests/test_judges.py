"""Judges as a config names them, classes of one's own, and reward models."""

from __future__ import annotations

import asyncio
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from spa_ray.config import arm_configs
from spa_ray.config.judge import Reward, judge_section
from spa_ray.config.models import Config, named_plugs
from spa_ray.errors import InputError
from spa_ray.generation.judging import Item, Judgement
from spa_ray.generation.reward_judge import RewardJudge
from spa_ray.generation.setup import check_generation
from spa_ray.objectives import Objective
from spa_ray.pipeline.plan import make_plan
from spa_ray.pipeline.stages import STAGES
from tests.scripted import WEIGHTS, play, scripted_config

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
OBJECTIVES = tuple(Objective(name=name, principle="p", rubric="r") for name in ("harmless", "helpful"))
ANSWERS = ("Yes.", "No, I will not do that at all.", "Ask a warden first, then warm the spout with care.")


def config(**raw: Any) -> Config:
    return next(iter(arm_configs({"model": {"path": "none"}, **raw}, [], where="test", stem="test").values()))


# --- sections -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "kind"),
    [(None, "self"), ("self", "self"), ("base", "base"), ("my_file:judge", "function"), ("models/judge", "model")],
)
def test_short_forms_stand_for_sections(given: str | None, kind: str) -> None:
    assert judge_section(given).kind == kind


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"kind": "oracle"}, "kind is 'oracle'; one of"),
        ({"name": "a:b"}, "scoring.judge: kind is missing; give it one"),
        ({"kind": "function"}, "scoring.judge.name: missing; give it a value"),
        ({"kind": "function", "name": "a:b", "nme": 1}, "scoring.judge.nme: unknown key"),
        (
            {"kind": "reward", "path": "r", "batch_size": 0},
            "scoring.judge.batch_size: must be a whole number, 1 or more",
        ),
        ({"kind": "model", "path": "m"}, "would take the policy's place"),
    ],
)
def test_a_wrong_section_is_told_in_one_line(section: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError) as error:
        config(scoring={"judge": section})
    assert told in str(error.value)


def test_a_short_form_and_its_section_are_the_same_stage() -> None:
    forms = ["my_file:judge", {"kind": "function", "name": "my_file:judge"}]
    for stage, where in (("generate", "scoring"), ("evaluate", "evaluation")):
        assert len({STAGES[stage].key(config(**{where: {"judge": form}}), {}) for form in forms}) == 1


def test_judges_in_files_are_sent_to_other_machines() -> None:
    both = config(scoring={"judge": "mine:judge"}, evaluation={"judge": {"kind": "function", "name": "other:Judge"}})
    assert {"mine:judge", "other:Judge"} <= set(named_plugs(both))


def test_a_plan_asks_no_engine_for_what_a_function_scores() -> None:
    def requests(**scoring: Any) -> float:
        prompts = {"source": "hf://org/saferlhf", "limit": 10}
        raw = {"model": {"path": "org/some-8B"}, "prompts": prompts, "scoring": scoring}
        plan = make_plan(arm_configs(raw, [], where="test", stem="test"))
        found: float = plan["stages"][0]["requests"]
        return found

    assert requests(judge="mine:judge") == 10 * (5 + 1)  # samples and the refinement
    assert requests() == 10 * (5 + 1 + 2 * (5 + 1))


# --- functions and classes ------------------------------------------------------------------------------------------


@pytest.fixture
def careful(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copy(EXAMPLES / "careful.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "careful", raising=False)
    return tmp_path


def test_a_class_scores_all_objectives_of_an_answer_at_once(careful: Path) -> None:
    judge = {"kind": "function", "name": "careful:Careful", "config": {"words": ["moss"]}}
    row = play(scripted_config(scoring={"judge": judge}))
    assert row["error"] is None
    for response in row["responses"]:
        words = response["text"].lower().split()
        assert response["scores"] == [5.0 + ("moss" in words), min(10.0, 1 + len(set(words)) / 3)]


def returning(careful: Path, what: str) -> dict[str, Any]:
    """The row of an episode whose judge, a class, returns this."""
    (careful / "careful.py").write_text(
        f"from spa_ray import Judge, Judgement\nclass Careful(Judge):\n    def score(self, item): return {what}\n"
    )
    return play(scripted_config(scoring={"judge": "careful:Careful"}))


@pytest.mark.parametrize("what", ["{'harmless': 11}", "[11, None]", "[Judgement(11.0), Judgement(float('nan'))]"])
def test_a_score_off_the_scale_or_missing_is_none(careful: Path, what: str) -> None:
    row = returning(careful, what)
    assert {score for response in row["responses"] for score in response["scores"]} == {None}
    assert {s.partition(":")[0] for r in row["responses"] for s in r["score_status"]} == {"parse_failure"}


def test_a_judgement_of_a_class_keeps_its_text_and_says_why_it_failed(careful: Path) -> None:
    row = returning(careful, "[Judgement(7.0, text='It asks first.'), Judgement(None, 'nobody is there', 'hm')]")
    for response in row["responses"]:
        assert response["scores"] == [7.0, None]
        assert response["score_draws"] == [[7.0], [None]]
        assert response["score_status"] == ["ok", "failed: nobody is there"]
        assert response["judge_texts"] == ["It asks first.", "hm"]


@pytest.mark.parametrize("what", ["7.0", "[7.0]", "None", "'77'"])
def test_what_is_no_score_for_each_objective_fails_the_prompt(careful: Path, what: str) -> None:
    assert returning(careful, what)["error"].startswith("internal: TypeError: careful:Careful returned ")


def test_keys_that_a_class_does_not_have_are_told_before_a_run(careful: Path) -> None:
    for section in ("scoring", "evaluation"):
        judge = {"kind": "function", "name": "careful:Careful", "config": {"word": 1}}
        with pytest.raises(InputError, match=rf"{section}\.judge\.config: word: unknown key; did you mean words"):
            check_generation(scripted_config(**{section: {"judge": judge}}), WEIGHTS)


def test_a_class_that_cannot_be_made_is_told_before_a_run(careful: Path) -> None:
    (careful / "careful.py").write_text(
        "from spa_ray import Judge\nclass Careful(Judge):\n    def __init__(self, config): open('words.txt')\n"
    )
    with pytest.raises(InputError, match=r"scoring\.judge: careful:Careful cannot be made \(FileNotFoundError"):
        check_generation(scripted_config(scoring={"judge": "careful:Careful"}), WEIGHTS)


def test_the_page_shows_the_class() -> None:
    code = (EXAMPLES / "careful.py").read_text().split('"""\n', 1)[1].strip()
    assert code in (EXAMPLES.parent / "JUDGES.md").read_text()


# --- reward models --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A classifier with two outputs and random weights on the tiny model's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path_factory.mktemp("reward")
    torch.manual_seed(3)
    shape = AutoConfig.from_pretrained(tiny_model, num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    shape.pad_token_id = tokenizer.pad_token_id or tokenizer.eos_token_id
    model = AutoModelForSequenceClassification.from_config(shape)
    model.score.weight.data.mul_(3)  # outputs that differ
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def item(answer: str) -> Item:
    return Item([{"role": "user", "content": "How do I clean it?"}], "{}", answer, OBJECTIVES, lambda *_: 0)


def scores(judge: RewardJudge, answers: tuple[str, ...] = ANSWERS) -> list[list[Judgement]]:
    async def all_of_them() -> list[list[Judgement]]:
        return list(await asyncio.gather(*(judge.score(item(answer)) for answer in answers)))

    return asyncio.run(all_of_them())


def plain(folder: Path, answer: str) -> list[float]:
    """One answer by transformers alone, without padding."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    said = [*item(answer).messages, {"role": "assistant", "content": answer}]
    ids = tokenizer.apply_chat_template(said, tokenize=True, return_dict=False, return_tensors="pt")
    with torch.no_grad():
        found: list[float] = model(ids).logits[0].tolist()
    return found


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_scores_are_the_models_outputs_in_any_batches(reward_model: Path, batch_size: int) -> None:
    judge = RewardJudge(Reward(kind="reward", path=str(reward_model), batch_size=batch_size))
    for answer, found in zip(ANSWERS, scores(judge), strict=True):
        assert [j.score for j in found] == pytest.approx(plain(reward_model, answer), rel=1e-5, abs=1e-5)
        assert [j.status for j in found] == ["ok", "ok"]


def test_attributes_and_a_transform_are_the_sections(reward_model: Path) -> None:
    section = Reward(kind="reward", path=str(reward_model), attributes={"harmless": 1, "helpful": 0}, sigmoid=True,
                     scale=(9.0, 1.0))  # fmt: skip
    ((harmless, helpful),) = scores(RewardJudge(section), ANSWERS[:1])
    outputs = plain(reward_model, ANSWERS[0])
    import math

    wanted = [9 / (1 + math.exp(-value)) + 1 for value in (outputs[1], outputs[0])]
    assert [harmless.score, helpful.score] == pytest.approx(wanted, abs=1e-4)
    assert harmless.score != helpful.score


def test_an_objective_without_an_output_fails_its_prompt(reward_model: Path) -> None:
    judge = RewardJudge(Reward(kind="reward", path=str(reward_model), attributes={"harmless": 0}))
    with pytest.raises(ValueError, match="2 outputs, and none for helpful"):
        scores(judge, ANSWERS[:1])


def test_a_prompt_that_is_given_up_holds_up_no_other(reward_model: Path) -> None:
    judge = RewardJudge(Reward(kind="reward", path=str(reward_model), batch_size=1))

    async def one_of_two() -> list[Judgement]:
        first = asyncio.ensure_future(judge.score(item(ANSWERS[0])))
        second = asyncio.ensure_future(judge.score(item(ANSWERS[1])))
        await asyncio.sleep(0)
        first.cancel()
        return await asyncio.wait_for(second, 30)

    assert [j.status for j in asyncio.run(one_of_two())] == ["ok", "ok"]


def test_a_folder_that_is_no_reward_model_is_told_before_a_run(tmp_path: Path) -> None:
    for section in ("scoring", "evaluation"):
        judge = {"kind": "reward", "path": str(tmp_path)}
        with pytest.raises(InputError, match=rf"{section}\.judge: {tmp_path}: no reward model here"):
            check_generation(scripted_config(**{section: {"judge": judge}}), WEIGHTS)


def test_a_reward_models_files_are_part_of_the_stage_and_its_device_is_not(reward_model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(reward_model, other)
    (other / "config.json").write_text((other / "config.json").read_text() + " ")

    def key(**judge: Any) -> str:
        section = {"kind": "reward", "path": str(reward_model), **judge}
        return STAGES["generate"].key(config(scoring={"judge": section}), {})

    assert key() == key(device="cuda", batch_size=2)
    assert len({key(), key(path=str(other)), key(sigmoid=True)}) == 3


def test_a_whole_episode_is_scored_by_a_reward_model(reward_model: Path) -> None:
    judge = {"kind": "reward", "path": str(reward_model)}
    row = play(scripted_config(scoring={"judge": judge}))
    assert row["error"] is None
    assert all(isinstance(score, float) for response in row["responses"] for score in response["scores"])
