"""The vectorised build equals the paper's formulas, worked prompt by prompt and pair by pair."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_ray.config.models import Config
from spa_ray.preferences import build_pairs, denoise, resolve_tau
from tests import preferences_reference as reference
from tests.examples import examples
from tests.preferences_tables import cases, configs, make_episodes, rows, taus

Case = tuple[Config, pa.Table]


@given(cases(), taus)
@settings(max_examples=examples(200), deadline=None)
def test_every_prompt_is_kept_or_dropped_as_the_formulas_say(case: Case, tau: float | None) -> None:
    config, episodes = case
    denoised = denoise(episodes, config, tau=tau)
    source = episodes.to_pylist()
    assert denoised["drop_reason"].to_pylist() == [
        reference.drop_reason(source, i, config, tau) for i in range(len(source))
    ]
    assert denoised["kept"].to_pylist() == [reason is None for reason in denoised["drop_reason"].to_pylist()]
    assert denoised.drop_columns(["det", "kept", "drop_reason"]).equals(episodes, check_metadata=True)


@given(cases())
@settings(max_examples=examples(100), deadline=None)
def test_det_is_the_determinant_of_the_candidates_covariance(case: Case) -> None:
    config, episodes = case
    for row, det in zip(episodes.to_pylist(), denoise(episodes, config, tau=None)["det"].to_pylist(), strict=True):
        exact = reference.det_of(row, config)
        if exact is None:
            assert det is None
        elif len(config.objectives) == 2 or exact == 0:
            assert det == float(exact)
        else:
            assert det == pytest.approx(float(exact), rel=1e-12)


@given(cases(), taus)
@settings(max_examples=examples(200), deadline=None)
def test_pairs_are_those_of_equation_2(case: Case, tau: float | None) -> None:
    config, episodes = case
    denoised = denoise(episodes, config, tau=tau)
    expected = [p for row in denoised.to_pylist() if row["kept"] for p in reference.pairs_of(row, config)]
    assert build_pairs(denoised, config).to_pylist() == expected


@given(st.data(), configs())
@settings(max_examples=examples(100), deadline=None)
def test_tau_is_the_quantile_over_the_scored_prompts(data: st.DataObject, config: Config) -> None:
    source = [data.draw(rows(config, prompt_id=str(i), halves=False)) for i in range(data.draw(st.integers(1, 8)))]
    source = [row for row in source if row["responses"][-1]["kind"] == "refined"]
    scores = make_episodes(source, config)["scores"]
    tau, expected = resolve_tau(scores, config), reference.tau(source, config)
    assert (tau is None) == (expected is None)
    assert expected is None or tau == pytest.approx(expected, rel=1e-12)
    assert resolve_tau(iter([scores.slice(i, 1) for i in range(len(scores))]), config) == tau


@given(st.integers(2, 5), st.integers(0, 2**32 - 1), st.sampled_from([0, 1]))
@settings(deadline=None)
def test_det_of_real_valued_scores_is_numpys(k: int, seed: int, ddof: int) -> None:
    from spa_ray.preferences.scores import covariance_det

    points = np.random.default_rng(seed).uniform(1, 10, size=(k, 9, 4))
    found = covariance_det(points, np.ones((9, 4), dtype=bool), ddof=ddof)
    expected = [np.linalg.det(np.cov(points[:, :, p], ddof=ddof)) for p in range(4)]
    np.testing.assert_allclose(found, expected, rtol=1e-8)


@given(st.integers(2, 6), st.integers(7, 40), st.integers(0, 2**32 - 1), st.sampled_from([10, 100, 100_000]))
@settings(deadline=None)
def test_integer_scores_lie_in_a_plane_or_not_exactly_whatever_their_size(k: int, n: int, seed: int, top: int) -> None:
    from spa_ray.preferences.scores import covariance_det

    rng = np.random.default_rng(seed)
    points = rng.integers(0, top, size=(k, n, 1)).astype(float)
    flat = points.copy()
    flat[-1] = 3 * flat[0] - flat[1] if k > 2 else top - flat[0]
    moved = flat.copy()
    moved[-1, 0] += 1
    everyone = np.ones((n, 1), dtype=bool)
    assert covariance_det(flat, everyone, ddof=1)[0] == 0
    others_span = np.linalg.matrix_rank(np.cov(points[:-1, :, 0])) == k - 1 if k > 2 else np.ptp(points[0, 1:]) > 0
    if others_span and np.linalg.matrix_rank(moved[:, :, 0] - moved[:, :, 0].mean(axis=1, keepdims=True)) == k:
        assert covariance_det(moved, everyone, ddof=1)[0] > 0
