"""Judge texts by the thousand: a failure never becomes a number, and nothing off the scale is a score."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_ray.config.rollout import Scoring
from spa_ray.engine.protocol import Completion, Request
from spa_ray.engine.scripted import ScriptedTokenizer
from spa_ray.errors import InputError
from spa_ray.generation.judging import Item, Judgement, ModelJudge, Score, expected_score, read_pattern
from spa_ray.generation.setup import check_generation
from spa_ray.generation.templates import Templates
from spa_ray.objectives import load_objectives
from spa_ray.rollout.chat import Chat
from tests.examples import examples
from tests.scripted import WEIGHTS, play, scripted_config

SCALE = (1, 10)
LABELS = {str(k) for k in range(1, 11)}
NUMBERS = st.one_of(st.integers(-99, 99).map(str), st.sampled_from(["ten", "7.5", "N/A", "", "07", "1e1", "٧", "∞"]))
SHAPES = st.sampled_from(
    ["{}", "[[{}]]", "Rating: [[{}]]", "[[{}]]/10", "{}/5", "[[{}", "[{}]", "Scores: [[{}]] [[{}]]", "\n\n[[{}]]\n\n"]
)
JUDGE_TEXTS = st.builds(
    lambda parts, shape, number: " ".join([*parts, shape.replace("{}", number)]),
    st.lists(st.text(max_size=12), max_size=3),
    SHAPES,
    NUMBERS,
) | st.text(max_size=40)


class Saying:
    """An engine that always answers with the given texts, in turn."""

    max_model_len = 10_000

    def __init__(self, answers: Sequence[Completion]) -> None:
        self.tokenizer = ScriptedTokenizer()
        self.asked: list[Request] = []
        self._answers = answers

    async def generate(self, request: Request) -> Completion:
        self.asked.append(request)
        return self._answers[(len(self.asked) - 1) % len(self._answers)]


def judgement(answers: Sequence[Completion], **scoring: object) -> tuple[Judgement, Saying]:
    config = scripted_config()
    templates = Templates(config, load_objectives(config))
    engine = Saying(answers)
    judge = ModelJudge(engine, Chat(engine.tokenizer, model="m"), templates, Scoring(**scoring))
    question = [{"role": "user", "content": "?"}]
    item = Item(question, "{}", "!", templates.objectives[:1], lambda _, draw, again: 10 * draw + again)
    return asyncio.run(judge.score(item))[0], engine


def said(text: str, reason: str = "stop") -> Completion:
    return Completion(text, [0], reason)


@settings(max_examples=examples(10_000), deadline=None)
@given(JUDGE_TEXTS, st.booleans())
def test_only_one_bracketed_whole_number_on_the_scale_is_a_score(text: str, finished: bool) -> None:
    reading = read_pattern(text, re.compile(r"\[\[(\d+)\]\]"), SCALE, finished=finished)
    bracketed = set(re.findall(r"\[\[([^\[\]]*)\]\]", text))
    if isinstance(reading, Score):
        assert reading.value in range(1, 11)
        assert str(int(reading.value)) in {b.lstrip("0") for b in bracketed}
    else:
        assert not (len(bracketed) == 1 and bracketed <= LABELS)


@settings(max_examples=examples(300), deadline=None)
@given(
    st.sampled_from(["choice", "regex"]),
    st.lists(st.builds(said, JUDGE_TEXTS, st.sampled_from(["stop", "length"])), min_size=1, max_size=4),
    st.integers(1, 3),
)
def test_a_judgement_has_a_score_exactly_when_every_draw_has_one(
    mode: str, answers: list[Completion], draws: int
) -> None:
    found, _ = judgement(answers, mode=mode, draws=draws, retries=1)
    assert (found.score is None) == (found.status != "ok") == (None in found.draws)
    if found.score is not None:
        assert len(found.draws) == draws
        assert 1 <= found.score <= 10
        assert found.score == pytest.approx(sum(d for d in found.draws if d is not None) / draws)


def test_every_draw_and_every_retry_has_a_seed_of_its_own() -> None:
    _, engine = judgement([said("ten"), said("7"), said("ten"), said("8")], draws=2, retries=1)
    assert [request.seed for request in engine.asked] == [0, 1, 10, 11]


def test_a_judgement_that_stays_unreadable_says_so_and_keeps_the_text() -> None:
    found, engine = judgement([said("47/5")], mode="regex", retries=2)
    assert len(engine.asked) == 3
    assert (found.score, found.draws, found.text) == (None, [None], "47/5")
    assert found.status == "parse_failure: no score in '47/5'"


def test_a_judgement_cut_before_its_score_is_called_truncated() -> None:
    found, _ = judgement([said("Let me think about", "length")], mode="regex", retries=0)
    assert found.status.startswith("truncated: ")


@settings(max_examples=examples(2_000), deadline=None)
@given(st.lists(st.one_of(st.just(-math.inf), st.floats(-30, 0)), min_size=9, max_size=9))
def test_an_expected_score_never_leaves_the_scale(logprobs: list[float]) -> None:
    reading = expected_score(logprobs, (1, 9))
    if isinstance(reading, Score):
        assert 1 <= reading.value <= 9
        assert reading.off_scale is not None
        assert 0 <= reading.off_scale <= 1
    else:
        assert not 0 < math.fsum(map(math.exp, logprobs)) <= 1


def test_rounding_does_not_lift_an_expected_score_off_the_scale() -> None:
    reading = expected_score([-math.inf] * 6 + [-1.234626912374349], (1, 7))
    assert isinstance(reading, Score)
    assert reading.value == 7.0


@settings(max_examples=examples(20), deadline=None)
@given(st.floats(0.05, 0.95), st.integers(0, 99))
def test_in_a_whole_episode_a_failed_judgement_is_null_wherever_a_score_would_stand(share: float, seed: int) -> None:
    row = play(scripted_config({"unreadable": share}, seed=seed, scoring={"mode": "regex", "max_tokens": 40}))
    assert row["error"] is None
    for response, scores in zip(row["responses"], row["scores"], strict=True):
        assert response["scores"] == scores
        for score, status in zip(scores, response["score_status"], strict=True):
            assert (score is None) == (status != "ok")
            assert score is None or score in range(1, 11)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"scoring": {"pattern": r"\d+"}}, "scoring.pattern: needs a group"),
        ({"scoring": {"prompt": "{{ nothing }}"}}, "no variable 'nothing'"),
        ({"evaluation": {"judge": "tests.scripted:WEIGHTS"}}, "a judge is a function"),
        ({"evaluation": {"judge": "tests.scripted:absent"}}, "has no 'absent'"),
    ],
)
def test_mistakes_that_need_no_engine_are_found_before_one_starts(sections: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_generation(scripted_config(**sections), WEIGHTS)


def test_a_model_folder_judges_no_generation() -> None:
    with pytest.raises(InputError, match=r"judge: 'somebody' would take the policy's place; serve it as an endpoint"):
        scripted_config(scoring={"judge": "somebody"})
