"""Sections on answers that should have certain scores: sensed scores, steering, costs, the radar chart, two runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from spa_ray.config.study import PaperFigure, StudyTable
from spa_ray.errors import InputError
from spa_ray.evaluation.answers import FamilyAnswers
from spa_ray.evaluation.prompts import MAIN_FAMILY
from spa_ray.evaluation.published import Published
from spa_ray.evaluation.reproduction import AGREES, compare, win_rates_section
from spa_ray.evaluation.steered import cost_section, sensed_section, steering, steering_section
from spa_ray.evaluation.study import Measured, SeedRun, together
from spa_ray.evaluation.tables import Answers
from spa_ray.pipeline.study import arm_model, read_costs
from spa_ray.report.charts import radar
from spa_ray.report.svg import alone
from tests.study_runs import write_run

NAMES = ["harmless", "bold"]
Rows = list[dict[str, float]]


def answers(given: Any, /, **beside: Rows) -> Answers:
    found = np.array(given, dtype=float)
    n = len(found)
    return Answers([f"p{i}" for i in range(n)], found, np.ones(n, dtype=int), np.zeros(n, bool), beside=beside)


def measured(*seeds: Mapping[str, Answers]) -> Measured:
    runs = [
        SeedRun(k, {arm: {MAIN_FAMILY: FamilyAnswers(found, {}, 0)} for arm, found in seed.items()})
        for k, seed in enumerate(seeds)
    ]
    return Measured(runs, NAMES, 200, 0)


def both(harmless: float, bold: float) -> dict[str, float]:
    return {"harmless": harmless, "bold": bold}


def test_sensed_scores_are_set_against_the_medians_over_all_seeds() -> None:
    truth = [both(0.0, 0.5), both(0.5, 0.5), both(1.0, 0.5), both(0.9, 0.9)]
    cues: Rows = [{"bold": 1}, {"bold": 1}, {"bold": -1}, {}]
    seeds = [
        {"sga": answers(np.zeros((4, 2)), scores=truth, cues=cues, sensed=[both(d, 0.5) for d in column])}
        for column in ((0.1, 0.6, 0.9, 0), (0.3, 0.8, 0.7, 0))
    ]
    text, data = sensed_section(measured(*seeds), ["sft", "sga"])
    # sensed: (.05 + .05 + .05) / 3 and (.15 + .15 + .15) / 3; the constant (.5, .5): (.25 + 0 + .25) / 3
    found = data["sga"][""]
    assert (found["sensed"]["mean"], found["constant"]["mean"]) == pytest.approx((0.1, 1 / 6))
    assert found["gain"]["mean"] == pytest.approx(0.4)
    assert found["gain"]["low"] <= 0.4 <= found["gain"]["high"]
    # half of the errors are 0 (bold); .1 three times, of rounding, and .3 three times
    assert data["sga"]["shares"][""][0] >= 0.5
    assert sum(data["sga"]["shares"][""]) == pytest.approx(1)
    assert "| sga | the best annotated answer's scores | 0.10 [" in text


def test_what_a_level_moves_is_told_and_what_it_lowers_is_in_conflict() -> None:
    levels = [0.0, 0.5, 1.0] * 4
    up = [[0.9 - 0.5 * level, 0.2 + 0.6 * level] for level in levels]
    asked: Rows = [{"bold": level} for level in levels]
    steered = measured({"levels": answers(up, levels=asked), "sft": answers(up)})
    found = steering(steered, "levels")
    assert found["bold"]["bold"].mean == pytest.approx(1)  # type: ignore[union-attr]
    assert found["bold"]["harmless"].mean == pytest.approx(-1)  # type: ignore[union-attr]
    assert found["harmless"] == {"harmless": None, "bold": None}  # nothing was asked of it
    text, _ = steering_section(steered, ["levels", "none"])
    assert "In conflict: bold lowers harmless." in text
    assert steering(steered, "sft") == {}


def test_two_runs_are_one_table_in_which_a_start_has_its_arms_name() -> None:
    core = measured({"vanilla": answers([[0.1, 0.1]]), "sga": answers([[0.2, 0.2]])})
    later = measured({"vanilla": answers([[0.3, 0.3]]), "spa_sga": answers([[0.4, 0.4]])})
    joined = together(later, core, "spa")
    assert joined.arms == ["vanilla", "sga", "spa", "spa_sga"]
    assert joined.metrics(MAIN_FAMILY, ["spa"], "sga")["spa"].differences["bold"].mean == pytest.approx(0.1)
    with pytest.raises(ValueError, match="with arms"):
        together(later, core, "sga")


def test_a_published_table_may_have_our_rows_as_columns() -> None:
    paper = Published("T", ["SFT", "SGA"], {"one": [40.0, 50.0], "two": [30.0, 31.0]})
    assert paper.turned().rows == {"SFT": [40.0, 30.0], "SGA": [50.0, 31.0]}
    reference = [both(0.5, 0.5)] * 3
    arms = {name: answers([[v, v]] * 3, reference_scores=reference) for name, v in (("sft", 0.4), ("sga", 0.6))}
    section = {"table": "t", "turned": True, "rows": {"sft": "SFT", "sga": "SGA"}, "compare": [["sga", "sft"]]}
    columns = {"win rate": ["one", "two"]}
    spec = StudyTable.model_validate({"title": "T", "measures": ["win rate"], "paper": {**section, "columns": columns}})
    (found,) = compare(measured(arms), spec, paper)
    assert (found.paper, found.ours.mean, found.verdict) == ([10.0, 1.0], 1.0, AGREES)


def test_against_references_a_tie_is_no_win() -> None:
    rate = {"wins": 1, "ties": 2, "losses": 1}
    seeds = [{"sga": {"against": "reference", "families": {"test": {"harmless": rate}}}}]
    assert "| sga | 1 / 2 / 1  25.0% |" in win_rates_section(PaperFigure(title="F"), seeds)


def test_costs_are_means_over_the_seeds() -> None:
    seeds = [
        {"modpo": {"training, s": 2.0, "further models, s": 8.0}},
        {"modpo": {"training, s": 4.0, "further models, s": 8.0}},
    ]
    text, data = cost_section(seeds, ["sft", "modpo"])
    assert data == {"modpo": {"training, s": 3.0, "further models, s": 8.0}}
    assert "| modpo | 3.0 | 8.0 |" in text


def test_a_run_tells_what_its_training_took_and_where_a_model_is(tmp_path: Path) -> None:
    scores = {"test": {"a": (1, 1)}}
    run = write_run(tmp_path / "run", {"vanilla": scores, "modpo": scores})
    for name, seconds in (("train-1", 3.0), ("train-2", 4.0)):
        (run / "stages" / name).mkdir()
        (run / "stages" / name / "stage.json").write_text(json.dumps({"seconds": seconds}))
    stages = {"build": "build-modpo", "train": "train-1", "train:margin_bold": "train-2"}
    record = {"stages": stages, "model": str(run / "stages" / "train-1" / "model")}
    (run / "arms" / "modpo" / "iter_1.json").write_text(json.dumps(record))
    assert read_costs(run) == {"modpo": {"training, s": 3.0, "further models, s": 4.0}}
    assert arm_model(run, "modpo") == run / "stages" / "train-1" / "model"
    with pytest.raises(InputError, match="arm spa has no model"):
        arm_model(run, "spa")


def test_a_radar_chart_is_a_picture_of_its_own_with_a_corner_for_every_mean() -> None:
    series = {f"arm{k}": [0.1 * k, 0.5, 0.9] for k in range(4)}
    root = ElementTree.fromstring(alone(radar(series, ["a", "b", "<c>"])))
    texts = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"arm0", "arm3", "a", "b", "<c>"} <= set(texts)
    titles = [node.text for node in root.iter("{http://www.w3.org/2000/svg}title")]
    assert sum(": " in str(title) for title in titles) == 12
