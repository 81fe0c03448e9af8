"""Training methods as plugs: by name, or a class in a file of the user's own."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spa_ray.config import load_config
from spa_ray.config.plugs import METHODS, to_ship
from spa_ray.config.training import method_class, train_section
from spa_ray.errors import InputError
from spa_ray.pipeline.plan import make_plan
from spa_ray.pipeline.recipe import planned_stages
from spa_ray.training.loop import run_job
from spa_ray.training.prepare import fingerprint
from tests.training_support import make_job, pair_rows, write_pairs

EXAMPLE = Path(__file__).parents[1] / "docs" / "examples" / "slic.py"
METHOD = "slic:SLiC"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with the documented method in a file."""
    shutil.copy(EXAMPLE, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "slic", raising=False)
    yield tmp_path
    sys.modules.pop("slic", None)


def edit(home: Path) -> None:
    file = home / "slic.py"
    file.write_text(file.read_text().replace("beta * (chosen", "2 * beta * (chosen"))


def config(home: Path, arms: dict[str, Any]) -> dict[str, Any]:
    path = home / "run.yaml"
    prompts = home / "prompts.jsonl"
    prompts.write_text('{"prompt": "hello"}\n')
    path.write_text(
        json.dumps({"model": {"path": "org/8b"}, "prompts": {"source": str(prompts)}, "arms": arms}), encoding="utf-8"
    )
    return load_config(path)


ARMS = {"spa": {}, "slic": {"train.method": METHOD, "train.margin": 0.5}}


@pytest.mark.engine
@pytest.mark.usefixtures("one_process")
def test_a_method_in_a_users_file_trains_with_keys_and_statistics_of_its_own(home: Path, tiny_model: Path) -> None:
    pairs = write_pairs(home / "pairs" / "pairs.parquet", pair_rows(24))
    for name, margin in (("narrow", 0.01), ("wide", 5.0)):
        run_job(make_job(home, tiny_model, pairs, name=name, method=METHOD, margin=margin, epochs=2))
    rows = {name: json.loads((home / name / "work" / "train_log.jsonl").read_text().splitlines()[-1]) for name in
            ("narrow", "wide")}  # fmt: skip
    assert rows["wide"]["hinge/active"] == 1.0
    assert rows["narrow"]["hinge/active"] < 1.0
    assert rows["wide"]["loss"] > rows["narrow"]["loss"]
    assert rows["wide"]["rewards/margins"] != rows["narrow"]["rewards/margins"]
    assert (home / "wide" / "model" / "model.safetensors").is_file()


def test_its_source_is_part_of_its_own_train_stage_and_of_no_other(home: Path) -> None:
    def keys() -> dict[tuple[str, str], str]:
        return {(stage.stage, arm): stage.key for stage in planned_stages(config(home, ARMS)) for arm in stage.arms}

    before = keys()
    edit(home)
    after = keys()
    assert {key for key in before if before[key] != after[key]} == {("train", "slic")}


def test_a_checkpoint_of_another_source_is_not_resumed(home: Path, tiny_model: Path) -> None:
    pairs = write_pairs(home / "pairs" / "pairs.parquet", pair_rows(4))
    job = make_job(home, tiny_model, pairs, method=METHOD)
    before = fingerprint(job)
    assert fingerprint(job) == before
    edit(home)
    assert fingerprint(job) != before


