"""The RV curve: the published procedure on known scores, its control, and the stage that scores candidates again."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_ray.cli.demo import demo_config
from spa_ray.config import arm_configs
from spa_ray.data.episodes import EpisodeFolder
from spa_ray.data.schemas import EPISODES
from spa_ray.engine.idle import IdleEngine
from spa_ray.evaluation.metrics import rv_coefficient
from spa_ray.evaluation.rv import rv_curve, rv_markdown, rv_shape
from spa_ray.generation.setup import Task
from spa_ray.generation.setup import make_episodes as make_judging
from spa_ray.pipeline import recipe
from spa_ray.pipeline.commands import run_config
from spa_ray.pipeline.evaluate import write_table
from spa_ray.pipeline.judged import candidates, candidates_rv
from spa_ray.pipeline.plan import make_plan
from spa_ray.pipeline.preflight import eval_config
from spa_ray.pipeline.stage_keys import Known
from spa_ray.pipeline.stages import STAGES
from tests.preferences_tables import make_episodes, make_row
from tests.scripted import WEIGHTS, scripted_config

FEW: dict[str, Any] = {"ddof": 1, "resamples": 20, "seed": 0}


def scores(seed: int, prompts: int, n: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Whole ratings by two judges who see the same quality, the weak one worse."""
    rng = np.random.default_rng(seed)
    quality = rng.normal(5.5, 2, size=(prompts, n, 2))
    judges = (quality + rng.normal(0, noise, size=quality.shape) for noise in (2.0, 0.5))
    weak, strong = (np.clip(np.rint(found), 1, 10) for found in judges)
    return weak, strong


def det(rows: np.ndarray) -> float:
    return round(float(np.linalg.det(np.cov(rows.T))), 9)


@given(st.integers(0, 2**32 - 1), st.integers(2, 30))
@settings(max_examples=40, deadline=None)
def test_each_point_is_the_rv_of_the_rows_of_the_prompts_with_the_least_det(seed: int, prompts: int) -> None:
    weak, strong = scores(seed, prompts)
    curve = rv_curve(weak, strong, **FEW)
    order = sorted(range(prompts), key=lambda at: det(weak[at]))
    for count, largest, found in zip(curve.prompts, curve.det, curve.by_det, strict=True):
        assert largest == pytest.approx(det(weak[order[count - 1]]), abs=1e-8)
        rows = order[:count]
        expected = rv_coefficient(weak[rows].reshape(-1, 2), strong[rows].reshape(-1, 2))
        assert found is not None
        assert found.mean == pytest.approx(expected, abs=1e-9)
        assert found.n == count
    assert (curve.shares[-1], curve.prompts[-1]) == (1, prompts)


def test_all_prompts_are_the_same_in_any_order_and_the_band_holds_the_value() -> None:
    curve = rv_curve(*scores(0, 200), ddof=1, resamples=200, seed=0)
    last, control = curve.by_det[-1], curve.random[-1]
    assert last is not None
    assert control is not None
    assert control.low == pytest.approx(control.high) == pytest.approx(last.mean)
    assert last.low < last.mean < last.high
    assert curve == rv_curve(*scores(0, 200), ddof=1, resamples=200, seed=0)


def test_a_judge_that_errs_where_scores_spread_falls_off_by_det_and_not_in_random_order() -> None:
    """The paper's figure: agreement up to some share of the prompts, beyond it the weak judge's spread is noise."""
    weak, strong = scores(1, 400)
    rng = np.random.default_rng(2)
    near = np.rint(strong * 0.3 + 4)
    weak = np.where(np.arange(400)[:, None, None] % 3 == 0, rng.integers(1, 11, size=weak.shape), near)
    curve = rv_curve(weak, strong, ddof=1, resamples=100, seed=0)
    half, whole, control = curve.by_det[11], curve.by_det[-1], curve.random[11]
    assert half is not None
    assert whole is not None
    assert control is not None
    assert half.low > whole.high
    assert control.low < whole.mean < control.high


