"""Do judges agree: by hand, against pandas and a confusion matrix, and where a measure does not exist."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spa_ray.evaluation.agreement import (
    agreement,
    judges_agreement,
    quadratic_kappa,
    sign_accuracy,
    spearman,
    swap_consistency,
)
from spa_ray.evaluation.bootstrap import mean_interval, statistic_interval

NAN = math.nan
RATINGS = st.lists(st.tuples(st.integers(1, 10), st.integers(1, 10)), min_size=2, max_size=40)


def kappa_of_a_confusion_matrix(x: Any, y: Any) -> float:
    """Cohen's definition: observed and expected counts on the scale 1..10, weights (i - j)² / (k - 1)²."""
    observed = np.zeros((10, 10))
    for i, j in zip(x, y, strict=True):
        observed[i - 1, j - 1] += 1
    expected = np.outer(observed.sum(1), observed.sum(0)) / observed.sum()
    weights = np.subtract.outer(np.arange(10), np.arange(10)) ** 2 / 81
    return float(1 - (weights * observed).sum() / (weights * expected).sum())


@given(RATINGS)
def test_kappa_and_spearman_agree_with_independent_definitions(pairs: list[tuple[int, int]]) -> None:
    x, y = zip(*pairs, strict=True)
    if len({*x, *y}) > 1:
        assert quadratic_kappa(x, y) == pytest.approx(kappa_of_a_confusion_matrix(x, y), abs=1e-12)
    ranked = pd.DataFrame({"x": x, "y": y}).rank().corr().loc["x", "y"]
    assert spearman(x, y) == pytest.approx(ranked, abs=1e-9, nan_ok=True)


def test_kappa_by_hand() -> None:
    """x = 1 2 3, y = 1 3 3: observed (0 + 1 + 0) / 3; by chance var 2/3 + var 8/9 + (2 - 7/3)² = 15/9."""
    assert quadratic_kappa([1, 2, 3], [1, 3, 3]) == pytest.approx(1 - (1 / 3) / (15 / 9))
    assert quadratic_kappa([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)


def test_accuracy_leaves_golds_ties_out_and_counts_ours_half() -> None:
    """Gold's signs + - 0 +; ours + + + 0: right, wrong, left out, half."""
    assert sign_accuracy([2, 1, 1, 0], [5, -1, 0, 3]) == pytest.approx(1.5 / 3)


def test_what_does_not_exist_is_no_number() -> None:
    for value in (
        quadratic_kappa([4, 4], [4, 4]),
        spearman([4, 4], [1, 2]),
        sign_accuracy([1, -1], [0, 0]),
        swap_consistency([NAN], [1]),
        quadratic_kappa([], []),
    ):
        assert math.isnan(value)
    assert statistic_interval(spearman, [4, 4], [1, 2], resamples=5, seed=0) is None
    with pytest.raises(ValueError, match="two judgements of the same answers"):
        spearman([1, 2], [1, 2, 3])


def test_a_failed_judgement_is_left_out_of_every_measure() -> None:
    x, y = [1, 2, NAN, 5, 3], [1, 4, 9, NAN, 3]
    for measure in (quadratic_kappa, spearman, sign_accuracy, swap_consistency):
        assert measure(x, y) == measure([1, 2, 3], [1, 4, 3])


def test_swap_consistency_is_the_share_of_equal_verdicts() -> None:
    assert swap_consistency([1, 1, 0, -1, NAN], [1, -1, 0, 0, 1]) == 2 / 4


def test_a_prompt_without_a_judgement_is_not_counted() -> None:
    found = statistic_interval(swap_consistency, [1, 0, NAN, 1], [1, 1, 1, NAN], resamples=20, seed=0)
    assert found is not None
    assert (found.mean, found.n) == (0.5, 2)


def test_a_mean_by_any_statistic_is_the_mean_interval() -> None:
    values = np.arange(10.0)
    found = statistic_interval(lambda x: x.mean(), values, resamples=200, seed=3)
    assert found == mean_interval(values, resamples=200, seed=3)


def test_agreement_orders_the_answers_of_a_prompt() -> None:
    """Gold: first over second, equal, second over first; ours: alike, left out, the other way."""
    gold = np.array([[9.0, 2.0], [5.0, 5.0], [3.0, 4.0]])
    ours = np.array([[8.0, 7.0], [1.0, 9.0], [6.0, 5.0]])
    found = agreement(ours, gold, resamples=50, seed=0)
    assert found["accuracy"].mean == 0.5
    assert (found["n"], found["accuracy"].n) == (6, 3)
    assert found["kappa"].mean == pytest.approx(quadratic_kappa(ours.ravel(), gold.ravel()))
    alone = agreement(ours[:, :1], gold[:, :1], resamples=50, seed=0)
    assert alone["accuracy"] is None


def test_every_judge_is_held_against_every_other_and_against_length() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 50, (30, 2)).astype(float)
    exact, long = rng.integers(1, 11, (30, 2, 2)).astype(float), np.repeat(lengths[..., None], 2, axis=2)
    found = judges_agreement({"main": exact, "long": long}, lengths, ["a", "b"], resamples=20, seed=0)
    assert list(found["judges"]) == ["main", "long"]
    assert list(found["judges"]["main"]) == ["long"]
    assert found["length"]["long"]["b"].mean == pytest.approx(1)
    assert abs(found["length"]["main"]["a"].mean) < 0.5
