"""seq-rep-n: the share of an answer's n-grams that are not new."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spa_ray.evaluation.answers import read_answers
from spa_ray.evaluation.repetition import repetition
from spa_ray.evaluation.tables import arm_metrics, markdown

IDS = st.lists(st.integers(0, 5), max_size=40)


@pytest.mark.parametrize(
    ("ids", "n", "share"),
    [
        ([], 3, 0.0),
        ([7, 7], 3, 0.0),  # too short to have a 3-gram
        ([1, 2, 3, 4, 5], 3, 0.0),
        ([7, 7, 7, 7], 3, 0.5),  # two 3-grams, the same
        ([7] * 102, 3, 0.99),
        ([1, 2, 3, 1, 2, 3], 3, 0.25),  # 123 231 312 123
        ([1, 1, 2, 2], 1, 0.5),
    ],
)
def test_it_is_counted_by_hand(ids: list[int], n: int, share: float) -> None:
    assert repetition(ids, n) == pytest.approx(share)


@given(IDS, st.integers(1, 5))
def test_it_is_a_share_below_one(ids: list[int], n: int) -> None:
    assert 0 <= repetition(ids, n) < 1


@given(IDS.filter(lambda ids: len(ids) > 3))
def test_saying_it_all_again_repeats_more(ids: list[int]) -> None:
    assert repetition(ids * 2) > repetition(ids)


@given(st.permutations(range(30)), st.integers(1, 5))
def test_different_tokens_repeat_nothing(ids: list[int], n: int) -> None:
    assert repetition(ids, n) == 0


def test_an_n_gram_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="n is 0"):
        repetition([1], 0)


def test_the_metrics_of_an_arm_say_how_much_its_answers_repeat(tmp_path: Path) -> None:
    answers = {"a": [7] * 102, "b": [1, 2, 3, 4]}
    rows = [
        {
            "prompt_id": name,
            "meta": json.dumps({"family": "main"}),
            "responses": [{"token_ids": ids, "text": "this", "scores": [5.0, 5.0]}],
            "error": None,
        }
        for name, ids in answers.items()
    ]
    schema = pa.Table.from_pylist(rows).schema
    schema = schema.set(schema.get_field_index("error"), pa.field("error", pa.string()))
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "episodes.parquet")
    family = read_answers(tmp_path)["main"]
    metrics = arm_metrics({"spa": family.answers}, objectives=["x", "y"], baseline=None, resamples=10, seed=0)["spa"]
    assert metrics.means["repetition"].mean == pytest.approx(0.99 / 2)
    assert "repetition" in markdown({"spa": metrics}).splitlines()[0]
