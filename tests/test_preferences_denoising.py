"""Denoising, rule by rule (ALGORITHMS 1.4 and 1.5)."""

from __future__ import annotations

import pyarrow as pa
import pytest

from spa_ray.errors import InputError
from spa_ray.preferences import denoise, resolve_tau
from tests.preferences_tables import Row, make_config, make_episodes, make_row

SPREAD = [[4, 5], [5, 4], [6, 6], [3, 2], [5, 5]]
BEST = [9, 9]


def reason(row: Row, tau: float | None = None, **overrides: object) -> str | None:
    config = make_config(**overrides)
    return denoise(make_episodes([row], config), config, tau=tau)["drop_reason"][0].as_py()


def det(row: Row, **overrides: object) -> float | None:
    config = make_config(**overrides)
    return denoise(make_episodes([row], config), config, tau=None)["det"][0].as_py()


def test_a_prompt_whose_refined_answer_wins_everywhere_is_kept() -> None:
    assert reason(make_row(SPREAD, BEST)) is None


def test_det_leaves_the_refined_answer_out() -> None:
    # By hand: a = 4 5 6 3 5, b = 5 4 6 2 5; var a = 1.3, var b = 2.3, cov = 1.45.
    assert det(make_row(SPREAD, BEST)) == pytest.approx(1.3 * 2.3 - 1.45**2, rel=1e-12)
    assert det(make_row(SPREAD, [10, 7])) == det(make_row(SPREAD, BEST))


@pytest.mark.parametrize("n", [3, 4, 5])
def test_population_det_is_the_sample_det_times_n_minus_1_over_n_squared(n: int) -> None:
    row = make_row(SPREAD[:n], BEST)
    population, sample = det(row, denoise__ddof=0), det(row, denoise__ddof=1)
    assert population == pytest.approx(sample * ((n - 1) / n) ** 2, rel=1e-12)
    assert sample > 0


def test_a_candidate_that_failed_scoring_is_left_out_of_det_and_of_the_maximum() -> None:
    failed = make_row([*SPREAD[:4], [10, None]], BEST)
    assert det(failed) == det(make_row(SPREAD[:4], BEST))
    assert reason(failed) is None
    assert reason(make_row([*SPREAD[:4], None], BEST)) is None
    for no_number in (float("nan"), float("inf")):
        assert det(make_row([*SPREAD[:4], [no_number, 5]], BEST)) == det(make_row(SPREAD[:4], BEST))


def test_too_few_scores_means_fewer_than_objectives_plus_one_or_no_scored_refined_answer() -> None:
    lost = [[None, 5], [5, None], None]
    assert reason(make_row([*SPREAD[:2], *lost], BEST)) == "too_few_scores"
    assert det(make_row([*SPREAD[:2], *lost], BEST)) is None
    assert reason(make_row([*SPREAD[:3], *lost[:2]], BEST)) is None
    assert reason(make_row(SPREAD, [9, None])) == "too_few_scores"
    assert reason(make_row(SPREAD)) == "too_few_scores"
    assert reason(make_row([[4, 5, 1], [5, 4, 2], [6, 6, 4]], [9, 9, 9]), k=3) == "too_few_scores"
    # Whatever the filters are set to: the funnel's definition names no exception.
    assert reason(make_row(SPREAD), denoise__consistency="off", denoise__informativeness=False) == "too_few_scores"


@pytest.mark.parametrize(
    ("refined", "strict", "primary_ge"),
    [([7, 7], True, True), ([6, 7], False, True), ([7, 6], False, False), ([5, 9], False, False)],
)
def test_consistency_is_strict_on_both_axes_and_primary_ge_lets_the_first_tie(
    refined: list[int], strict: bool, primary_ge: bool
) -> None:
    row = make_row(SPREAD, refined)
    assert (reason(row) is None) == strict
    assert (reason(row, denoise__consistency="primary_ge") is None) == primary_ge
    assert reason(row, denoise__consistency="off") is None
    assert reason(row, denoise__on_inconsistent="drop_refined") is None


def test_one_candidate_at_the_ceiling_kills_the_prompt() -> None:
    assert reason(make_row([[10, 2], *SPREAD[1:]], [10, 10])) == "inconsistent"


def test_a_constant_axis_and_perfectly_correlated_axes_are_zero_det() -> None:
    assert reason(make_row([[4, s] for s in (1, 5, 7, 8, 2)], BEST)) == "zero_det"
    assert reason(make_row([[s, 9 - s] for s in (1, 5, 7, 8, 2)], [10, 10])) == "zero_det"
    assert reason(make_row([[4, s] for s in (1, 5, 7, 8, 2)], BEST), denoise__informativeness=False) is None


@pytest.mark.parametrize("constant", [0, 1, 2])
@pytest.mark.parametrize("step", [1, 0.5])
def test_any_constant_axis_of_three_is_zero_det(constant: int, step: float) -> None:
    spread = [[4, 5, 1], [5, 4, 2], [6, 6, 4], [3, 2, 2]]
    flat = [[3 if o == constant else step * s for o, s in enumerate(scores)] for scores in spread]
    assert reason(make_row(spread, [9, 9, 9]), k=3) is None
    assert reason(make_row(flat, [9, 9, 9]), k=3) == "zero_det"


def test_real_valued_scores_are_singular_up_to_one_millionth_of_the_variances() -> None:
    thirds = [1 / 3, 2 / 3, 4 / 3, 7 / 3, 10 / 3]
    on_a_line = [[a, 0.1 * a + 0.7] for a in thirds]
    assert det(make_row(on_a_line, BEST)) == 0
    assert reason(make_row(on_a_line, BEST)) == "zero_det"
    assert reason(make_row([[7.1, a] for a in thirds], BEST)) == "zero_det"
    near_it = [[a, b + (1e-4 if i == 2 else 0)] for i, (a, b) in enumerate(on_a_line)]
    assert det(make_row(near_it, BEST)) == 0
    off_it = [[a, b + (0.01 if i == 2 else 0)] for i, (a, b) in enumerate(on_a_line)]
    assert det(make_row(off_it, BEST)) > 0


