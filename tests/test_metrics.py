"""HH_λ, the RV coefficient, wins and losses, and the bootstrap."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_ray.evaluation import bootstrap
from spa_ray.evaluation.bootstrap import mean_interval, paired_difference
from spa_ray.evaluation.metrics import Outcome, hh_lambda, rv_coefficient, win_tie_loss


def test_hh_of_the_means_is_the_mean_of_the_prompts_hh() -> None:
    a, b = np.array([9.0, 4.0, 7.0]), np.array([2.0, 8.0, 5.0])
    assert hh_lambda(a, b, 5).mean() == pytest.approx(hh_lambda(a.mean(), b.mean(), 5))
    with pytest.raises(ValueError, match="lam"):
        hh_lambda(1.0, 1.0, 0)


def rv_of_distances(x: np.ndarray, y: np.ndarray) -> float:
    """The same by another definition: the cosine of the two Gram matrices, which double centring makes of squared
    distances between rows."""
    m = len(x)
    centre = np.eye(m) - np.full((m, m), 1 / m)
    a, b = (-0.5 * centre @ ((z[:, None] - z[None]) ** 2).sum(axis=2) @ centre for z in (x, y))
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


@given(st.integers(0, 2**32 - 1), st.integers(3, 40), st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_rv_agrees_with_an_independent_definition(seed: int, m: int, p: int, q: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.uniform(1, 10, size=(m, p)), rng.uniform(1, 10, size=(m, q))
    assert abs(rv_coefficient(x, y) - rv_of_distances(x, y)) < 1e-12


@given(st.integers(0, 2**32 - 1), st.integers(3, 40), st.integers(1, 3), st.floats(0.01, 100), st.floats(-50, 50))
@settings(max_examples=100, deadline=None)
def test_rv_does_not_change_with_a_rotation_a_shift_and_one_common_scale(
    seed: int, m: int, k: int, scale: float, shift: float
) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.uniform(1, 10, size=(m, k)), rng.uniform(1, 10, size=(m, k))
    turn, _ = np.linalg.qr(rng.normal(size=(k, k)))
    assert rv_coefficient(scale * x @ turn + shift, y) == pytest.approx(rv_coefficient(x, y), abs=1e-9)
    assert rv_coefficient(x, scale * x @ turn + shift) == pytest.approx(1)


def test_rv_changes_when_one_axis_alone_is_scaled() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 2)), rng.normal(size=(30, 2))
    assert rv_coefficient(x * [10, 1], y) != pytest.approx(rv_coefficient(x, y), abs=0.01)


def test_rv_of_single_columns_is_the_squared_correlation() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(40, 1))
    y = x + rng.normal(size=(40, 1))
    assert rv_coefficient(x, y) == pytest.approx(np.corrcoef(x[:, 0], y[:, 0])[0, 1] ** 2)


@given(st.integers(0, 2**32 - 1), st.integers(2, 20))
@settings(max_examples=50, deadline=None)
def test_rv_is_symmetric_and_between_0_and_1(seed: int, m: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.integers(1, 11, size=(m, 2)).astype(float), rng.normal(size=(m, 2))
    found = rv_coefficient(x, y)
    if np.ptp(x, axis=0).max() == 0:
        assert np.isnan(found)
        return
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
