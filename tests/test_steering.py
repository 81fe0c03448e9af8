"""What a conditioned model is asked for: the section `steer`, its refusals, and what becomes of sensed scores."""

from __future__ import annotations

import json
from typing import Any

import pytest

from spa_ray.config import arm_configs
from spa_ray.config.models import Config
from spa_ray.config.steer import Steer
from spa_ray.config.training import train_section
from spa_ray.errors import InputError
from spa_ray.pipeline.recipe import planned_stages
from spa_ray.steering.asking import (
    Asked,
    asked_for,
    check_columns,
    check_steer,
    in_own,
    to_sense,
    wanted_by,
)
from spa_ray.training.method import Method, method_of

NAMES = ["harmless", "helpful"]
STATE = {"objectives": NAMES, "ranges": [[1.0, 10.0], [0.0, 4.0]]}
SENSED = [0.62, 0.31]


def load(*overrides: str, **raw: Any) -> dict[str, Config]:
    return arm_configs({"model": {"path": "m"}, **raw}, overrides, where="test", stem="test")


def steer(text: str) -> Steer:
    return load(f"steer={text}")["main"].steer


def the_method(name: str, state: Any = STATE, **settings: Any) -> Method[Any]:
    return method_of(train_section({"method": name, **settings}), state)


# --- the section ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("sense", Asked([0.62, 0.31])),
        ("none", Asked()),
        ("{helpful: 0.9}", Asked([0.62, 0.9])),
        ("{helpful: 1, harmless: 0}", Asked([0.0, 1.0])),
        ("{discretize: true}", Asked([0.5, 0.25])),
        ("{helpful: 0.9, discretize: true}", Asked([0.5, 0.9])),
        ("{floors: {harmless: 0.8}}", Asked([0.8, 0.31], ("harmless",))),
        ("{floors: {harmless: 0.6, helpful: 0.4}}", Asked([0.62, 0.4], ("helpful",))),
        ("{harmless: 0, floors: {harmless: 0.8}}", Asked([0.8, 0.31], ("harmless",))),
        ("{discretize: true, floors: {harmless: 0.6}}", Asked([0.6, 0.25], ("harmless",))),
        ("{column: wish}", Asked([0.62, 0.75])),
        ("{column: wish, floors: {helpful: 0.8}}", Asked([0.62, 0.8], ("helpful",))),
    ],
)
def test_what_is_said_is_asked_for_and_the_rest_is_sensed(text: str, asked: Asked) -> None:
    meta = json.dumps({"wish": {"helpful": 0.75}})
    assert asked_for(steer(text), NAMES, meta, sensed=SENSED, wanted=None) == asked


def test_a_method_that_senses_nothing_asks_for_what_it_wants() -> None:
    ric, cpo = the_method("ric", {**STATE, "mean": [5.0, 2.0], "std": [2.0, 1.0]}), the_method("cpo")
    assert wanted_by(cpo) == [1.0, 1.0]
    assert not to_sense(Steer(), cpo)
    wanted = wanted_by(ric)
    assert wanted is not None
    assert in_own(wanted, STATE) == pytest.approx(ric.wanted())
    found = asked_for(steer("{helpful: 0.25}"), NAMES, "{}", sensed=None, wanted=wanted)
    assert found.scores == [wanted[0], 0.25]
    unnamed = the_method("ric", {**STATE, "ranges": None, "mean": [5.0, 2.0], "std": [2.0, 1.0]})
    assert wanted_by(unnamed) == ric.wanted()


def test_nothing_is_sensed_where_everything_is_said() -> None:
    sga = the_method("sga_sft")
    assert to_sense(steer("{helpful: 0.1}"), sga)
    assert to_sense(steer("{column: wish}"), sga)
    assert not to_sense(steer("{helpful: 0.1, harmless: 1}"), sga)
    assert not to_sense(steer("none"), sga)


