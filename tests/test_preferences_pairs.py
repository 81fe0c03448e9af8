"""Pairs, rule by rule (ALGORITHMS 1.6), and the traps that other systems fall into (TRAPS, Pairs)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spa_ray.data.schemas import ranges_of, with_ranges
from spa_ray.errors import InputError
from spa_ray.preferences import Funnel, build_pairs, denoise, pairing, resolve_delta
from tests.preferences_tables import Row, make_config, make_episodes, make_row

SPREAD = [[4, 5], [5, 4], [6, 6], [3, 2], [5, 5]]
BEST = [9, 9]
OPEN = {"denoise__consistency": "off", "denoise__informativeness": False}


def build(row: Row, **overrides: Any) -> list[Row]:
    config = make_config(**{**OPEN, **overrides})
    return build_pairs(denoise(make_episodes([row], config), config, tau=None), config).to_pylist()


def ends(pairs: list[Row]) -> list[tuple[int, int]]:
    return [(p["chosen_index"], p["rejected_index"]) for p in pairs]


def only(*scores: list[float], refined: list[float] | None = None) -> Row:
    """Candidates with these scores among others at the bottom that are told apart by their empty text."""
    row = make_row([*scores, [1, 1], [1, 1]], refined or [1, 1])
    for response in row["responses"][len(scores) : None if refined is None else -1]:
        response["text"] = ""
    return row


# --- Equation 2 ---


def test_the_first_objective_that_differs_decides() -> None:
    (pair,) = build(only([7, 2], [5, 9]))
    assert ends([pair]) == [(0, 1)]
    assert (pair["decided_by"], pair["margin"], pair["gap"]) == ("harmless", 9, 5)
    (pair,) = build(only([7, 2], [7, 9]))
    assert ends([pair]) == [(1, 0)]
    assert (pair["decided_by"], pair["margin"], pair["gap"]) == ("helpful", 7, 7)


def test_delta_bounds_the_margin_from_below_and_is_reached() -> None:
    assert len(build(only([5, 5], [4, 4]), pairs__delta=2)) == 1
    assert build(only([5, 5], [4, 5]), pairs__delta=2) == []
    assert len(build(only([5, 5], [4, 5]), pairs__delta=1)) == 1


def test_a_dead_pair_stays_and_is_counted() -> None:
    config = make_config(**OPEN)
    denoised = denoise(make_episodes([only([7, 3], [5, 5])], config), config, tau=None)
    pairs = build_pairs(denoised, config)
    assert pairs["margin"].to_pylist() == [4]
    assert pairs["gap"].to_pylist() == [0]
    assert Funnel.of(denoised, pairs, config, tau=None).dead_pairs == 1


def test_all_ordered_pairs_are_made_and_stand_in_order() -> None:
    pairs = build(make_row([[1, 1], [3, 3], [5, 5]], BEST), sampling__n=3)
    assert ends(pairs) == [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)]
    assert [p["pair_id"] for p in pairs] == [f"p:{i}:{j}" for i, j in ends(pairs)]
    assert [p["kind"] for p in pairs] == ["candidate"] * 3 + ["refined"] * 3


def test_pareto_wants_no_loss_anywhere_and_a_gain_below_the_first() -> None:
    assert build(only([7, 2], [5, 9]), pairs__order="pareto") == []
    assert build(only([7, 5], [5, 5]), pairs__order="pareto") == []
    assert ends(build(only([7, 6], [5, 5]), pairs__order="pareto")) == [(0, 1)]
    assert ends(build(only([5, 5], [5, 7]), pairs__order="pareto")) == [(1, 0)]


def test_one_objective_alone_knows_nothing_of_the_other() -> None:
    row = only([7, 2], [5, 9])
    (pair,) = build(row, pairs__order="only:harmless")
    assert (ends([pair]), pair["decided_by"], pair["margin"]) == ([(0, 1)], "harmless", 9)  # Eq. 2's margin
    (pair,) = build(row, pairs__order="only:helpful")
    assert (ends([pair]), pair["decided_by"]) == ([(1, 0)], "helpful")
    assert build(row, pairs__order="only:harmless", pairs__delta=3) == []  # 7 - 5 < 3, whatever is 9 - 2
    assert build(only([7, 2], [7, 9]), pairs__order="only:harmless") == []


def test_the_highest_mean_of_parts_of_ranges_meets_the_lowest_once_per_prompt() -> None:
    mean: dict[str, Any] = {"pairs__order": "mean", "episodes__ranges": {"harmless": (0, 10), "helpful": (0, 4)}}
    row = only([10, 0], [2, 3], [5, 2], [0, 3])  # .5, .475, .5 and .375
    (pair,) = build(row, **mean)
    assert (pair["chosen_index"], pair["rejected_index"]) == (0, 3)  # the first of two highest
    assert (pair["chosen_scores"], pair["margin"], pair["decided_by"]) == ([10, 0], 13, "harmless")
    assert ends(build(only([10, 0], [10, 1]), **mean)) == [(1, 0)]
    assert build(only([5, 2], [10, 0]), **mean) == []  # the same mean
    assert ends(build(row, **mean, pairs__delta=0.125)) == [(0, 3)]
    assert build(row, **mean, pairs__delta=0.13) == []
    assert ends(build(row, **mean, pairs__thresholds={"harmless": 4})) == [(1, 0)]
    cut = only([10, 0], [2, 3], [5, 2], [0, 3])
    cut["responses"][0]["finish_reason"] = "length"
    assert ends(build(cut, **mean)) == [(2, 3)]
    refined = make_row([[10, 4], [0, 0], [1, 1]], [5, 2])
    assert ends(build(refined, **mean)) == [(0, 1)]
    assert ends(build(refined, **mean, pairs__include="refined_only")) == [(3, 1)]
    best = make_row([[5, 2], [2, 1], [1, 1]], [10, 4])
    assert ends(build(best, **mean, pairs__include="candidates_only")) == [(0, 2)]


def test_a_mean_needs_ranges_and_no_score_leaves_its_range() -> None:
    with pytest.raises(
        InputError, match=r"mean needs the scores' ranges; set episodes.ranges, say {harmless: \[1, 5\]}"
    ):
        build(only([10, 0], [2, 3]), pairs__order="mean")
    with pytest.raises(InputError, match="'helpful' has none; give"):
        build(only([10, 0], [2, 3]), episodes__ranges={"harmless": (0, 10)})
    with pytest.raises(InputError, match="prompt_id 'p', response 1: helpful is 3, outside of its range, 0 to 2"):
        build(only([10, 0], [2, 3]), episodes__ranges={"harmless": (0, 10), "helpful": (0, 2)})


def test_pairs_repeat_the_ranges_of_the_episodes() -> None:
    config = make_config()
    episodes = make_episodes([only([9, 1], [2, 2])], config)
    for told, expected in ((None, None), ([(1, 10)] * 2, [(1, 10)] * 2)):
        denoised = denoise(episodes.cast(with_ranges(episodes.schema, told)), config, tau=None)
        assert ranges_of(build_pairs(denoised, config).schema) == expected
    given = make_config(episodes__ranges={"harmless": (0, 9), "helpful": (0, 4)})
    assert ranges_of(build_pairs(denoised, given).schema) == [(0, 9), (0, 4)]


def test_a_composite_reward_is_the_weighted_mean_of_the_objectives() -> None:
    row = only([9, 2], [5, 8])
    assert build(row, pairs__order="composite") == []  # 5.5 against 6.5, less than a delta of 2
    assert ends(build(row, pairs__order="composite", pairs__delta=1)) == [(1, 0)]
    weigh = {"pairs__order": "composite", "pairs__weights": {"harmless": 9, "helpful": 1}}
    (pair,) = build(row, **weigh)  # 8.3 against 5.3
    assert (ends([pair]), pair["margin"], pair["gap"], pair["decided_by"]) == ([(0, 1)], 10, 2, "harmless")
    assert build(row, **weigh, pairs__delta=3) != []
    assert build(row, **weigh, pairs__delta=3.1) == []
    alone = {"pairs__order": "composite", "pairs__weights": {"helpful": 1}}
    assert ends(build(row, **alone)) == ends(build(row, pairs__order="only:helpful")) == [(1, 0)]


def test_a_threshold_makes_what_is_above_it_tie() -> None:
    row = only([9, 4], [7, 6])
    assert ends(build(row)) == [(0, 1)]
    (pair,) = build(row, pairs__thresholds={"harmless": 7})
    assert ends([pair]) == [(1, 0)]
    assert (pair["decided_by"], pair["margin"], pair["chosen_scores"]) == ("helpful", 4, [7, 6])
    assert ends(build(row, pairs__thresholds={"harmless": 8})) == [(0, 1)]


def test_include_chooses_between_refined_and_candidate_pairs() -> None:
    row = make_row([[1, 1], [9, 9], [5, 5]], [7, 7])
    n = {"sampling__n": 3}
    assert ends(build(row, **n)) == [(1, 0), (1, 2), (1, 3), (2, 0), (3, 0), (3, 2)]
    assert ends(build(row, **n, pairs__include="refined_only")) == [(3, 0), (3, 2)]
    assert ends(build(row, **n, pairs__include="candidates_only")) == [(1, 0), (1, 2), (2, 0)]


def test_drop_refined_keeps_the_candidates_of_an_inconsistent_prompt() -> None:
    row = make_row([[1, 1], [9, 9], [5, 5]], [7, 7])
    pairs = build(row, sampling__n=3, denoise__consistency="strict", denoise__on_inconsistent="drop_refined")
    assert ends(pairs) == [(1, 0), (1, 2), (2, 0)]
    assert build(row, sampling__n=3, denoise__consistency="strict") == []


def test_real_valued_scores_are_compared_on_the_grid() -> None:
    row = only([7.2, 2.0], [7.1, 9.0])
    assert ends(build(row)) == [(0, 1)]
    (pair,) = build(row, pairs__score_grid=0.5)
    assert ends([pair]) == [(1, 0)]
    assert pair["chosen_scores"] == [7.0, 9.0]
    assert pair["rejected_scores"] == [7.0, 2.0]


def test_neither_a_margin_nor_a_dead_pair_is_lost_to_binary_fractions() -> None:
    (pair,) = build(only([7.3, 2.1], [5.2, 4.2]))
    assert (pair["margin"], pair["gap"]) == (4.2, 0)
    assert len(build(only([0.3, 0.0], [0.1, 0.0]), pairs__score_grid=0.1, pairs__delta=0.2)) == 1


# --- Traps ---


def test_equal_scores_never_pair() -> None:
    assert build(only([5, 5], [5, 5])) == []


def test_a_response_without_all_its_scores_is_in_no_pair() -> None:
    pairs = build(make_row([*SPREAD, [10, None], None, [None, 1]], BEST), sampling__n=8)
    assert pairs
    assert not {5, 6, 7} & {i for pair in ends(pairs) for i in pair}


@pytest.mark.parametrize("key", ["text", "token_ids"])
def test_identical_texts_or_token_ids_never_pair(key: str) -> None:
    row = only([9, 9], [2, 2])
    assert len(build(row)) == 1
    row["responses"][1][key] = row["responses"][0][key]
    assert build(row) == []


@pytest.mark.parametrize(("key", "empty"), [("text", ""), ("text", None), ("token_ids", []), ("token_ids", None)])
def test_an_empty_answer_never_pairs(key: str, empty: Any) -> None:
    row = only([9, 9], [2, 2])
    row["responses"][0][key] = empty
    assert build(row) == []


@pytest.mark.parametrize("ids", [[5], [5, 2], [5, 2, 2], [2, 5]])
def test_token_ids_are_the_generated_ones_with_no_end_token_added_or_removed(ids: list[int]) -> None:
    row = only([9, 9], [2, 2])
    row["responses"][0] |= {"token_ids": ids, "finish_reason": "length"}
    (pair,) = build(row, pairs__truncated="allow")
    assert pair["chosen_ids"] == ids
    assert pair["rejected_ids"] == [101, 7, 2]


def test_a_cut_answer_is_never_the_chosen_one_unless_that_is_allowed() -> None:
    row = only([9, 9], [5, 5], [2, 2])
    row["responses"][0]["finish_reason"] = "length"
    assert ends(build(row)) == [(1, 2)]
    assert ends(build(row, pairs__truncated="allow")) == [(0, 1), (0, 2), (1, 2)]


def test_a_cut_answer_may_be_the_rejected_one() -> None:
    row = only([9, 9], [2, 2])
    row["responses"][1]["finish_reason"] = "length"
    assert ends(build(row)) == [(0, 1)]


def test_the_funnel_counts_what_was_left_out_because_it_was_cut() -> None:
    row = only([9, 9], [5, 5], [2, 2])
    row["responses"][0]["finish_reason"] = "length"
    for rule, left_out in (("reject", 2), ("allow", 0)):
        config = make_config(**OPEN, pairs__truncated=rule)
        denoised = denoise(make_episodes([row], config), config, tau=None)
        funnel = Funnel.of(denoised, build_pairs(denoised, config), config, tau=None)
        assert (funnel.truncated_pairs, funnel.pairs) == (left_out, 3 - left_out)


def test_delta_auto_is_half_a_standard_deviation_of_score_sums_within_prompts() -> None:
    config = make_config(**OPEN, pairs__delta="auto")
    # Sums 4, 8, 6 around 6 and 10, 10 around 10: squared deviations 8 over 5 - 2 degrees of freedom.
    scores = pa.array([[[2.0, 2.0], [4.0, 4.0], [3.0, 3.0]], [[5.0, 5.0], [5.0, 5.0]]])
    expected = 0.5 * math.sqrt(8 / 3)
    assert resolve_delta(scores, config) == pytest.approx(expected, abs=1e-9)
    assert resolve_delta([scores[:1], scores[1:]], config) == resolve_delta(scores, config)
    assert resolve_delta(scores, make_config(**OPEN, pairs__delta=3.0)) == 3.0


def test_delta_auto_leaves_out_what_has_no_score() -> None:
    config = make_config(**OPEN, pairs__delta="auto")
    some = pa.array([[[2.0, 2.0], [4.0, None], None, [4.0, 4.0]], None, []])
    assert resolve_delta(some, config) == pytest.approx(0.5 * math.sqrt(8 / 1), abs=1e-9)
    assert resolve_delta(pa.array([None, [[1.0, 1.0]]], some.type), config) == 0.0


def test_answers_that_share_a_long_beginning_are_kept_whole() -> None:
    row = only([9, 9], [2, 2])
    row["responses"][0] |= {"text": "x" * 5000 + "a", "token_ids": [1] * 5000 + [3]}
    row["responses"][1] |= {"text": "x" * 5000 + "b", "token_ids": [1] * 5000 + [4]}
    (pair,) = build(row)
    assert (len(pair["chosen_ids"]), pair["chosen"][0]["content"][-1]) == (5001, "a")
    assert (len(pair["rejected_ids"]), pair["rejected"][0]["content"][-1]) == (5001, "b")


# --- Prompts ---


def test_the_prompt_is_the_original_messages_whatever_system_prompt_sampled_the_answer() -> None:
    row = only([9, 9], [2, 2])
    row["responses"][0]["system"] = "Be kind."
    (pair,) = build(row)
    assert pair["prompt"] == row["messages"]


def test_keep_system_puts_the_chosens_system_prompt_first() -> None:
    row = only([9, 9], [2, 2])
    row["responses"][0]["system"], row["responses"][1]["system"] = "Be kind.", "Be rude."
    (pair,) = build(row, pairs__keep_system=True)
    assert pair["prompt"] == [{"role": "system", "content": "Be kind."}, *row["messages"]]
    row["messages"] = [{"role": "system", "content": "House rules."}, *row["messages"]]
    (pair,) = build(row, pairs__keep_system=True)
    assert [m["content"] for m in pair["prompt"]] == ["Be kind.", "question p"]
    row["responses"][0]["system"] = None
    (pair,) = build(row, pairs__keep_system=True)
    assert pair["prompt"] == row["messages"]


def test_the_table_reads_as_a_conversational_preference_data_set() -> None:
    (pair,) = build(only([9, 9], [2, 2]))
    for side in ("chosen", "rejected"):
        assert [m["role"] for m in pair[side]] == ["assistant"]
    assert pair["prompt"][-1]["role"] == "user"


# --- Blocks ---


def test_pieces_that_stay_below_arrows_offsets_give_the_same_table(monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config()
    rows = [make_row(SPREAD, BEST, prompt_id=str(i)) for i in range(20)]
    denoised = denoise(make_episodes(rows, config), config, tau=None)
    whole = build_pairs(denoised, config)
    monkeypatch.setattr(pairing, "BLOCK_BYTES", 3000)
    monkeypatch.setattr(pairing, "BATCH_BYTES", 200)
    pieces = build_pairs(denoised, config)
    assert pieces["prompt_id"].num_chunks > 20
    assert pieces.equals(whole)


def test_rows_cut_out_of_a_larger_table_build_as_they_do_alone() -> None:
    config = make_config()
    rows = [make_row(SPREAD, BEST, prompt_id=str(i)) for i in range(5)]
    rows[1] = make_row([], prompt_id="1", error="engine died")
    denoised = denoise(make_episodes(rows, config), config, tau=None)
    assert build_pairs(denoised.slice(2, 2), config).equals(
        build_pairs(pa.Table.from_pylist(denoised.to_pylist()[2:4], denoised.schema), config)
    )


def test_episodes_read_back_from_parquet_build_the_same_pairs(tmp_path: Path) -> None:
    config = make_config(pairs__keep_system=True)
    rows = [make_row(SPREAD, BEST, prompt_id=str(i)) for i in range(3)]
    for response in rows[0]["responses"]:
        response["system"] = "Be kind."
    episodes = make_episodes(rows, config)
    pq.write_table(episodes, tmp_path / "episodes.parquet")
    read = pq.read_table(tmp_path / "episodes.parquet")
    built = [build_pairs(denoise(table, config, tau=None), config) for table in (episodes, read)]
    assert built[0].num_rows == 3 * 13  # candidate 4 is within delta of 0 and of 1
    assert built[0].equals(built[1])


def test_null_lists_of_responses_are_prompts_without_answers() -> None:
    config = make_config()
    rows = [
        make_row([], prompt_id="a", error="engine died", responses=None, scores=None),
        make_row(SPREAD, BEST, prompt_id="b"),
    ]
    denoised = denoise(make_episodes(rows, config), config, tau=None)
    assert set(build_pairs(denoised, config)["prompt_id"].to_pylist()) == {"b"}


def test_a_block_in_which_every_prompt_failed_gives_an_empty_table_and_a_full_funnel() -> None:
    config = make_config()
    rows = [make_row([], prompt_id=str(i), error="engine died") for i in range(3)]
    denoised = denoise(make_episodes(rows, config), config, tau=None)
    pairs = build_pairs(denoised, config)
    assert pairs.num_rows == 0
    assert Funnel.of(denoised, pairs, config, tau=None).dropped["error"] == 3


def test_an_undenoised_table_and_unordered_responses_are_refused() -> None:
    config, row = make_config(), make_row(SPREAD, BEST)
    with pytest.raises(InputError, match="no column 'kept'"):
        build_pairs(make_episodes([row], config), config)
    row["responses"].reverse()
    row["scores"].reverse()
    with pytest.raises(InputError, match="ascending"):
        build_pairs(denoise(make_episodes([row], config), config, tau=None), config)


def test_repeated_scores_give_a_pair_its_reliability() -> None:
    """d² / (d² + se²) on the deciding objective: se² is the sum of both means' variances."""
    config = make_config(scoring__draws=3, denoise__consistency="off", denoise__informativeness=False)
    row = make_row([(6.0, 5.0), (4.0, 5.0), (6.0, 2.0)], (1.0, 1.0))
    draws = [[[5, 6, 7], [5, 5, 5]], [[4, 4, 4], [5, 5, 5]], [[6, 6, 6], [1, 2, 3]], [[1], [1]]]
    for response, drawn in zip(row["responses"], draws, strict=True):
        response["score_draws"] = drawn
    found = build_pairs(denoise(make_episodes([row], config), config, tau=None), config)
    reliability = dict(zip(found["pair_id"].to_pylist(), found["reliability"].to_pylist(), strict=True))
    assert reliability["p:0:1"] == pytest.approx(4 / (4 + 1 / 3))  # harmless 6 and 4; variances 1/3 and 0
    assert reliability["p:2:1"] == 1.0
    assert reliability["p:0:2"] == pytest.approx(9 / (9 + 1 / 3))  # tied on harmless; helpful 5 and 2
    assert reliability["p:0:3"] is None  # drawn once
    once = make_config(denoise__consistency="off", denoise__informativeness=False)
    assert "reliability" not in build_pairs(denoise(make_episodes([row], once), once, tau=None), once).column_names
