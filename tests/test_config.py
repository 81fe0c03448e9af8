"""Configs: what a file, a profile, arms and overrides become, and the one line that each mistake gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from spa_ray.config import Config, arm_configs, load_config
from spa_ray.config.kinds import known_keys
from spa_ray.config.load import parse_override
from spa_ray.config.training import train_section
from spa_ray.errors import InputError

ROOT = Path(__file__).parents[1]
SHIPPED = sorted([*(ROOT / "configs").glob("*.yaml"), ROOT / "spa_ray" / "microworld" / "demo.yaml"])


def write(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def arms(raw: dict[str, Any] | None = None, *overrides: str) -> dict[str, Config]:
    return arm_configs({"model": {"path": "m"}, **(raw or {})}, overrides, where="c.yaml", stem="c")


def main(raw: dict[str, Any] | None = None, *overrides: str) -> Config:
    return arms(raw, *overrides)["main"]


def refusal(raw: dict[str, Any] | None = None, *overrides: str) -> str:
    """The message that this config is refused with; it is one line."""
    with pytest.raises(InputError) as caught:
        arms(raw, *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- what comes out -----------------------------------------------------------------------------------------------


def test_a_file_without_arms_is_one_arm_called_main_and_named_after_the_file(tmp_path: Path) -> None:
    loaded = load_config(write(tmp_path, "model: {path: m}"))
    assert list(loaded) == ["main"]
    assert (loaded["main"].name, loaded["main"].run_dir, loaded["main"].seed) == ("mine", "runs/mine", 0)


def test_the_defaults_are_those_of_the_design() -> None:
    config = main()
    assert config.objectives == ("harmless", "helpful")
    assert (config.sampling.n, config.sampling.temperature, config.sampling.max_tokens) == (5, 1.2, 1024)
    assert (config.scoring.scale, config.scoring.mode, config.scoring.draws, config.scoring.retries) == (
        (1, 10), "choice", 1, 2,
    )  # fmt: skip
    assert (config.denoise.consistency, config.denoise.informativeness, config.denoise.ddof) == ("strict", True, 1)
    assert (config.denoise.tau, config.denoise.tau_quantile, config.denoise.tau_over) == (None, 0.32, "positive")
    assert (config.pairs.delta, config.pairs.order, config.pairs.include) == (2, "lex", "all")
    assert (config.train.method, config.train.alpha, config.train.gap) == ("spa", 1.0, "abs_sum")
    assert (config.generation.max_attempts, config.generation.max_error_fraction) == (3, 0.1)
    assert (config.iterations.count, config.iterations.prompts, config.iterations.reuse_refined) == (1, "same", False)


def test_a_config_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        main().sampling.n = 9  # type: ignore[misc]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_loads(path: Path) -> None:
    assert load_config(path)


def test_a_config_written_out_and_read_again_is_the_same(tmp_path: Path) -> None:
    first = main({"profile": "robust", "denoise": {"consistency": "off"}})
    path = write(tmp_path, yaml.safe_dump(first.model_dump(mode="json")))
    assert load_config(path)["main"] == first


# --- precedence ---------------------------------------------------------------------------------------------------


def test_the_robust_profile_sets_its_two_keys_and_no_other() -> None:
    paper, robust = main(), main({"profile": "robust"})
    assert (robust.denoise.informativeness, robust.train.gap) == (False, "l1")
    same = {"profile": "paper", "denoise": paper.denoise, "train": paper.train}
    assert robust.model_copy(update=same) == paper


def test_a_single_key_overrides_the_profile_and_leaves_its_other_keys() -> None:
    config = main({"profile": "robust", "train": {"gap": "primary"}})
    assert (config.train.gap, config.denoise.informativeness) == ("primary", False)


def test_the_command_line_overrides_the_file_and_an_arm_overrides_both() -> None:
    raw = {"sampling": {"n": 4}, "arms": {"plain": {}, "many": {"sampling.n": 9}}}
    assert {name: c.sampling.n for name, c in arms(raw).items()} == {"plain": 4, "many": 9}
    assert {name: c.sampling.n for name, c in arms(raw, "sampling.n=6").items()} == {"plain": 6, "many": 9}


def test_an_arms_profile_replaces_the_runs() -> None:
    both = arms({"arms": {"spa": {}, "spa_robust": {"profile": "robust"}}})
    assert (both["spa"].train.gap, both["spa_robust"].train.gap) == ("abs_sum", "l1")


def test_arms_keep_the_files_order_and_an_empty_arm_may_be_written_as_nothing() -> None:
    assert list(arms({"arms": {"z": None, "a": {"train.alpha": 0}}})) == ["z", "a"]


def test_one_arms_override_does_not_reach_the_next_arm() -> None:
    both = arms({"train": {"lr": 1e-5}, "arms": {"first": {"train.lr": 3e-4}, "second": {}}})
    assert (both["first"].train.lr, both["second"].train.lr) == (3e-4, 1e-5)


def test_an_arm_can_be_added_on_the_command_line() -> None:
    assert arms({}, "arms={a: {train.alpha: 0}}")["a"].train.alpha == 0


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("a.b=1", "a.b", 1),
        ("a=", "a", None),
        ("a=null", "a", None),
        ("a=[1, 9]", "a", [1, 9]),
        ("a={b: c}", "a", {"b": "c"}),
        ("a=b=c", "a", "b=c"),
        ("a='1'", "a", "1"),
        (" a =x", "a", "x"),
    ],
)
def test_an_overrides_value_is_read_as_yaml(text: str, key: str, value: object) -> None:
    assert parse_override(text) == (key, value)


@given(st.text(alphabet="abc.", min_size=1).filter(lambda key: key.strip(".")), st.integers())
def test_overrides_of_any_key_are_set_or_refused_in_one_line(key: str, value: int) -> None:
    with pytest.raises(InputError) as caught:
        arms({}, f"{key}={value}")
    assert "\n" not in str(caught.value)


def test_a_bare_off_is_the_word_off() -> None:
    """YAML 1.1 reads `off` as false."""
    assert main({}, "denoise.consistency=off").denoise.consistency == "off"
    assert main(yaml.safe_load("denoise: {consistency: off}")).denoise.consistency == "off"


def test_training_defaults_are_resolved_by_method_and_a_given_value_stays() -> None:
    for method, beta, gamma, lr in [
        ("spa", 2.5, 1.375, 1e-6),
        ("spa_simpo", 2.5, 1.375, 1e-6),
        ("spa_dpo", 0.1, 0.0, 5e-7),
        ("ipo", 0.1, 0.0, 5e-7),
        ("orpo", 0.1, 0.0, 8e-6),
        ("sft", 0.0, 0.0, 1e-5),
    ]:
        for nulls in ({}, {"beta": None, "gamma": None, "lr": None}):
            section = train_section({"method": method, **nulls})
            assert (section.beta, section.gamma, section.lr) == (beta, gamma, lr)
    assert train_section({"method": "spa_dpo", "beta": 0.01}).beta == 0.01


# --- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        ({"samplin": {}}, "samplin: unknown key; did you mean sampling?"),
        ({"sampling": {"temprature": 1}}, "sampling.temprature: unknown key; did you mean sampling.temperature?"),
        ({"train": {"lora": {"rnk": 4}}}, "train.lora.rnk: unknown key"),
        ({"evaluation": {"families": {"held": {"sorce": "x"}}}}, "did you mean evaluation.families.held.source?"),
        ({"resources": {"engines": {"maximum": 4}}}, "resources.engines.maximum: unknown key"),
        ({"iterations": {"zzz": 1}}, "known here: count, prompts, reuse_refined"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(raw: dict[str, Any], named: str) -> None:
    assert named in refusal(raw)
    assert refusal(raw).startswith("c.yaml")


def test_an_unknown_override_is_refused_with_the_nearest_name() -> None:
    assert "did you mean sampling.top_p?" in refusal({}, "sampling.topp=0.9")


def test_an_unknown_key_of_an_arm_names_the_arm() -> None:
    assert "(arm a): train.alfa: unknown key; did you mean train.alpha?" in refusal({"arms": {"a": {"train.alfa": 1}}})


@pytest.mark.parametrize(
    ("override", "key", "given"),
    [
        ("sampling.n=five", "sampling.n", "'five'"),
        ("sampling.n=4.5", "sampling.n", "4.5"),
        ("sampling.temperature=-1", "sampling.temperature", "-1"),
        ("sampling.top_p=0", "sampling.top_p", "0"),
        ("scoring.mode=words", "scoring.mode", "'words'"),
        ("scoring.scale=[1]", "scoring.scale", ""),
        ("scoring.scale=[9, 1]", "scoring.scale", "[9, 1]"),
        ("denoise.ddof=2", "denoise.ddof", "2"),
        ("denoise.tau_quantile=1.5", "denoise.tau_quantile", "1.5"),
        ("train.method=ppo", "train.method", "'ppo'"),
        ("train.zero_stage=4", "train.zero_stage", "4"),
        ("train=5", "train", ""),
        ("prompts.on_bad_row=ignore", "prompts.on_bad_row", "'ignore'"),
        ("resources.engines.min=0", "resources.engines.min", "0"),
        ("resources.engines={min: 3, max: 2}", "resources.engines", "engines.max 2 is below engines.min 3"),
        ("seed=x", "seed", "'x'"),
    ],
)
def test_an_ill_typed_value_is_refused_with_its_key_and_what_was_given(override: str, key: str, given: str) -> None:
    message = refusal({}, override)
    assert key in message
    assert given in message


def test_fewer_than_two_objectives_are_refused() -> None:
    assert "objectives: 1 given, two or more are needed" in refusal({"objectives": ["helpful"]})
    assert "objectives: 0 given" in refusal({"objectives": []})


def test_an_objective_twice_is_refused() -> None:
    assert "a name stands twice" in refusal({"objectives": ["helpful", "helpful"]})


@pytest.mark.parametrize("names", [["a", "b"], ["a", "b", "c"]])
def test_n_must_exceed_the_number_of_objectives(names: list[str]) -> None:
    raw = {"objectives": names, "sampling": {"n": len(names)}}
    assert f"sampling.n is {len(names)}, at least {len(names) + 1}" in refusal(raw)
    assert main({**raw, "sampling": {"n": len(names) + 1}}).sampling.n == len(names) + 1


def test_a_threshold_for_no_objective_is_refused() -> None:
    assert "pairs.thresholds: 'honest' is not one of" in refusal({"pairs": {"thresholds": {"honest": 7}}})


def test_a_missing_model_is_refused() -> None:
    with pytest.raises(InputError, match=r"c\.yaml: model: missing"):
        arm_configs({}, [], where="c.yaml", stem="c")


@pytest.mark.parametrize("raw", [{"arms": ["a"]}, {"arms": {"a": 3}}, {"arms": "a"}])
def test_arms_that_are_no_mapping_are_refused(raw: dict[str, Any]) -> None:
    assert "arms: must map a name to overrides" in refusal(raw)


@pytest.mark.parametrize("key", ["name", "run_dir", "arms.b"])
def test_what_belongs_to_the_run_cannot_differ_between_arms(key: str) -> None:
    assert "belongs to the run" in refusal({"arms": {"a": {key: "x"}}})


def test_an_unknown_profile_is_refused() -> None:
    assert "profile: 'fast' is unknown; one of paper, robust" in refusal({"profile": "fast"})
    assert "'fast' is unknown" in refusal({"arms": {"a": {"profile": "fast"}}})


@pytest.mark.parametrize("text", ["sampling.n", "=4", "  =4"])
def test_an_override_without_key_or_value_is_refused(text: str) -> None:
    assert "an override is written key=value" in refusal({}, text)


def test_an_override_that_is_not_yaml_is_refused() -> None:
    assert "the value is not YAML" in refusal({}, "sampling.n=[1")


def test_an_override_through_a_value_is_refused() -> None:
    assert "sampling.n is a value, not a section" in refusal({"sampling": {"n": 5}}, "sampling.n.x=1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "this is a list"),
        ("", "this is empty"),
        ("model: {path: m\nseed: 1\n", "mine.yaml:2: not YAML"),
        ("seed: '\x00'", "not YAML"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config(write(tmp_path, text))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            load_config(path)


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(InputError, match="not UTF-8"):
        load_config(tmp_path / "c.yaml")


def test_known_keys_follow_sections_and_mappings_of_sections() -> None:
    assert "temperature" in known_keys(["sampling"])
    assert "source" in known_keys(["evaluation", "families", "any name"])
    assert known_keys(["seed"]) == []