def test_arms_override_single_keys_of_the_files_section_and_configs_come_back_from_json() -> None:
    arms = {"low": {"steer.helpful": 0.2}, "none": {"steer": "none"}, "safe": {"steer": {"floors": {"harmless": 0.8}}}}
    found = load(arms=arms)
    assert found["low"].steer.values == {"helpful": 0.2}
    assert found["none"].steer.how == "none"
    assert found["safe"].steer.floors == {"harmless": 0.8}
    assert all(Config.model_validate(config.model_dump(mode="json")) == config for config in found.values())


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("sens", "steer: 'sens' is not sense, none, or a mapping such as {helpful: 0.9}"),
        ("{helpful: 2}", "steer: helpful: 2 is no number from 0 to 1"),
        ("{helpful: .nan}", "steer: helpful: nan is no number from 0 to 1"),
        ("{helpful: high}", "steer: helpful: 'high' is no number from 0 to 1"),
        ("{floors: {harmless: -0.1}}", "steer: floors: harmless: -0.1 is no number from 0 to 1"),
        ("{column: wish, helpful: 1}", "steer: column: 'wish' gives the scores; remove helpful"),
        ("{how: none, helpful: 1}", "steer: none asks for no scores"),
    ],
)
def test_values_that_mean_nothing_are_refused_with_the_key(text: str, told: str) -> None:
    with pytest.raises(InputError) as error:
        steer(text)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "method", "state", "told"),
    [
        ("{helpfull: 1}", "sga_dpo", {}, r"steer: 'helpfull' is none of the model's scores: harmless, helpful"),
        ("{floors: {kind: 1}}", "cpo", {}, r"steer: 'kind' is none of the model's scores"),
        ("{helpful: 1}", "ric", {"ranges": None}, r"steer: ric was trained without the scores' ranges"),
    ],
)
def test_a_model_is_asked_for_no_scores_that_it_does_not_know(text: str, method: str, state: Any, told: str) -> None:
    about = {"mean": [5.0, 2.0], "std": [2.0, 1.0]}
    with pytest.raises(InputError, match=told):
        check_steer(steer(text), the_method(method, {**STATE, **about, **state}))


@pytest.mark.parametrize(
    ("meta", "told"),
    [
        ({}, r"prompt 'p1': 'wish' is missing or no mapping"),
        ({"wish": 0.5}, r"prompt 'p1': 'wish' is missing or no mapping"),
        ({"wish": {"kind": 0.5}}, r"prompt 'p1': 'wish': 'kind' is none of the model's scores"),
        ({"wish": {"helpful": 1.5}}, r"prompt 'p1': 'wish': helpful: 1\.5 is no number from 0 to 1"),
    ],
)
def test_a_column_that_does_not_say_the_scores_is_refused_with_its_prompt(meta: Any, told: str) -> None:
    fine = ("p0", json.dumps({"wish": {"helpful": 0.5}}))
    check_columns(steer("{column: wish}"), NAMES, [fine])
    with pytest.raises(InputError, match=told):
        check_columns(steer("{column: wish}"), NAMES, [fine, ("p1", json.dumps(meta))])
    with pytest.raises(InputError, match="senses no scores; give all of harmless, helpful"):
        check_columns(steer("{column: wish}"), NAMES, [fine], partial=False)


# --- stages ---------------------------------------------------------------------------------------------------------


def keys(*, conditioned: bool = False, **arms: Any) -> dict[tuple[str, str], str]:
    configs = load(arms=arms, evaluation={"prompts": {"source": "p.jsonl"}, "benchmarks": BENCHMARKS})
    found = planned_stages(configs, conditioned=conditioned)
    return {(stage.stage, arm): stage.key for stage in found for arm in stage.arms}


BENCHMARKS = {"mmlu": {"path": "questions.jsonl"}}
SGA: dict[str, Any] = {"train.method": "sga_sft"}


def test_arms_that_differ_in_steering_alone_share_their_training() -> None:
    found = keys(sga=SGA, low={**SGA, "steer.helpful": 0.2}, safe={**SGA, "steer.floors": {"harmless": 0.8}})
    for stage in ("generate", "build", "train"):
        assert found[stage, "sga"] == found[stage, "low"] == found[stage, "safe"]
    for stage in ("evaluate", "benchmark:mmlu"):
        assert len({found[stage, arm] for arm in ("sga", "low", "safe", "vanilla")}) == 4


def test_steering_is_of_models_that_are_conditioned_alone() -> None:
    low = {"steer.helpful": 0.2}
    plain = keys(sga={**SGA, **low}, spa=low)
    default = keys(sga=SGA, spa={})
    assert plain["evaluate", "spa"] == default["evaluate", "spa"]
    assert plain["evaluate", "vanilla"] == default["evaluate", "vanilla"]
    assert plain["evaluate", "sga"] != default["evaluate", "sga"]


def test_generation_is_steered_where_the_model_that_answers_is() -> None:
    rounds = {**SGA, "iterations.count": 2}
    found = keys(sga=rounds, low={**rounds, "steer.helpful": 0.2})
    planned = planned_stages(load(arms={"sga": rounds, "low": {**rounds, "steer.helpful": 0.2}}))
    users = [(stage.iteration, stage.arms) for stage in planned if stage.stage == "generate"]
    assert users == [(1, ["sga", "low"]), (2, ["sga"]), (2, ["low"])]
    assert found["train", "sga"] != found["train", "low"]
    based = keys(conditioned=True, sga=SGA, low={**SGA, "steer.helpful": 0.2})
    assert based["generate", "sga"] != based["generate", "low"]


def test_benchmarks_bring_no_column_of_the_users() -> None:
    found = keys(sga=SGA, wish={**SGA, "steer.column": "wish"})
    assert found["benchmark:mmlu", "sga"] == found["benchmark:mmlu", "wish"]
    assert found["evaluate", "sga"] != found["evaluate", "wish"]
