"""Measures of answers that should have certain scores, against what is written out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spa_ray.data.schemas import episodes_schema, with_attributes, with_ranges
from spa_ray.evaluation.agreement import spearman
from spa_ray.evaluation.answers import read_answers
from spa_ray.evaluation.bootstrap import mean_interval
from spa_ray.evaluation.tables import Answers, arm_metrics, cell
from spa_ray.evaluation.wishes import (
    best_constant,
    error_shares,
    fit_wins,
    measures,
    wins,
)

NAN = math.nan
NAMES = ("harmless", "bold")
B = {"resamples": 200, "seed": 3}
SCORES = np.array([[0.9, 0.5], [0.4, 0.5], [NAN, NAN]])
REFERENCE = np.array([[0.5, 0.5], [0.6, 0.1], [0.1, 0.1]])
WISH = np.array([[0.6, 0.5], [0.5, 1.0], [0.5, 0.5]])


def test_a_tie_is_no_win_and_what_was_not_scored_is_no_loss() -> None:
    assert wins(SCORES, REFERENCE).tolist()[:2] == [[1, 0], [0, 1]]
    assert np.isnan(wins(SCORES, REFERENCE)[2]).all()


def test_a_win_by_fit_is_closer_to_the_wish_than_the_reference_is() -> None:
    # .3 against .1; both 0; both .125; .5 against .9
    found = fit_wins(np.array([[0.9, 0.5], [0.375, 0.5]]), np.array([[0.5, 0.5], [0.625, 0.1]]), WISH[:2])
    assert found.tolist() == [[0, 0], [0, 1]]


def test_win_rates_are_macro_averages_over_the_objectives() -> None:
    found = measures(SCORES, {"reference_scores": REFERENCE, "wish": WISH}, NAMES)
    np.testing.assert_allclose(found["win rate"], [0.5, 0.5, NAN])
    np.testing.assert_allclose(found["win rate: bold"], [0, 1, NAN])
    np.testing.assert_allclose(found["off wish"], [0.15, 0.3, NAN])
    assert "off asked" not in found


def test_sensed_scores_are_compared_with_the_medians_on_prompts_with_a_cue() -> None:
    truth = np.array([[0.0, 0.4], [0.5, 0.4], [1.0, 0.8], [0.3, 0.3]])
    beside = {
        "sensed": np.array([[0.1, 0.4], [0.5, 0.6], [0.6, 0.8], [0.9, 0.9]]),
        "scores": truth,
        "cues": np.array([[1, NAN], [NAN, -1], [1, 1], [NAN, NAN]]),
    }
    found = measures(np.zeros((4, 2)), beside, NAMES)
    np.testing.assert_allclose(found["sensing error"], [0.05, 0.1, 0.2, NAN])
    np.testing.assert_allclose(found["constant error"], [0.25, 0.0, 0.45, NAN])  # of (.5, .4)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.floats(0, 1))
def test_no_constant_has_a_smaller_absolute_error(values: list[float], other: float) -> None:
    truth = np.array(values)[:, None]
    assert np.abs(truth - best_constant(truth)).mean() <= np.abs(truth - other).mean() + 1e-12


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5)), min_size=3, max_size=30))
def test_the_rank_correlation_is_that_of_mean_ranks(pairs: list[tuple[int, int]]) -> None:
    levels, values = (np.array(column, dtype=float) for column in zip(*pairs, strict=True))
    found = spearman(levels, values)
    if len(set(levels)) == 1 or len(set(values)) == 1:
        assert math.isnan(found)
    else:
        ranks = [[sum(b < a for b in c) + (sum(b == a for b in c) + 1) / 2 for a in c] for c in (levels, values)]
        assert found == pytest.approx(np.corrcoef(ranks)[0, 1])


def test_error_shares_are_of_all_prompts_and_objectives() -> None:
    sensed, truth = np.array([[0.05, 0.5], [1.0, NAN]]), np.array([[0.0, 0.25], [0.0, 0.3]])
    third = 1 / 3
    assert error_shares(sensed, truth) == [third, 0, third, 0, 0, 0, 0, 0, 0, third]


def answers(scores: list[list[float]], **beside: list[dict[str, float]]) -> Answers:
    n = len(scores)
    return Answers(
        [f"p{i}" for i in range(n)], np.array(scores), np.ones(n, dtype=int), np.zeros(n, dtype=bool), beside=beside
    )


def test_an_arm_is_compared_in_what_both_have() -> None:
    reference = [{"harmless": 0.5, "bold": 0.5}, {"harmless": 0.5}]
    plain = answers([[0.6, 0.4], [0.6, 0.6]], reference_scores=reference)
    asked = answers([[0.6, 0.6], [0.6, 0.6]], reference_scores=reference, asked=[{"harmless": 0.7, "bold": 0.6}, {}])
    found = arm_metrics({"vanilla": plain, "sga": asked}, objectives=NAMES, **B)
    assert found["vanilla"].means["win rate"] == mean_interval([0.5], **B)  # the other reference lacks a score
    assert found["sga"].differences["win rate: bold"].mean == 1
    assert found["sga"].means["off asked"].mean == pytest.approx(0.05)
    assert "off asked" not in found["sga"].differences
    assert cell("win rate: bold", found["sga"].means["win rate: bold"]) == "100.0 [100.0, 100.0] %"


def test_a_harmful_prompts_answer_is_unsafe_below_what_the_config_says() -> None:
    arms = {"a": answers([[0.4, 0.5], [0.6, 0.5]])}
    shared = {"objectives": NAMES, "categories": {"p0": "harmful", "p1": "harmful"}, "baseline": None, **B}
    assert arm_metrics(arms, unsafe_below=0.45, **shared)["a"].means["unsafe"].mean == 0.5  # type: ignore[arg-type]


def test_what_was_asked_is_read_in_the_scores_own_units(tmp_path: Path) -> None:
    meta = json.dumps({"family": "test", "wish": {"bold": 3.0, "harmless": "much"}, "cues": {}, "scores": [1, 2]})
    response = {"text": "x", "scores": [1.0, 2.0], "token_ids": [1]}
    row = {"prompt_id": "test/a", "meta": meta, "responses": [response], "sensed": None, "asked": [0.5, 1.0]}
    schema = with_ranges(with_attributes(episodes_schema(steered=True), ["bold", "harmless"]), [(0, 4), (1, 3)])
    pq.write_table(pa.Table.from_pylist([row], schema=schema), tmp_path / "part.parquet")
    beside = read_answers(tmp_path)["test"].answers.scores_beside(NAMES)
    assert beside["asked"].tolist() == [[3.0, 2.0]]
    np.testing.assert_array_equal(beside["wish"], [[NAN, 3.0]])
    assert set(beside) == {"asked", "wish"}