def test_candidates_without_both_scores_and_prompts_with_too_few_are_left_out() -> None:
    weak, strong = scores(3, 20)
    weak[0, 2:], strong[1, 0], weak[1, 1] = np.nan, np.nan, np.nan
    curve = rv_curve(weak, strong, **FEW)
    assert curve.prompts[-1] == 19
    rows = [(w, s) for w, s in zip(weak[1:].reshape(-1, 2), strong[1:].reshape(-1, 2), strict=True)]
    kept = [(w, s) for w, s in rows if np.isfinite([w, s]).all()]
    expected = rv_coefficient(*map(np.array, zip(*kept, strict=True)))
    assert curve.by_det[-1] is not None
    assert curve.by_det[-1].mean == pytest.approx(expected)
    nothing = rv_curve(weak[:1], strong[:1], **FEW)
    assert (nothing.prompts, nothing.by_det, nothing.det) == ([0] * 20, [None] * 20, [None] * 20)
    assert rv_markdown([asdict(nothing)]).splitlines()[-1] == "| 100% | 0 | none | none |"
    with pytest.raises(ValueError, match="shapes"):
        rv_curve(weak, strong[1:], **FEW)


def test_without_variance_there_is_no_rv() -> None:
    weak, strong = scores(4, 10)
    curve = rv_curve(weak, np.full_like(strong, 7.3), **FEW)
    assert curve.by_det == curve.random == [None] * len(curve.shares)


def test_the_table_has_the_range_over_seeds() -> None:
    one = {"shares": [0.5, 1.0], "prompts": [2, 4], "by_det": [None, {"mean": 0.5, "low": 0.4, "high": 0.6}]}
    one["random"] = one["by_det"]
    two = {**one, "by_det": [None, {"mean": 0.7, "low": 0.1, "high": 0.8}]}
    assert rv_markdown([one]).splitlines()[-1] == "| 100% | 4 | 0.500 [0.400, 0.600] | 0.500 [0.400, 0.600] |"
    assert rv_markdown([one, two]).splitlines()[-1].split(" | ")[2] == "0.600 [0.500, 0.700]"


# --- the stage --------------------------------------------------------------------------------------------------------


def configs(*overrides: str) -> Any:
    raw = {**demo_config(full=False), "arms": {"a": {}, "b": {"train.method": "sft"}, "c": {"sampling.n": 4}}}
    return arm_configs(raw, ["evaluation.rv=12", *overrides], where="test", stem="test")


def test_arms_with_the_same_candidates_share_the_pass_and_the_plan_counts_it() -> None:
    arms = configs()
    planned = [stage for stage in recipe.planned_stages(arms) if stage.stage == "rv"]
    assert [stage.arms for stage in planned] == [["a", "b"], ["c"]]
    assert not [s for s in recipe.planned_stages(configs("evaluation.rv=null")) if s.stage == "rv"]
    rows = [stage["rows"] for stage in make_plan(arms)["stages"] if stage["stage"] == "rv"]
    assert rows == [12, 12]


def test_its_key_covers_the_judge_and_how_many_prompts_and_no_other_key_covers_it() -> None:
    def key(stage: str, *overrides: str) -> str:
        return STAGES[stage].key(configs(*overrides)["a"], {}, Known(names=("judge",)))

    for changed in ("evaluation.rv=13", "evaluation.judge=self", "evaluation.objectives=[helpful, harmless]"):
        assert key("rv", changed) != key("rv")
    assert key("rv", "train.lr=1", "sampling.n=8") == key("rv")
    for stage in ("generate", "build", "train", "evaluate"):
        assert key(stage, "evaluation.rv=13") == key(stage)