def test_high_det_is_above_tau_and_tau_itself_is_kept() -> None:
    row = make_row(SPREAD, BEST)
    exactly = det(row)
    assert exactly is not None
    assert reason(row, tau=exactly) is None
    assert reason(row, tau=exactly * 0.999) == "high_det"
    assert reason(row, tau=exactly * 0.999, denoise__informativeness=False) is None


def test_the_first_failing_reason_counts() -> None:
    flat = [[4, 4]] * 5
    assert reason(make_row(flat, [1, 1])) == "inconsistent"
    assert reason(make_row(flat)) == "too_few_scores"
    assert reason(make_row([], error="prompt too long")) == "error"
    assert reason(make_row(SPREAD, BEST, error="engine died")) == "error"


def test_of_a_prompt_that_stands_twice_the_good_and_latest_row_stays() -> None:
    config = make_config()
    rows = [
        make_row(SPREAD, BEST, prompt_id="a"),
        make_row([], prompt_id="b", error="engine died", attempt=2),
        make_row(SPREAD, BEST, prompt_id="b"),
        make_row(SPREAD, BEST, prompt_id="a", attempt=2),
        make_row(SPREAD, BEST, prompt_id="c"),
        make_row(SPREAD, BEST, prompt_id="c"),
    ]
    found = denoise(make_episodes(rows, config), config, tau=None)["drop_reason"].to_pylist()
    assert found == ["duplicate", "duplicate", None, None, None, "duplicate"]


def test_an_empty_table_stays_empty() -> None:
    config = make_config()
    denoised = denoise(make_episodes([], config), config, tau=None)
    assert denoised.num_rows == 0
    assert denoised.column_names[-3:] == ["det", "kept", "drop_reason"]
    assert [denoised.schema.field(n).type for n in ("det", "kept", "drop_reason")] == [
        pa.float64(),
        pa.bool_(),
        pa.string(),
    ]


def scores_of(*spreads: list[list[float]]) -> pa.ChunkedArray:
    config = make_config()
    return make_episodes([make_row(s, BEST, prompt_id=str(i)) for i, s in enumerate(spreads)], config)["scores"]


FLAT: list[list[float]] = [[4, s] for s in (1, 5, 7, 8, 2)]


def test_tau_given_outright_needs_no_data() -> None:
    assert resolve_tau(scores_of(), make_config(denoise__tau=4.5)) == 4.5


def test_tau_is_off_with_the_filter_or_the_quantile() -> None:
    scores = scores_of(SPREAD, FLAT)
    assert resolve_tau(scores, make_config(denoise__informativeness=False)) is None
    assert resolve_tau(scores, make_config(denoise__tau_quantile=None)) is None


def test_tau_reads_the_positive_dets_or_all_of_them() -> None:
    spreads = [[[float(scale * a), b] for a, b in SPREAD] for scale in (1, 2, 3)]
    dets = [det(make_row(s, BEST)) for s in spreads]
    scores = scores_of(*spreads, FLAT, FLAT)
    assert resolve_tau(scores, make_config(denoise__tau_quantile=0.5)) == dets[1]
    assert resolve_tau(scores, make_config(denoise__tau_quantile=1)) == dets[2]
    assert resolve_tau(scores, make_config(denoise__tau_quantile=0.5, denoise__tau_over="all")) == dets[0]
    assert resolve_tau(scores_of(FLAT), make_config()) is None
    assert resolve_tau(scores_of(FLAT), make_config(denoise__tau_over="all")) == 0


def test_tau_leaves_out_prompts_that_failed_or_lack_a_scored_refined_answer() -> None:
    config = make_config(denoise__tau_quantile=1)
    wide = [[float(3 * a), b] for a, b in SPREAD]
    rows = [
        make_row(SPREAD, BEST, prompt_id="fine"),
        make_row([], prompt_id="error", error="engine died"),
        make_row(wide, prompt_id="no refined answer"),
        make_row(wide, [9, None], prompt_id="refined answer not scored"),
    ]
    assert resolve_tau(make_episodes(rows, config)["scores"], config) == det(rows[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop_columns(["scores"]), "no column 'scores'"),
        (lambda t: t.set_column(4, "scores", pa.array([[[1.0, 2.0, 3.0]]])), "3 scores"),
        (lambda t: t.set_column(4, "scores", pa.array([[[1.0, 2.0]]])), "6 responses but 1"),
        (lambda t: t.set_column(0, "prompt_id", pa.nulls(1, pa.string())), "prompt_id is null"),
        (
            lambda t: t.replace_schema_metadata({"objectives": '["helpful", "harmless"]'}),
            "same names in the same order",
        ),
    ],
)
def test_a_table_that_is_not_the_configs_episodes_is_refused_in_one_line(change, message: str) -> None:  # type: ignore[no-untyped-def]
    config = make_config()
    with pytest.raises(InputError, match=message) as caught:
        denoise(change(make_episodes([make_row(SPREAD, BEST)], config)), config, tau=None)
    assert "\n" not in str(caught.value)


def test_two_refined_answers_are_refused() -> None:
    config, row = make_config(), make_row(SPREAD, BEST)
    row["responses"][0]["kind"] = "refined"
    with pytest.raises(InputError, match="more than one refined"):
        denoise(make_episodes([row], config), config, tau=None)
