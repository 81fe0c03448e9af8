"""Reading a judge: what is not plainly a score on the scale is a failure, and a failure never becomes a number."""

from __future__ import annotations

import asyncio
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spa_ray.config.rollout import Scoring
from spa_ray.engine.scripted import ScriptedTokenizer
from spa_ray.errors import InputError
from spa_ray.generation.judging import (
    ParseFailure,
    Score,
    Truncated,
    compile_pattern,
    expected_score,
    judge_labels,
    read_choice,
    read_number,
    read_pattern,
)
from spa_ray.rollout.chat import Chat
from tests.scripted import play, prompt, scripted_config, scripted_episodes
from tests.tiny_model import build_tiny_tokenizer

SCALE = (1, 10)
BRACKETS = re.compile(r"\[\[(\d+)\]\]")


@given(st.integers(-1000, 1000))
def test_a_whole_number_is_a_score_exactly_when_it_is_on_the_scale(value: int):
    reading = read_number(f" {value}\n", SCALE)
    assert (reading == Score(float(value))) == (1 <= value <= 10)
    assert isinstance(reading, Score | ParseFailure)


@pytest.mark.parametrize("text", ["ten", "47/5", "7/10", "7.5", "7 out of 10", "", "1e1", "٧", "NaN", "[[7]]", "7 8"])
def test_anything_else_is_a_failure_to_read(text: str):
    assert isinstance(read_number(text, SCALE), ParseFailure)


@given(st.text())
def test_no_text_is_read_as_a_number_off_the_scale(text: str):
    for reading in (read_number(text, SCALE), read_pattern(text, re.compile(r"(\d+)"), SCALE, finished=True)):
        assert not isinstance(reading, Score) or 1 <= reading.value <= 10


@given(st.integers(1, 10), st.text(alphabet="abc [](/.\n"), st.text(alphabet="abc [](/.\n"))
def test_a_bracketed_score_is_found_in_any_free_text(value: int, before: str, after: str):
    assert read_pattern(f"{before}[[{value}]]{after}", BRACKETS, SCALE, finished=True) == Score(float(value))


@pytest.mark.parametrize("text", ["[[47]]", "[[0]]", "[[ten]]", "47/5", "[[3]] or [[4]]", "Rating: 7"])
def test_free_text_without_one_score_on_the_scale_is_a_failure(text: str):
    assert isinstance(read_pattern(text, BRACKETS, SCALE, finished=True), ParseFailure)


def test_the_same_score_twice_is_one_score():
    assert read_pattern("[[7]] ... Rating: [[7]]", BRACKETS, SCALE, finished=True) == Score(7.0)


def test_a_judgement_that_was_cut_is_no_score():
    assert read_pattern("Rating: [[1", BRACKETS, SCALE, finished=False) == Truncated()
    assert read_pattern("Rating: 1", re.compile(r"(\d+)"), SCALE, finished=False) == Truncated()
    assert read_pattern("Rating: [[7]] beca", BRACKETS, SCALE, finished=False) == Score(7.0)


def test_a_constrained_one_that_was_cut_may_have_been_a_ten():
    choices = [str(k) for k in range(1, 11)]
    assert read_choice("1", choices, SCALE, finished=False) == Truncated()
    assert read_choice("", choices, SCALE, finished=False) == Truncated()
    assert read_choice("7", choices, SCALE, finished=False) == Score(7.0)
    assert read_choice("1", choices, SCALE, finished=True) == Score(1.0)


@given(st.lists(st.floats(0.001, 1), min_size=9, max_size=9), st.floats(0.05, 1))
def test_an_expected_score_is_the_mean_over_the_labels_and_keeps_the_mass_off_the_scale(raw: list[float], on: float):
    masses = [on * m / sum(raw) for m in raw]
    reading = expected_score([math.log(m) for m in masses], (1, 9))
    assert isinstance(reading, Score)
    assert reading.value == pytest.approx(sum(k * m for k, m in enumerate(masses, start=1)) / sum(masses))
    assert 1 <= reading.value <= 9
    assert reading.off_scale == pytest.approx(1 - on, abs=1e-9)


@pytest.mark.parametrize("logprobs", [[-math.inf] * 9, [math.nan] * 9, [0.0] * 9])
def test_no_mass_or_impossible_mass_is_no_expected_score(logprobs: list[float]):
    assert isinstance(expected_score(logprobs, (1, 9)), ParseFailure)


