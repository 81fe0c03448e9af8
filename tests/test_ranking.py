"""Scores by comparison: every two candidates in both orders, and the refined answer against the best of them."""

from __future__ import annotations

import asyncio
from typing import Any

import pyarrow as pa
import pytest

from spa_ray.config.models import Config
from spa_ray.data.schemas import EPISODES
from spa_ray.engine.protocol import Completion, Request
from spa_ray.errors import InputError
from spa_ray.generation.judging import Compared
from spa_ray.generation.pairwise import Question, Verdict
from spa_ray.generation.ranking import Ranker
from spa_ray.generation.setup import Task, check_generation
from spa_ray.objectives import load_objectives
from tests.scripted import WEIGHTS, play, prompt, scripted_config, scripted_episodes

COMPARE = {"mode": "choice"}


def words(messages: Any, meta: Any, answer: str, objective: str) -> float:
    """A judge function."""
    return float(len(answer.split()))


def config(**scoring: Any) -> Config:
    return scripted_config(sampling={"n": 4}, scoring={"compare": COMPARE, **scoring})


class Longer:
    """The longer answer is better; `biased` judges prefer what is shown first, `deaf` ones fail at a word."""

    def __init__(self, *, biased: bool = False, deaf: str = "nothing") -> None:
        self.biased, self.deaf, self.asked = biased, deaf, []

    async def compare(self, item: Question, a: str, b: str) -> Verdict:
        self.asked.append((item.objective.name, a, b, item.seed_of(0)))
        if self.deaf in (a, b):
            return Verdict(None, "what?", "parse_failure: no verdict", 3, 1)
        winner = "a" if self.biased else "tie" if len(a) == len(b) else "a" if len(a) > len(b) else "b"
        return Verdict(winner, winner, "ok", 3, 1)  # type: ignore[arg-type]


def seed_of(index: int, objective: str, draw: int, attempt: int) -> int:
    return hash((index, objective, draw, attempt))


ASKED = Compared([{"role": "user", "content": "How?"}], "{}", seed_of)


def ranked(judge: Longer, *answers: str) -> list[list[float | None]]:
    ranker = Ranker(judge, load_objectives(config()), (1, 11))
    found = asyncio.run(ranker.rank(ASKED, dict(enumerate(answers))))
    return [[j.score for j in found[index]] for index in range(len(answers))]


def test_a_score_is_how_many_others_an_answer_beats() -> None:
    judge = Longer()
    assert ranked(judge, "aa", "a", "aaaa", "aaa") == [[5, 5], [3, 3], [9, 9], [7, 7]]  # 1, 0, 3, 2 wins of 3
    assert ranked(Longer(), "aa", "bb", "a", "c") == [[8, 8], [8, 8], [4, 4], [4, 4]]  # two wins and a tie
    assert len(judge.asked) == len(set(judge.asked)) == 6 * 2 * 2
    assert len({seed for *_, seed in judge.asked}) == len(judge.asked)


def test_a_judge_that_prefers_what_it_sees_first_finds_ties() -> None:
    assert ranked(Longer(biased=True), "aa", "a", "aaa") == [[6, 6]] * 3


def test_a_failed_comparison_is_a_score_of_neither() -> None:
    assert ranked(Longer(deaf="b"), "aa", "b", "aaa") == [[None, None]] * 3
    ranker = Ranker(Longer(deaf="b"), load_objectives(config()), (1, 11))
    (failed, _) = asyncio.run(ranker.rank(ASKED, {0: "b", 2: "aa"}))[2]
    assert failed.status == "parse_failure: no verdict"
    assert failed.text == "against 0: what? | what?"


def test_an_answer_without_another_has_no_score() -> None:
    assert ranked(Longer(), "aa") == [[None, None]]


@pytest.mark.parametrize(("answer", "score"), [("aaaaa", 11.0), ("bbbb", 9.0), ("a", 7.0)])
def test_a_further_answer_is_a_point_above_or_below_the_best(answer: str, score: float) -> None:
    ranker = Ranker(Longer(), load_objectives(config()), (1, 11))
    found = asyncio.run(ranker.place(ASKED, 4, answer, 2, "aaaa", [9.0, 9.0], 4))
    assert [j.score for j in found] == pytest.approx([score, score])
    assert sum(j.prompt_tokens for j in found) == 2 * 2 * 3


def test_an_episode_is_scored_by_comparisons_in_the_judges_place() -> None:
    row = play(config(judge="tests.test_ranking:words"))
    assert pa.Table.from_pylist([row], schema=EPISODES).to_pylist() == [row]
    *candidates, refined = row["responses"]
    counts = [len(r["text"].split()) for r in candidates]
    for mine, response in zip(counts, candidates, strict=True):
        points = sum(mine > other for other in counts) + 0.5 * (counts.count(mine) - 1)
        assert response["scores"] == pytest.approx([1 + 9 * (points + 1) / 5] * 2)
    best = max(candidates, key=lambda r: sum(r["scores"]))
    longer = len(refined["text"].split()) - len(best["text"].split())
    step = 9 / 5 * ((longer > 0) - (longer < 0))
    assert refined["scores"] == pytest.approx([score + step for score in best["scores"]])
    assert refined["judge_texts"][0].startswith(f"against {best['index']}: ")


def test_a_model_is_asked_in_both_orders_with_a_seed_each_and_its_tokens_are_counted() -> None:
    episodes, engine = scripted_episodes(config())
    counted: list[tuple[Request, int]] = []
    answer = engine.generate

    async def counting(request: Request) -> Completion:
        completion = await answer(request)
        counted.append((request, len(completion.token_ids)))
        return completion

    engine.generate = counting  # type: ignore[method-assign]
    row = asyncio.run(episodes.run(prompt()))
    assert row["error"] is None
    verdicts = [request for request, _ in counted if request.choices]
    assert len(verdicts) == 6 * 2 * 2 + 2 * 2
    assert {request.choices for request in verdicts} == {("A", "B", "C")}
    assert len({request.seed for request in verdicts}) == len(verdicts)
    assert row["prompt_tokens"] == sum(len(request.prompt_ids) for request, _ in counted)
    assert row["generated_tokens"] == sum(tokens for _, tokens in counted)


def test_an_evaluation_is_scored_one_by_one() -> None:
    row = play(config(judge="tests.test_ranking:words"), task=Task("answer"))
    assert row["scores"] == [[len(row["responses"][0]["text"].split())] * 2]


def test_a_wrong_prompt_is_told_before_anything_starts() -> None:
    wrong = config(compare={"prompt": "{{ answer }}"})
    with pytest.raises(InputError, match=r"scoring\.compare\.prompt: there is no variable 'answer' here"):
        check_generation(wrong, WEIGHTS)
