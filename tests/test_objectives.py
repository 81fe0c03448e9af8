"""Objectives: in the config's order, from a constitution; mistakes name the nearest right name."""

from __future__ import annotations

from pathlib import Path

import pytest

from spa_ray.config import arm_configs
from spa_ray.config.models import Config
from spa_ray.errors import InputError
from spa_ray.objectives import load_objectives


def config(**changes: object) -> Config:
    return arm_configs({"model": {"path": "m"}, **changes}, [], where="test", stem="test")["main"]


def test_objectives_stand_in_the_configs_order():
    found = load_objectives(config(objectives=["honest", "helpful", "harmless"]))
    assert [o.name for o in found] == ["honest", "helpful", "harmless"]
    assert all(o.principle and o.rubric for o in found)


def test_a_threshold_of_the_pairs_section_reaches_its_objective():
    found = load_objectives(config(pairs={"thresholds": {"harmless": 7}}))
    assert [o.threshold for o in found] == [7.0, None]


def test_an_unknown_objective_is_refused_with_the_nearest_name():
    with pytest.raises(InputError, match="did you mean helpful"):
        load_objectives(config(objectives=["harmless", "helpfull"]))


def test_a_users_constitution_is_a_yaml_file(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text("kind: {principle: be kind}\nbrief: {principle: be brief, rubric: shorter}\n", encoding="utf-8")
    found = load_objectives(config(objectives=["brief", "kind"], constitution=str(path)))
    assert [(o.name, o.principle, o.rubric) for o in found] == [
        ("brief", "be brief", "shorter"),
        ("kind", "be kind", ""),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "is a mapping of keys"),
        ("kind: brief\n", "maps each objective"),
        ("kind: {principal: typo}\nbrief: {principle: x}\n", "kind: give it a `principle`"),
        ("kind: [\n", "not YAML"),
    ],
)
def test_a_bad_constitution_is_refused(tmp_path: Path, text: str, message: str):
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        load_objectives(config(objectives=["kind", "brief"], constitution=str(path)))


def test_a_constitution_that_is_nowhere_is_refused():
    with pytest.raises(InputError, match="neither built in"):
        load_objectives(config(constitution="nowhere"))