def test_expected_mode_needs_one_token_labels_and_says_what_to_do():
    with pytest.raises(InputError, match=r"2 tokens of '10'; use scoring.scale=\[1, 9\]"):
        judge_labels(Chat(ScriptedTokenizer(), model="m"), Scoring(mode="expected"))
    tiny = build_tiny_tokenizer()
    labels = judge_labels(Chat(tiny, model="m"), Scoring(mode="expected"))
    assert labels.single == tuple(tiny.convert_tokens_to_ids(str(k)) for k in range(1, 11))


@pytest.mark.parametrize(("pattern", "message"), [("(", "not a regular expression"), (r"\d+", "needs a group")])
def test_a_pattern_that_cannot_work_is_refused(pattern: str, message: str):
    with pytest.raises(InputError, match=message):
        compile_pattern(pattern)


@pytest.mark.parametrize("mode", ["choice", "regex", "expected"])
def test_every_mode_scores_every_response_once_an_objective(mode: str):
    row = play(scripted_config(scoring={"mode": mode, "scale": [1, 9], "max_tokens": 40}))
    assert row["error"] is None
    assert [r["score_status"] for r in row["responses"]] == [["ok", "ok"]] * 6
    for response in row["responses"]:
        assert all(1 <= score <= 9 for score in response["scores"])
        assert [x is None for x in response["off_scale"]] == [mode != "expected"] * 2
        if mode == "expected":
            assert response["off_scale"] == pytest.approx([0.1, 0.1])


def test_a_judge_that_cannot_be_read_leaves_nulls_and_no_refined_answer():
    row = play(scripted_config({"unreadable": 1.0}, scoring={"mode": "regex", "max_tokens": 40}))
    assert row["error"] is None
    assert [r["kind"] for r in row["responses"]] == ["candidate"] * 5  # nothing was scored, so nothing is refined
    for response in row["responses"]:
        assert response["scores"] == [None, None]
        assert response["score_draws"] == [[None], [None]]
        assert all(status.startswith("parse_failure") for status in response["score_status"])
        assert response["judge_texts"] == ["Rating: [[ten]]"] * 2


def test_a_judgement_that_cannot_be_read_is_asked_again_with_another_seed():
    def unread(retries: int) -> int:
        script = {"unreadable": 0.5}
        row = play(scripted_config(script, scoring={"mode": "regex", "max_tokens": 40, "retries": retries}))
        return sum(s is None for scores in row["scores"] for s in scores)

    assert unread(0) > 0
    assert unread(12) == 0


def test_a_greedy_judge_is_not_asked_again():
    config = scripted_config({"unreadable": 1.0}, scoring={"mode": "regex", "max_tokens": 40, "temperature": 0})
    episodes, engine = scripted_episodes(config)
    asyncio.run(episodes.run(prompt()))
    assert engine.served == 5 + 5 * 2


def test_a_score_is_the_mean_of_its_draws():
    row = play(scripted_config(scoring={"draws": 4}))
    draws = [d for r in row["responses"] for d in r["score_draws"]]
    assert all(len(d) == 4 for d in draws)
    assert any(len(set(d)) > 1 for d in draws)  # each draw has its own seed
    assert [s for scores in row["scores"] for s in scores] == [sum(d) / 4 for d in draws]


def test_an_answer_too_long_for_the_judge_costs_that_answer_its_score_and_nothing_else():
    config = scripted_config(model={"max_model_len": 1000}, scoring={"prompt": "{{ answer * 45 }}"})
    row = play(config)
    statuses = [s for r in row["responses"] for s in r["score_status"]]
    scores = [s for r in row["responses"] for s in r["scores"]]
    assert row["error"] is None
    assert {s.split(":")[0] for s in statuses} == {"ok", "too_long"}
    assert all((s is None) == status.startswith("too_long") for s, status in zip(scores, statuses, strict=True))


def test_a_function_judges_by_its_dotted_path_and_what_is_no_number_is_no_score():
    row = play(scripted_config(scoring={"judge": "tests.scripted:word_count"}))
    for response in row["responses"]:
        scorable = "moss" not in response["text"]
        expected = float(len(response["text"].split())) if scorable else None
        assert response["scores"] == [expected, expected]
        assert response["score_status"][0].startswith("ok" if scorable else "parse_failure")
