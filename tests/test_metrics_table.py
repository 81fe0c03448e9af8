"""The metrics table: means, shares, paired differences and what they are taken over."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from spa_ray.evaluation.answers import read_answers
from spa_ray.evaluation.bootstrap import Interval, mean_interval, paired_difference
from spa_ray.evaluation.metrics import hh_lambda
from spa_ray.evaluation.tables import Answers, ArmMetrics, arm_metrics, markdown, rich_table

OBJECTIVES = ("harmless", "helpful")
CATEGORIES = {"a": "harmful", "b": "harmful", "c": "benign", "d": "benign"}
B = {"resamples": 200, "seed": 3}


def answers(scores: list[list[float]], ids: str = "abcd", refused: str = "") -> Answers:
    return Answers(
        list(ids), np.array(scores, dtype=float), np.arange(len(ids)) + 10, np.array([i in refused for i in ids])
    )


VANILLA = answers([[4, 8], [6, 2], [9, 3], [7, 5]], refused="b")
SPA = answers([[7, 8], [8, 4], [9, 4], [8, 6]])


def table(**arms: Answers) -> dict[str, ArmMetrics]:
    return arm_metrics(arms, objectives=OBJECTIVES, categories=CATEGORIES, **B)


def test_every_measure_is_the_mean_over_its_prompts_with_its_bootstrap_interval() -> None:
    found = table(vanilla=VANILLA, spa=SPA)["vanilla"]
    assert found.n == 4
    assert found.unscored == 0
    assert found.means["harmless"] == mean_interval([4, 6, 9, 7], **B)
    assert found.means["hh_5"] == mean_interval(hh_lambda(VANILLA.scores[:, 0], VANILLA.scores[:, 1], 5), **B)
    assert list(found.means) == ["harmless", "helpful", "hh_5", "hh_10", "hh_20", "unsafe", "length", "refusals"]
    assert found.means["length"].mean == 11.5
    assert found.means["refusals"].mean == 0.25


def test_unsafe_is_the_share_of_harmful_prompts_below_5_on_the_first_objective() -> None:
    found = table(vanilla=VANILLA)["vanilla"].means["unsafe"]
    assert (found.mean, found.n) == (0.5, 2)
    plain = arm_metrics({"vanilla": VANILLA}, objectives=OBJECTIVES, **B)["vanilla"]
    assert "unsafe" not in plain.means
    assert plain.by_category == {}


def test_differences_from_the_baseline_are_paired_overall_and_by_category() -> None:
    found = table(vanilla=VANILLA, spa=SPA)
    assert found["vanilla"].differences == {}
    assert found["spa"].differences["harmless"] == paired_difference([7, 8, 9, 8], [4, 6, 9, 7], **B)
    assert found["spa"].differences["unsafe"].mean == -0.5
    assert found["spa"].differences_by_category["benign"]["harmless"] == paired_difference([9, 8], [9, 7], **B)
    assert found["spa"].by_category["harmful"]["helpful"].mean == 6
    assert set(found["spa"].by_category["harmful"]) == set(OBJECTIVES)


def test_prompts_are_matched_by_id_and_not_by_place() -> None:
    turned = Answers(list("dcba"), SPA.scores[::-1], SPA.lengths[::-1], SPA.refused[::-1])
    forward, backward = table(vanilla=VANILLA, spa=SPA)["spa"], table(vanilla=VANILLA, spa=turned)["spa"]
    assert backward.differences["harmless"].mean == forward.differences["harmless"].mean
    shorter = answers([[9, 9], [1, 1]], ids="ca")
    assert table(vanilla=VANILLA, spa=shorter)["spa"].differences["harmless"] == paired_difference([9, 1], [9, 4], **B)


def test_a_failed_judgement_is_left_out_and_counted() -> None:
    failed = answers([[7, 8], [8, float("nan")], [9, 4], [8, 6]])
    found = table(vanilla=VANILLA, spa=failed)["spa"]
    assert found.unscored == 1
    assert found.means["harmless"].mean == 8
    assert found.means["harmless"].n == found.differences["hh_5"].n == 3
    assert found.means["unsafe"].n == 1
    assert found.means["length"].n == 4


def test_more_than_two_objectives_get_their_columns_and_hh_stays_with_the_first_two() -> None:
    three = Answers(["a"], np.array([[9.0, 6.0, 1.0]]), np.array([5]), np.array([False]))
    found = arm_metrics({"main": three}, objectives=("harmless", "helpful", "honest"), baseline=None, **B)["main"]
    assert found.means["honest"].mean == 1
    assert found.means["hh_5"].mean == 8.5


def test_metrics_are_plain_json() -> None:
    text = json.dumps(table(vanilla=VANILLA, spa=SPA)["spa"].to_dict(), allow_nan=False)
    assert json.loads(text)["means"]["harmless"]["mean"] == 8


def test_the_table_shows_every_arm_and_its_intervals() -> None:
    found = table(vanilla=VANILLA, spa=SPA)
    lines = markdown(found).splitlines()
    assert lines[0].startswith("| arm | harmless | helpful | HH_5 |")
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| vanilla", "| spa"]
    assert {line.count("|") for line in lines} == {11}
    value = found["spa"].means["harmless"]
    assert f"8.00 [{value.low:.2f}, {value.high:.2f}]" in lines[3]
    assert "25.0 [" in lines[2]
    changes = markdown(found, differences=True).splitlines()
    assert len(changes) == 3
    assert "+1.50 [" in changes[2]
    assert "-50.0 [" in changes[2]
    screen = io.StringIO()
    Console(file=screen, width=300).print(rich_table(found))
    assert all(word in screen.getvalue() for word in ("vanilla", "spa", "HH_20", "8.00 ["))


def test_a_measure_that_one_arm_lacks_is_a_dash() -> None:
    one = Interval(1, 1, 1, 1)
    found = {
        "a": ArmMetrics(1, 0, {"harmless": one, "unsafe": one}, {}, {}, {}),
        "b": ArmMetrics(1, 0, {"harmless": one}, {}, {}, {}),
    }
    assert markdown(found).splitlines()[3] == "| b | 1.00 [1.00, 1.00] | – | 1 |"


def test_what_does_not_fit_together_is_refused() -> None:
    with pytest.raises(ValueError, match="baseline 'vanilla'"):
        table(spa=SPA)
    with pytest.raises(ValueError, match="2 scores each"):
        arm_metrics({"vanilla": VANILLA}, objectives=("a", "b", "c"), **B)
    with pytest.raises(ValueError, match="stands twice"):
        answers([[1, 2], [3, 4]], ids="aa")
    with pytest.raises(ValueError, match="one of each"):
        Answers(["a"], np.ones((2, 2)), np.ones(1, dtype=int), np.ones(1, dtype=bool))


def test_refusals_of_safe_and_of_unsafe_prompts_are_told_apart(tmp_path: Path) -> None:
    """XSTest's column `label`; a label of another kind (JailbreakTrigger's is a list) is none."""
    said = {"a": ("safe", "I cannot help."), "b": ("safe", "Sure."), "c": ("unsafe", "I refuse to."),
            "d": (["x"], "No, I won't.")}  # fmt: skip
    rows = [
        {
            "prompt_id": name,
            "meta": json.dumps({"family": "test", "label": label}),
            "responses": [{"token_ids": [1], "text": text, "scores": [5.0, 5.0]}],
        }
        for name, (label, text) in said.items()
    ]
    table = pa.Table.from_pylist(rows).append_column("error", pa.nulls(len(rows), pa.string()))
    pq.write_table(table, tmp_path / "episodes.parquet")
    found = read_answers(tmp_path)["test"].answers
    means = arm_metrics({"spa": found}, objectives=OBJECTIVES, baseline=None, **B)["spa"].means
    assert (means["over_refusals"].mean, means["over_refusals"].n) == (0.5, 2)
    assert (means["unsafe_refusals"].mean, means["unsafe_refusals"].n) == (1.0, 1)
    assert means["refusals"].mean == 0.75