def test_a_plan_knows_it_without_an_entry_anywhere(home: Path) -> None:
    plan = make_plan(config(home, {**ARMS, "hot": {**ARMS["slic"], "train.lr": 1e-3}}))
    assert plan["arms"]["slic"]["train"]["method"] == METHOD
    assert plan["arms"]["slic"]["train"]["lr"] == 5e-7
    assert not any("train.lr" in note and "far above" in note for note in plan["arms"]["slic"]["notes"])
    assert any("train.lr" in note and "far above" in note for note in plan["arms"]["hot"]["notes"])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"train.margn": 1}, "train.margn: unknown key; did you mean train.margin?"),
        ({"train.margin": "wide"}, "train.margin: must be a number, got 'wide'"),
        ({"train.margin": -1}, "train.margin: must be a number, above 0, got -1"),
        ({"train.beta": 0}, "train.beta: must be a number, above 0, got 0"),
        ({"train.method": "slic:Slic"}, "train.method: 'slic:Slic': the module slic has no 'Slic'"),
        ({"train.method": "slick:SLiC"}, "train.method: 'slick:SLiC': there is no module slick"),
        ({"train.method": "json:dumps"}, "train.method: 'json:dumps' is no method"),
    ],
)
def test_a_wrong_key_or_name_is_told_in_one_line(home: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError) as error:
        config(home, {"main": {**ARMS["slic"], **changes}})
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_a_method_without_a_learning_rate_of_its_own_asks_for_one(home: Path) -> None:
    (home / "bare.py").write_text("from spa_ray import Method\n\n\nclass Bare(Method):\n    pass\n")
    try:
        with pytest.raises(InputError, match=r"train: lr: bare:Bare has no default; give a peak learning rate"):
            config(home, {"main": {"train.method": "bare:Bare"}})
        assert config(home, {"main": {"train.method": "bare:Bare", "train.lr": 1e-5}})["main"].train.lr == 1e-5
    finally:
        sys.modules.pop("bare", None)


def test_a_file_that_cannot_be_imported_is_told_with_its_line(home: Path) -> None:
    (home / "slic.py").write_text("class SLiC:\n    Config =\n")
    with pytest.raises(InputError, match=r"slic:2 cannot be imported \(SyntaxError"):
        config(home, ARMS)


def test_the_package_is_not_sent_to_nodes_and_a_users_file_is(home: Path) -> None:
    assert to_ship([METHOD, "spa", "spa_ray.microworld.oracle:judge", "numpy:mean"]) == [str(home / "slic.py")]


def test_an_anchor_adds_the_chosens_cross_entropy_to_spas_loss() -> None:
    import torch

    from spa_ray.training.method import LossInputs, method_of

    logps = torch.tensor([-4.0, -9.0, -6.0, -2.0], dtype=torch.float64, requires_grad=True)
    counts = torch.tensor([2, 3, 4, 1])
    sides, weights = torch.tensor([[0, 1], [2, 3]]), torch.tensor([0.5, 1.5], dtype=torch.float64)
    losses = {}
    for name in ("spa", "spa_anchor"):
        section = train_section({"method": name, "beta": 2.0, "gamma": 0.5})
        losses[name], stats = method_of(section).loss(LossInputs(logps, counts, sides, weights))
    mean = torch.tensor([-2.0, -1.5], dtype=torch.float64)
    assert train_section({"method": "spa_anchor"}).anchor == 0.1
    torch.testing.assert_close(losses["spa_anchor"] - losses["spa"], -0.1 * mean)
    torch.testing.assert_close(stats["nll_loss"], -mean)


@pytest.mark.parametrize("name", METHODS)
def test_a_key_that_only_another_method_reads_is_taken(name: str) -> None:
    """Arms of several methods share one `train` section."""
    assert train_section({"method": name, "beta": 2.0, "gamma": 1.0, "alpha": 0.5}).beta == 2.0


def test_an_edit_in_a_method_with_a_head_makes_its_training_new_and_nothing_else(home: Path) -> None:
    """Its file is imported here for the first time: what counts is the source."""
    file = home / "dual_head.py"
    shutil.copy(EXAMPLE.with_name(file.name), file)
    arms = {"spa": {}, "dual": {"train.method": "dual_head:DualHead", "train.head_weight": 2.0}}

    def keys() -> dict[tuple[str, str], str]:
        return {(stage.stage, arm): stage.key for stage in planned_stages(config(home, arms)) for arm in stage.arms}

    before = keys()
    file.write_text(file.read_text().replace("nn.Linear(width, 32)", "nn.Linear(width, 33)"))
    after = keys()
    sys.modules.pop("dual_head", None)
    assert {key for key in before if before[key] != after[key]} == {("train", "dual")}


def test_docs_show_the_example_that_runs() -> None:
    text = (EXAMPLE.parents[1] / "METHODS.md").read_text(encoding="utf-8")
    assert EXAMPLE.read_text(encoding="utf-8").split("\n", 2)[2].strip() in text
    for name in METHODS:
        assert f"`{name}`" in text
        assert f"{method_class(name).__module__.rpartition('.')[2]}.py" in text