def test_both_judges_scores_meet_by_prompt_and_place(tmp_path: Path) -> None:
    """The stage's own steps, without Ray: which rows are asked, what the judge's rows become, the curve of both."""
    config = scripted_config(evaluation={"judge": "tests.study_runs:judge", "bootstrap": 20})
    weak, strong = scores(5, 12)
    rows = [
        {**make_row([*map(list, own), None], [9, 9], prompt_id=f"{at:02}"), "meta": '{"known": true}', "attempt": 0}
        for at, own in enumerate(weak)
    ]
    for row, theirs in zip(rows, strong, strict=True):
        for response, (a, b) in zip(row["responses"][:5], theirs, strict=True):
            response |= {"text": f"{a:g}/{b:g}", "finish_reason": "stop"}
        row["responses"][5] |= {"text": "9/1", "finish_reason": "stop"}  # which the run's own judge did not score
    rows.append({**make_row([[1, 1]], prompt_id="00 failed"), "meta": "{}", "error": "timeout"})
    asked = candidates(make_episodes(rows, config), 10).to_pylist()
    assert [row["prompt_id"] for row in asked] == [f"{at:02}" for at in range(10)]
    judged = eval_config(config)
    house = make_judging(judged, Task(kind="score"), IdleEngine(judged.model, WEIGHTS), WEIGHTS, None)
    answered = [asyncio.run(house.score({**row, "prompt_tokens": 0, "generated_tokens": 0})) for row in asked]
    for name, found in (("weak", rows), ("strong", answered)):
        write_table(pa.Table.from_pylist(found, EPISODES), tmp_path / name / "part.parquet")
    curve = candidates_rv(config, tmp_path / "weak", tmp_path / "strong")
    expected = rv_curve(weak[:10], strong[:10], ddof=1, resamples=20, seed=config.seed)
    assert curve == json.loads(json.dumps(asdict(expected)))


@pytest.mark.engine
@pytest.mark.long
def test_a_run_s_candidates_are_scored_by_the_evaluation_s_judge(tmp_path: Path, ray_session: None) -> None:
    small = ["prompts.limit=16", "evaluation.prompts.limit=8", "train.batch_size=8", "denoise.consistency=off"]
    small += ["denoise.informativeness=false", "train.max_steps=1", "evaluation.bootstrap=50"]
    raw = {**demo_config(full=False), "arms": {"sft": {"train.method": "sft"}, "simpo": {"train.method": "spa_simpo"}}}
    arms = arm_configs(raw, ["evaluation.rv=12", f"run_dir={tmp_path}", *small], where="test", stem="test")
    result = run_config(arms, until="evaluate", verbose=False)
    (curve,) = json.loads((tmp_path / "rv.json").read_text())
    assert curve["arms"] == ["sft", "simpo"]
    assert curve["prompts"][-1] <= 12
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert {*record["benchmarks"]} == set()
    (stage,) = {*record["judges"]["rv"].values()}
    strong = EpisodeFolder(tmp_path / "stages" / stage / "episodes").table().to_pylist()
    weak = EpisodeFolder(Path(result["arms"]["sft"]["iterations"][0]["episodes"])).table().to_pylist()
    texts = {(row["prompt_id"], r["index"]): r["text"] for row in weak for r in row["responses"]}
    assert len(strong) == 12
    for row in strong:
        assert [r["kind"] for r in row["responses"]] == ["candidate"] * 5
        for response in row["responses"]:
            assert response["text"] == texts[row["prompt_id"], response["index"]]
            assert all(1 <= score <= 10 for score in response["scores"])
    again = run_config(arms, until="evaluate", verbose=False)
    assert again["arms"] == result["arms"]


@pytest.mark.parametrize(
    ("late", "said"),
    [
        ([0.8] * 4 + [0.5] * 12, "a sharp drop."),
        ([0.8 - 0.02 * k for k in range(16)], "a gradual fall."),
        ([0.8 + 0.01 * k for k in range(16)], "no drop at every seed."),
    ],
)
@pytest.mark.parametrize(("early", "steady"), [([0.2, 0.9, 0.1, 0.8], "unsteady"), ([0.8] * 4, "no less steady")])
def test_a_curve_s_shape_is_laid_beside_the_paper_s(
    early: list[float], steady: str, late: list[float], said: str
) -> None:
    points = [{"mean": mean, "low": mean, "high": mean, "n": 1} for mean in early + late]
    chance = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 1}
    curve = {"shares": [k / 20 for k in range(1, 21)], "by_det": points, "random": [chance] * 20}
    found = rv_shape([curve, {**curve, "by_det": [None, *points[1:]]}])  # a first share without variance
    assert found.endswith(said)
    assert f"Ours is {steady} below 20 %" in found
    flat = {**curve, "by_det": [None] * 20}
    assert rv_shape([curve, flat]).startswith("Nothing is to be said")
    wide = {**curve, "random": [{**chance, "high": 0.9}] * 20}
    assert rv_shape([curve, wide]).endswith("no drop at every seed.")  # what chance shows as well is none
