"""A method that needs other models first: which stages that makes, what the loss sees of them, and a whole run."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spa_ray.config import Config, arm_configs
from spa_ray.errors import InputError
from spa_ray.pipeline.recipe import planned_stages
from spa_ray.training.loop import run_job
from spa_ray.training.method import method_of
from spa_ray.training.prepare import fingerprint
from tests.test_plugs import spa_run
from tests.training_support import make_job, pair_rows, write_pairs

EXAMPLE = Path(__file__).parents[1] / "docs" / "examples" / "margin.py"
METHOD = "margin:Margin"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copy(EXAMPLE, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "margin", raising=False)
    return tmp_path


def arms(**given: Any) -> dict[str, Config]:
    raw = {"model": {"path": "org/some-8B"}, "arms": {"spa": {}, "modpo": {"train.method": METHOD, **given}}}
    return arm_configs(raw, [], where="test", stem="test")


def stages(configs: dict[str, Config]) -> dict[tuple[str, str], str]:
    return {(stage.stage, arm): stage.key for stage in planned_stages(configs) for arm in stage.arms}


def test_its_models_are_stages_of_their_own_on_the_same_episodes(home: Path) -> None:
    found = stages(arms())
    assert found["generate", "spa"] == found["generate", "modpo"]
    assert found["build", "spa"] == found["build", "modpo"] != found["build:margin", "modpo"]
    assert list(found)[-3:] == [("train:margin", "modpo"), ("train", "spa"), ("train", "modpo")]


def test_a_changed_model_starts_the_training_that_reads_it_again_and_no_other(home: Path) -> None:
    before, after = stages(arms()), stages(arms(**{"train.lr": 1e-7}))
    assert {key for key in before if before[key] != after[key]} == {("train:margin", "modpo"), ("train", "modpo")}
    other = stages(arms(**{"train.share": 0.7}))
    assert {key for key in before if before[key] != other[key]} == {("train", "modpo")}


def test_a_recipe_of_keys_that_are_none_is_told(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = type(method_of(arms()["modpo"].train))
    monkeypatch.setattr(method, "recipe", lambda self, objectives: {"margin": {"pairs.ordr": "pareto"}})
    with pytest.raises(InputError, match=r"margin:Margin: recipe \(arm margin\): pairs\.ordr: unknown key"):
        planned_stages(arms())


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        ({"model": {}}, "recipe: model: a name is letters, digits and _, and none of pairs, model, base"),
        ({"a/b": {}}, "recipe: a/b: a name is letters"),
        ({"a": {"sampling.n": 7}}, "recipe: a: sampling.n: such a model differs in denoise, pairs, train alone"),
        ({"a": {"train.method": METHOD}}, "recipe: a: margin:Margin has a recipe itself"),
    ],
)
def test_what_a_recipe_cannot_do_is_told(
    home: Path, monkeypatch: pytest.MonkeyPatch, recipe: dict[str, Any], told: str
) -> None:
    monkeypatch.setattr(type(method_of(arms()["modpo"].train)), "recipe", lambda self, objectives: recipe)
    with pytest.raises(InputError, match=told):
        planned_stages(arms())


@pytest.mark.engine
@pytest.mark.usefixtures("one_process")
def test_the_loss_sees_the_other_models_log_probs(home: Path, tiny_model: Path) -> None:
    pairs = write_pairs(home / "pairs" / "pairs.parquet", pair_rows(8))
    one = {"batch_size": 8, "max_steps": 1, "beta": 0.5}
    other = make_job(home, tiny_model, pairs, name="other", method="spa_dpo", lr=1e-2, epochs=3, batch_size=8)
    run_job(other)
    moved = make_job(home, other.out, pairs, name="moved", method="spa_dpo", **one)  # for its reference log-probs
    start = make_job(home, tiny_model, pairs, name="start", method="spa_dpo", **one)
    job = replace(make_job(home, tiny_model, pairs, name="ours", method=METHOD, **one), models={"margin": other.out})
    for each in (moved, start, job):
        run_job(each)

    def reference(of: Any) -> np.ndarray:
        (file,) = of.work.glob("reference_*.npz")
        with np.load(file) as saved:
            return saved["summed"]

    log = json.loads((job.work / "train_log.jsonl").read_text().splitlines()[0])
    kept = {file.name for file in job.work.glob("reference_*.npz")}
    assert kept == {next(each.work.glob("reference_*.npz")).name for each in (moved, start)}
    change = reference(moved) - reference(start)
    assert np.abs(change).max() > 0.1
    assert log["margins"] != 0
    # At the first step the policy is its reference, so the margins alone are in the loss.
    assert log["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert log["loss"] == pytest.approx(np.log(2), abs=abs(log["margins"]) + 1)
    assert log["loss"] != pytest.approx(np.log(2), abs=1e-6)


@pytest.mark.engine
@pytest.mark.usefixtures("one_process")
def test_without_its_models_a_job_is_refused(home: Path, tiny_model: Path) -> None:
    pairs = write_pairs(home / "pairs" / "pairs.parquet", pair_rows(8))
    job = make_job(home, tiny_model, pairs, method=METHOD)
    with pytest.raises(InputError, match=r"margin:Margin trains the model 'margin' first; use `spa run`"):
        run_job(job)
    assert fingerprint(job) != fingerprint(replace(job, models={"margin": tiny_model}))


@pytest.mark.engine
@pytest.mark.long
def test_a_run_trains_them_first_and_resumes(home: Path) -> None:
    from spa_ray.cli.demo import demo_config

    raw = {**demo_config(full=False), "arms": {"modpo": {"train.method": METHOD, "profile": "robust"}}}
    raw |= {"evaluation": {}, "run_dir": str(home / "run")}
    raw["prompts"]["limit"], raw["train"]["batch_size"] = 96, 16
    (home / "c.yaml").write_text(json.dumps(raw))
    first, again = (spa_run(home, "--until", "train") for _ in range(2))
    assert first.returncode == 0, first.stderr[-3000:]
    record = json.loads((home / "run" / "arms" / "modpo" / "iter_1.json").read_text())
    assert {"build", "build:margin", "train", "train:margin"} <= set(record["stages"])
    assert len({record["stages"]["train"], record["stages"]["train:margin"]}) == 2
    log = next((home / "run" / "stages" / record["stages"]["train"]).rglob("train_log.jsonl"))
    assert json.loads(log.read_text().splitlines()[-1])["margins"] != 0
    assert again.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]
    assert "steps" not in again.stderr  # nothing is trained again
