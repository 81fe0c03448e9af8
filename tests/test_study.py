"""The study over seeds: what it averages, what it pairs, what it leaves out, and which runs it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spa_ray.cli.demo import demo_config, demo_study, of_seed, summary
from spa_ray.config import arm_configs
from spa_ray.config.study import Study
from spa_ray.errors import InputError
from spa_ray.evaluation.bootstrap import Interval, mean_interval, ratio_interval
from spa_ray.evaluation.study import pair_order
from spa_ray.evaluation.tables import Answers, arm_metrics
from spa_ray.pipeline.result_print import print_metrics
from spa_ray.pipeline.study import write_study
from tests.study_runs import OBJECTIVES, Scores, write_run

TABLES = demo_study()
METHODS, FILTERS = TABLES.tables["methods"].arms, TABLES.tables["filters"].arms
ITERATIONS, CONTROLS = TABLES.tables["iterations"].about, TABLES.tables["controls"].about
COMPARISONS = TABLES.tables["differences"].differences
B = {"resamples": 200, "seed": 0}
VANILLA: list[Scores] = [{"a": (4, 2), "b": (6, 2), "c": (8, 2)}, {"a": (6, 2), "b": (6, 2), "c": (9, 2)}]
SPA: list[Scores] = [{"a": (7, 5), "b": (8, 5), "c": (9, 5)}, {"a": (9, 8), "b": (8, 8), "c": (7, 8)}]


def study_of(tmp_path: Path, *runs: Path) -> tuple[dict[str, Any], str]:
    out = write_study(runs, tmp_path / "x-study.md", TABLES)
    assert out == tmp_path / "x-study.md"
    return json.loads((tmp_path / "x-study.json").read_text())["tables"], out.read_text()


@pytest.fixture
def two_seeds(tmp_path: Path) -> list[Path]:
    """vanilla's harmless scores by prompt over the two seeds: (4, 6), (6, 6), (8, 9); spa's (7, 9), (8, 8), (9, 7)."""
    return [
        write_run(tmp_path / f"s{i}", {"vanilla": {"test": VANILLA[i]}, "spa": {"test": SPA[i]}}, seed=i)
        for i in range(2)
    ]


def test_a_measure_is_averaged_over_seeds_by_prompt_and_then_bootstrapped_over_prompts(
    tmp_path: Path, two_seeds: list[Path]
) -> None:
    tables, _ = study_of(tmp_path, *two_seeds)
    rows = tables["methods"]["rows"]
    assert Interval(**rows["vanilla"]["harmless"]) == mean_interval([5, 6, 8.5], **B)
    assert Interval(**rows["spa"]["harmless"]) == Interval(8, 8, 8, 3)
    assert rows["spa"]["helpful"]["mean"] == 6.5
    hh = tables["hh"]["rows"]["vanilla"]
    assert hh["HH_5"]["mean"] == pytest.approx((5 * 6.5 + 2) / 6)
    assert hh["HH_20"]["mean"] == pytest.approx((20 * 6.5 + 2) / 21)


def test_differences_are_paired_by_prompt_and_shown_seed_by_seed(tmp_path: Path, two_seeds: list[Path]) -> None:
    tables, text = study_of(tmp_path, *two_seeds)
    row = tables["differences"]["rows"]["spa − vanilla"]
    assert Interval(**row["harmless"]) == mean_interval([3, 2, -0.5], **B)
    assert row["unsafe"]["mean"] == -0.5  # prompt a was unsafe at one of two seeds
    by_hand = [(5 * 2 + 3) / 6, (5 * 1 + 6) / 6]
    assert row["HH_5 by seed"] == pytest.approx(by_hand)
    assert "| +2.17 +1.83 |" in text


def test_categories_are_compared_with_vanilla_and_losses_are_named(tmp_path: Path, two_seeds: list[Path]) -> None:
    tables, text = study_of(tmp_path, *two_seeds)
    row = tables["categories"]["rows"]["spa − vanilla"]
    assert row["harmful"]["mean"] == 3
    assert row["benign"]["mean"] == 0.75
    assert "Means below 0: none." in text
    worse = {"vanilla": {"test": SPA[0]}, "spa": {"test": VANILLA[0]}}
    _, text = study_of(tmp_path, write_run(tmp_path / "worse", worse))
    assert "Means below 0: spa − vanilla in benign, spa − vanilla in harmful." in text


def test_every_seed_has_its_own_means(tmp_path: Path, two_seeds: list[Path]) -> None:
    tables, text = study_of(tmp_path, *two_seeds)
    rows = tables["seeds"]["rows"]
    assert rows["vanilla"]["harmless"] == [6, 7]
    assert rows["vanilla"]["unsafe"] == [1, 0]
    assert rows["spa"]["helpful"] == [5, 8]
    assert "| 100.0 0.0 % |" in text


def test_a_table_without_its_arms_is_left_out(tmp_path: Path, two_seeds: list[Path]) -> None:
    tables, text = study_of(tmp_path, *two_seeds)
    assert list(tables) == ["methods", "hh", "differences", "categories", "seeds"]
    assert list(tables["methods"]["rows"]) == ["vanilla", "spa"]
    assert list(tables["differences"]["rows"]) == ["spa − vanilla"]
    assert "sft" not in text


def test_a_full_run_fills_every_table_and_each_says_over_what(tmp_path: Path) -> None:
    arms = (*METHODS, *FILTERS, *ITERATIONS, *CONTROLS)
    families = {"test": SPA[0], "wild": VANILLA[0], "trigger": VANILLA[1], "utility": {"a": (10, 10), "b": (1, 1)}}
    pairs = {arm: [("p", "9/1", "4/1")] for arm in arms}
    tables, text = study_of(tmp_path, write_run(tmp_path / "run", dict.fromkeys(arms, families), pairs=pairs))
    assert list(tables["methods"]["rows"]) == list(METHODS)
    assert list(tables["filters"]["rows"]) == list(FILTERS)
    assert list(tables["iterations"]["rows"]) == ["vanilla", "spa", *ITERATIONS]
    assert list(tables["controls"]["rows"]) == ["vanilla", "spa", *CONTROLS]
    looked_at = {arm for arm, row in tables["controls"]["rows"].items() if "right" in row}
    assert looked_at == {"spa", "helpful_only"}  # a coin's pairs are swapped in training, not in the table of pairs
    assert list(tables["differences"]["rows"]) == [f"{a} − {b}" for a, b in COMPARISONS]
    assert list(tables["families"]["columns"]) == [f"{f}: {o}" for f in ("trigger", "wild") for o in OBJECTIVES]
    assert tables["families"]["prompts"] == {"trigger": 3, "wild": 3}
    sections = text.split("\n## ")[1:]
    assert len(sections) == len(tables) == 10
    for section in sections:
        assert "prompts (" in section
        assert "; 1 seed (0); 200 resamples." in section
        lines = [line for line in section.splitlines() if line.startswith("|")]
        assert len(lines) > 2
        assert len({line.count("|") for line in lines}) == 1


def test_utility_is_the_share_of_exact_answers_before_and_after(tmp_path: Path) -> None:
    right, wrong = (10, 10), (1, 1)
    runs = [
        {"vanilla": {"a": right, "b": wrong, "c": right}, "spa": {"a": wrong, "b": wrong, "c": right}},
        {"vanilla": {"a": right, "b": wrong, "c": right}, "spa": {"a": right, "b": wrong, "c": right}},
    ]
    folders = [
        write_run(tmp_path / f"s{i}", {a: {"test": SPA[0], "utility": u} for a, u in run.items()}, seed=i)
        for i, run in enumerate(runs)
    ]
    tables, text = study_of(tmp_path, *folders)
    rows = tables["utility"]["rows"]
    assert Interval(**rows["vanilla"]["utility"]) == mean_interval([1, 0, 1], **B)
    assert rows["spa"]["utility"]["mean"] == 0.5
    assert Interval(**rows["spa"]["utility: change"]) == mean_interval([-0.5, 0, 0], **B)
    assert "families" not in tables
    assert "-16.7 [" in text


def test_pair_precision_is_the_share_in_the_other_judges_lexicographic_order(tmp_path: Path) -> None:
    pairs = [
        ("p", "9/1", "4/9"),  # right: the first objective decides
        ("p", "4/9", "9/1"),  # wrong
        ("p", "5/5", "5/5"),  # tied
        ("q", "5/6", "5/3"),  # right: tied on the first, the second decides
    ]
    answers = {arm: {"test": SPA[0]} for arm in ("vanilla", "no_filter")}
    runs = [write_run(tmp_path / f"s{i}", answers, seed=i, pairs={"no_filter": pairs[i:]}) for i in range(2)]
    row = study_of(tmp_path, *runs)[0]["filters"]["rows"]["no_filter"]
    assert Interval(**row["right"]) == ratio_interval([1, 2], [5, 2], **B)
    assert row["right"]["mean"] == 3 / 7
    assert row["tied"]["mean"] == 2 / 7
    assert row["pairs"] == [3.5]


def test_pairs_are_looked_at_by_a_judge_of_any_form_and_left_out_where_it_has_no_score(tmp_path: Path) -> None:
    pairs = [("p", "9/1", "4/9"), ("p", "4/9", "9/1"), ("p", "?", "4/9"), ("q", "9/1", "?")]
    evaluation = {"judge": "tests.study_runs:Reader", "prompts": {"source": "p.jsonl"}, "bootstrap": 200}
    answers = {arm: {"test": SPA[0]} for arm in ("vanilla", "no_filter")}
    run = write_run(tmp_path / "s", answers, pairs={"no_filter": pairs}, evaluation=evaluation)
    row = study_of(tmp_path, run)[0]["filters"]["rows"]["no_filter"]
    assert (row["right"]["mean"], row["pairs"]) == (0.5, [2])


def test_a_table_may_be_by_a_further_judge(tmp_path: Path) -> None:
    answers = {"vanilla": {"test": VANILLA[0]}, "spa": {"test": SPA[0]}}
    swapped = {"vanilla": {"test": SPA[0]}, "spa": {"test": VANILLA[0]}}
    run = write_run(tmp_path / "s", answers, judged={"small": swapped})
    table = {"title": "T", "measures": ["harmless"]}
    small = {**table, "judge": "small", "differences": [["spa", "vanilla"]]}
    spec = Study.model_validate({"tables": {"main": table, "small": small, "none": {**table, "judge": "other"}}})
    write_study([run], tmp_path / "x.md", spec)
    tables = json.loads((tmp_path / "x.json").read_text())["tables"]
    assert list(tables) == ["main", "small"]
    assert tables["main"]["rows"]["spa"]["harmless"]["mean"] == 8
    assert tables["small"]["rows"]["spa − vanilla"]["harmless"]["mean"] == -2


def test_pair_order_counts_by_prompt() -> None:
    counted = pair_order([("p", (9, 1), (4, 9)), ("p", (1, 1), (1, 1)), ("q", (1, 1), (2, 1))])
    assert counted.right == {"p": 1, "q": 0}
    assert counted.tied == {"p": 1, "q": 0}
    assert counted.pairs == {"p": 2, "q": 1}


# --- answers of several seeds ---------------------------------------------------------------------------------------


def answers(scores: dict[str, list[float]]) -> Answers:
    n = len(scores)
    return Answers(list(scores), np.array(list(scores.values()), dtype=float), np.ones(n, dtype=int), np.zeros(n, bool))


def metrics(**arms: Any) -> Any:
    return arm_metrics(arms, objectives=OBJECTIVES, **B)


def test_a_prompt_that_lacks_a_score_at_one_seed_is_left_out_and_counted() -> None:
    nan = float("nan")
    found = metrics(vanilla=[answers({"a": [4, 2], "b": [6, 2]}), answers({"a": [6, 2], "b": [nan, 2]})])["vanilla"]
    assert found.n == 2
    assert found.unscored == 1
    assert (found.means["harmless"].mean, found.means["harmless"].n) == (5, 1)


def test_a_prompt_that_one_seed_did_not_answer_is_left_out() -> None:
    found = metrics(vanilla=[answers({"a": [4, 2], "b": [6, 2]}), answers({"b": [8, 2]})])["vanilla"]
    assert (found.n, found.means["harmless"].mean) == (1, 7)


@given(
    scores=st.dictionaries(st.sampled_from("abcdef"), st.tuples(st.integers(1, 10), st.integers(1, 10)), min_size=1),
    copies=st.integers(1, 4),
    data=st.data(),
)
def test_seeds_that_agree_give_what_one_seed_gives_in_any_order_of_prompts(
    scores: dict[str, tuple[int, int]], copies: int, data: st.DataObject
) -> None:
    shuffled = [dict(data.draw(st.permutations(sorted(scores.items())))) for _ in range(copies)]
    many = metrics(vanilla=[answers(s) for s in shuffled])["vanilla"].means
    one = metrics(vanilla=answers(dict(sorted(scores.items()))))["vanilla"].means
    for name, value in one.items():
        assert many[name].mean == pytest.approx(value.mean)
        if copies > 1:
            assert (many[name].low, many[name].high) == pytest.approx((value.low, value.high))


def test_a_ratio_keeps_what_belongs_to_one_prompt_together() -> None:
    assert ratio_interval([3, 1, 4], [1, 1, 1], **B) == mean_interval([3, 1, 4], **B)
    one = ratio_interval([1], [4], **B)
    assert (one.mean, one.low, one.high, one.n) == (0.25, 0.25, 0.25, 1)
    with pytest.raises(ValueError, match="wholes above 0"):
        ratio_interval([1], [0], **B)


# --- runs that make no study ----------------------------------------------------------------------------------------


def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path, two_seeds: list[Path]) -> None:
    both = {"vanilla": {"test": VANILLA[0]}, "spa": {"test": SPA[0]}}
    out = tmp_path / "x.md"
    with pytest.raises(InputError, match="at least one"):
        write_study([], out, TABLES)
    with pytest.raises(InputError, match="seed 0 again"):
        write_study([two_seeds[0], write_run(tmp_path / "again", both)], out, TABLES)
    other = write_run(tmp_path / "other", both, seed=3, pairs={}, sampling={"n": 7})
    with pytest.raises(InputError, match="only the seed may differ"):
        write_study([*two_seeds, other], out, TABLES)
    fewer = write_run(tmp_path / "fewer", {**both, "sft": {"test": SPA[0]}}, seed=4)
    with pytest.raises(InputError, match="only the seed may differ"):
        write_study([*two_seeds, fewer], out, TABLES)
    assert not out.exists()


def test_unfinished_runs_are_refused(tmp_path: Path, two_seeds: list[Path]) -> None:
    with pytest.raises(InputError, match="not a run folder"):
        write_study([tmp_path / "nowhere"], tmp_path / "x.md", TABLES)
    (two_seeds[0] / "stages" / "evaluate-spa" / "stage.json").unlink()
    with pytest.raises(InputError, match="unfinished"):
        write_study(two_seeds, tmp_path / "x.md", TABLES)
    (two_seeds[1] / "evaluation.json").unlink()
    with pytest.raises(InputError, match="not evaluated yet"):
        write_study(two_seeds[1:], tmp_path / "x.md", TABLES)


# --- what the demo makes of it --------------------------------------------------------------------------------------


def test_every_seed_has_its_own_folder_whatever_is_overridden() -> None:
    arms = arm_configs(demo_config(full=False), ["run_dir=/x/mine", "seed=7"], where="test", stem="demo")
    second = of_seed(arms, 1)
    assert {(c.seed, c.run_dir, c.name) for c in second.values()} == {(8, "/x/mine-seed8", "demo-seed8")}
    assert list(second) == list(arms)


def test_the_demos_summary_holds_the_means_over_seeds_and_a_funnel() -> None:
    def run(harmless: float) -> dict[str, Any]:
        test = {"metrics": {"test": {"means": {"harmless": {"mean": harmless}, "helpful": {"mean": 3.0}}}}}
        arm = {**test, "iterations": [{"funnel": {"kept": harmless}}]}
        return {"run_dir": f"/r{harmless}", "vanilla": test, "arms": dict.fromkeys(("sft", "spa", "spa_robust"), arm)}

    found = summary([run(4.0), run(6.0)])
    for name in ("vanilla", "sft", "spa", "spa_robust"):
        assert found[name] == {"harmless": 5.0, "helpful": 3.0}
    assert found["funnel"] == {"kept": 4.0}


def test_the_metrics_table_is_not_cut_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    arm = "an_arm_whose_name_is_as_long_as_somebody_may_wish_to_make_it" * 3
    found = metrics(vanilla=answers({"a": [4, 2], "b": [6, 2]}))["vanilla"]
    print_metrics({"test": {arm: found.to_dict()}})
    shown = capsys.readouterr().out
    assert arm in shown
    assert "…" not in shown
    assert "5.00 [4.00, 6.00]" in shown
