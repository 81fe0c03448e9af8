"""HH_λ against the paper's printed table, the RV coefficient, wins and losses, and the bootstrap."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_ray.evaluation import bootstrap
from spa_ray.evaluation.bootstrap import mean_interval, paired_difference
from spa_ray.evaluation.metrics import Outcome, hh_lambda, rv_coefficient, win_tie_loss

# SPA, Table 3: harmless, helpful, HH_5, HH_10, HH_20.
TABLE_3 = {
    "Self-Criticism": (9.65, 7.68, 9.32, 9.47, 9.56),
    "RS 6:4": (9.87, 6.14, 9.25, 9.53, 9.69),
    "RS 7:3": (9.80, 5.94, 9.16, 9.45, 9.62),
    "RS 8:2": (9.30, 6.85, 8.89, 9.08, 9.18),
    "RS 9:1": (9.90, 6.17, 9.28, 9.56, 9.72),
    "SPA": (9.90, 7.14, 9.44, 9.65, 9.77),
}


@pytest.mark.parametrize(("lam", "column"), [(5, 2), (10, 3), (20, 4)])
@pytest.mark.parametrize("method", TABLE_3)
def test_every_hh_of_the_papers_table_3_recomputes_to_the_printed_digits(method: str, lam: int, column: int) -> None:
    row = TABLE_3[method]
    assert round(hh_lambda(row[0], row[1], lam), 2) == row[column]


def test_hh_of_the_means_is_the_mean_of_the_prompts_hh() -> None:
    a, b = np.array([9.0, 4.0, 7.0]), np.array([2.0, 8.0, 5.0])
    assert hh_lambda(a, b, 5).mean() == pytest.approx(hh_lambda(a.mean(), b.mean(), 5))
    with pytest.raises(ValueError, match="lam"):
        hh_lambda(1.0, 1.0, 0)


def test_rv_is_one_for_the_same_configuration_however_turned_and_scaled() -> None:
    x = np.random.default_rng(0).normal(size=(30, 2))
    turn = np.array([[0.6, -0.8], [0.8, 0.6]])
    assert rv_coefficient(x, x) == pytest.approx(1)
    assert rv_coefficient(x, 3 * x @ turn + 5) == pytest.approx(1)


def test_rv_of_single_columns_is_the_squared_correlation() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(40, 1))
    y = x + rng.normal(size=(40, 1))
    assert rv_coefficient(x, y) == pytest.approx(np.corrcoef(x[:, 0], y[:, 0])[0, 1] ** 2)


@given(st.integers(0, 2**32 - 1), st.integers(2, 20))
@settings(max_examples=50, deadline=None)
def test_rv_is_the_papers_formula_symmetric_and_between_0_and_1(seed: int, m: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.integers(1, 11, size=(m, 2)).astype(float), rng.normal(size=(m, 2))
    found = rv_coefficient(x, y)
    if np.ptp(x, axis=0).max() == 0:
        assert np.isnan(found)
        return
    cx, cy = x - x.mean(axis=0), y - y.mean(axis=0)
    sxy, sxx, syy = cx.T @ cy, cx.T @ cx, cy.T @ cy
    assert found == pytest.approx(
        np.trace(sxy @ sxy.T) / np.sqrt(np.trace(sxx @ sxx) * np.trace(syy @ syy)), rel=1e-9, abs=1e-12
    )
    assert found == pytest.approx(rv_coefficient(y, x))
    assert -1e-12 <= found <= 1 + 1e-12


def test_rv_without_variance_is_nan_even_where_the_mean_rounds() -> None:
    varied = np.arange(6.0).reshape(3, 2)
    assert np.isnan(rv_coefficient(np.full((3, 2), 0.1), varied))
    assert np.isnan(rv_coefficient(varied, np.full((3, 2), 7.3)))


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (np.ones((3, 2)), np.ones((4, 2))),
        (np.ones(3), np.ones(3)),
        (np.ones((0, 2)), np.ones((0, 2))),
        (np.array([[1, np.nan], [2, 3]]), np.ones((2, 2))),
    ],
)
def test_rv_refuses_what_is_not_two_matrices_of_finite_scores(x: np.ndarray, y: np.ndarray) -> None:
    with pytest.raises(ValueError, match="rv_coefficient"):
        rv_coefficient(x, y)


def test_a_win_is_strictly_greater_and_a_tie_counts_half() -> None:
    outcome = win_tie_loss([5, 5, 7, 1], [4, 5, 6, 2])
    assert outcome == Outcome(wins=2, ties=1, losses=1)
    assert outcome.win_rate == 2.5 / 4
    with pytest.raises(ValueError, match="nothing was compared"):
        _ = win_tie_loss([], []).win_rate
    with pytest.raises(ValueError, match="shapes"):
        win_tie_loss([1, 2], [1])
    with pytest.raises(ValueError, match="finite"):
        win_tie_loss([1, None], [1, 2])


def test_the_interval_is_the_percentiles_of_resampled_means() -> None:
    x = np.random.default_rng(3).normal(5, 2, size=400)
    found = mean_interval(x, resamples=4000, seed=0)
    error = 1.96 * x.std() / np.sqrt(len(x))
    assert found.mean == pytest.approx(x.mean())
    assert found.n == 400
    assert found.low == pytest.approx(x.mean() - error, abs=0.15 * error)
    assert found.high == pytest.approx(x.mean() + error, abs=0.15 * error)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(300):
        found = mean_interval(rng.exponential(2, size=150), resamples=300, seed=seed)
        covered += found.low <= 2 <= found.high
    assert 0.88 <= covered / 300 <= 0.99


def test_the_same_seed_gives_the_same_interval_and_another_does_not() -> None:
    x = np.arange(50.0)
    assert mean_interval(x, resamples=200, seed=7) == mean_interval(x, resamples=200, seed=7)
    assert mean_interval(x, resamples=200, seed=7) != mean_interval(x, resamples=200, seed=8)


def test_resampling_in_pieces_gives_the_same_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.arange(50.0)
    whole = mean_interval(x, resamples=100, seed=1)
    monkeypatch.setattr(bootstrap, "BUDGET", 500)
    assert mean_interval(x, resamples=100, seed=1) == whole


def test_a_paired_difference_is_far_tighter_than_the_difference_of_two_means() -> None:
    rng = np.random.default_rng(5)
    prompt = rng.normal(5, 3, size=400)
    ours, theirs = prompt + 0.3 + rng.normal(0, 0.1, 400), prompt
    found = paired_difference(ours, theirs, resamples=1000, seed=0)
    assert found.low > 0.28
    assert found.high < 0.32
    alone = mean_interval(ours, resamples=1000, seed=0)
    assert alone.high - alone.low > 10 * (found.high - found.low)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [[1.0], [2.0]]])
def test_no_interval_without_one_finite_number_a_prompt(values: list[float]) -> None:
    with pytest.raises(ValueError, match="mean_interval"):
        mean_interval(values, resamples=10, seed=0)


def test_unpaired_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="2 and 3"):
        paired_difference([1, 2], [1, 2, 3], resamples=10, seed=0)
