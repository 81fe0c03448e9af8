"""What people write in configs and on the command line: repeated keys, YAML's traps, paths, and words for faults."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel

from spa_ray.config import Config, arm_configs, load_config
from spa_ray.config.kinds import members, takes_text
from spa_ray.config.load import parse_override
from spa_ray.errors import InputError
from spa_ray.objectives import load_objectives

MODEL = "model: {path: m}\n"


def load(folder: Path, text: str, *overrides: str) -> dict[str, Config]:
    (folder / "c.yaml").write_text(MODEL + text, encoding="utf-8")
    return load_config(folder / "c.yaml", overrides)


def main(folder: Path, text: str, *overrides: str) -> Config:
    return next(iter(load(folder, text, *overrides).values()))


def refusal(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load(folder, text, *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{folder}/")


# --- a key that occurs twice --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("seed: 1\nseed: 2\n", "c.yaml:3: not YAML (the key 'seed' occurs twice, first in line 2; remove one)"),
        ("train:\n  lr: 3.0e-5\n  method: sft\n  lr: 1e-6\n", "c.yaml:5: not YAML (the key 'lr' occurs twice"),
        ("train: {lr: 1, lr: 1}\n", "c.yaml:2: not YAML (the key 'lr' occurs twice"),
        ("train: {lr: 1}\nseed: 3\ntrain: {beta: 1}\n", "the key 'train' occurs twice, first in line 2"),
        ("arms:\n  a: {}\n  a: {}\n", "the key 'a' occurs twice"),
        ("arms:\n  a: {train.lr: 1, train.lr: 2}\n", "the key 'train.lr' occurs twice"),
        ("arms:\n  a: {train: {lr: 1}, train.lr: 2}\n", "arms: a: the key 'train.lr' occurs twice"),
        ("evaluation: {families: {x: {source: a}, 'x': {source: b}}}\n", "the key 'x' occurs twice"),
        ("train: {'lr': 1, \"lr\": 2}\n", "the key 'lr' occurs twice"),
        ("model: {path: other}\n", "the key 'model' occurs twice"),
    ],
)
def test_a_key_that_occurs_twice_is_refused_with_its_lines(tmp_path: Path, text: str, told: str) -> None:
    assert told in refusal(tmp_path, text)


def test_a_constitution_with_an_objective_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("harmless: {principle: a}\nhelpful: {principle: b}\nharmless: {principle: c}\n")
    with pytest.raises(InputError, match=r"own.yaml:3: not YAML \(the key 'harmless' occurs twice"):
        load_objectives(main(tmp_path, f"constitution: {tmp_path}/own.yaml\n"))


def test_anchors_and_merge_keys_work_and_own_keys_win_over_merged_ones(tmp_path: Path) -> None:
    text = """\
sampling: &cool {temperature: 0.5, top_p: 0.9}
refine: {<<: *cool, temperature: 0.1}
evaluation: {sampling: {<<: [*cool, {max_tokens: 7}]}}
arms: {a: &a {train.lr: 1e-6}, b: {<<: *a, train.lr: 2e-6}}
"""
    arms = load(tmp_path, text)
    assert (arms["a"].refine.temperature, arms["a"].refine.top_p) == (0.1, 0.9)
    assert arms["a"].evaluation.sampling.max_tokens == 7
    assert (arms["a"].train.lr, arms["b"].train.lr) == (1e-6, 2e-6)


def test_a_section_in_an_arm_or_an_override_changes_the_keys_that_it_names(tmp_path: Path) -> None:
    text = "train: {lr: 3e-5, epochs: 2}\narms: {a: {train: {lr: 1e-5}}}\n"
    assert (main(tmp_path, text).train.lr, main(tmp_path, text).train.epochs) == (1e-5, 2)
    assert main(tmp_path, text, "arms.a.train.lr=1e-4").train.epochs == 2
    assert main(tmp_path, "sampling: {n: 7}\n", "sampling={top_p: 0.5}").sampling.n == 7


# --- YAML's traps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["no", "off", "yes", "2026-11-25", "12:30", "0123456", "1e6", "1_000", "0x1f", ".5"])
def test_an_unquoted_value_of_a_text_key_is_its_text(tmp_path: Path, text: str) -> None:
    for key in ("name", "run_dir", "constitution", "model.revision", "prompts.split", "evaluation.judge"):
        section, _, inner = key.rpartition(".")
        at_top = f"{key}: {text}\n" if not section else f"{section}: {{{inner}: {text}, path: m}}\n"
        if section != "model" and section:
            at_top = at_top.replace(", path: m", "")
        (tmp_path / "c.yaml").write_text(("" if section == "model" else MODEL) + at_top)
        for config in (main_of(tmp_path / "c.yaml"), main(tmp_path, "", f"{key}={text}")):
            assert value_at(config, key) == text, key


def main_of(path: Path) -> Config:
    return next(iter(load_config(path).values()))


def value_at(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config


@pytest.mark.parametrize(
    ("text", "value"), [("1e-6", 1e-6), ("1.e-6", 1e-6), ("1E-6", 1e-6), ("+1e-6", 1e-6), (".1", 0.1), ("1_0", 10.0)]
)
def test_numbers_are_read_however_they_are_written(tmp_path: Path, text: str, value: float) -> None:
    assert main(tmp_path, f"train: {{lr: {text}}}\n").train.lr == value
    assert main(tmp_path, f"arms: {{a: {{train.lr: {text}}}}}\n").train.lr == value
    assert main(tmp_path, "", f"train.lr={text}").train.lr == value


def test_a_leading_zero_is_no_octal_and_a_colon_no_sexagesimal(tmp_path: Path) -> None:
    assert main(tmp_path, "seed: 010\n").seed == 10
    assert "seed: must be a whole number, got '12:30'" in refusal(tmp_path, "seed: 12:30\n")


@pytest.mark.parametrize("word", ["yes", "no", "on", "off", "true", "False"])
def test_flags_take_every_word_and_numbers_take_none(tmp_path: Path, word: str) -> None:
    wanted = word.lower() in {"yes", "on", "true"}
    assert main(tmp_path, f"train: {{offload: {word}}}\n").train.offload is wanted
    assert f"sampling.n: must be a whole number, got {word!r}" in refusal(tmp_path, f"sampling: {{n: {word}}}\n")


def test_values_of_free_mappings_are_typed_and_names_of_arms_are_text(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "model: {path: m, engine_kwargs: {enforce_eager: off, seed: 3, tag: 2026-11-25, x: {y: [no, 1e-3]}}}\n"
        "arms: {no: {}, 1: {denoise.consistency: off}, ~: {}}\n"
    )
    arms = load_config(tmp_path / "c.yaml")
    assert list(arms) == ["no", "1", "~"]
    assert arms["1"].denoise.consistency == "off"
    assert arms["no"].model.engine_kwargs == {
        "enforce_eager": False, "seed": 3, "tag": "2026-11-25", "x": {"y": [False, 1e-3]},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"model:\n\tpath: m\n", "c.yaml:2: not YAML (a tab; YAML is indented with blanks)"),
        (b"model: {path: m}\n---\nseed: 1\n", "c.yaml:2: not YAML"),
        (b"a: &a [*a]\n", "nested too deeply"),
        (b"[" * 5000, "nested too deeply"),
        (b"? [a, b]\n: c\n", "a key is text"),
        (b"{{ x }}: 1\n", "not YAML"),
        (b"a: !!python/object:os.system x\n", "c.yaml:1: not YAML"),
        (b"a: !!int x\n", "not YAML"),
        (b"just text\n", "this is text"),
        (b"3\n", "this is one value"),
        (b"name: \x00", "not YAML (a character that YAML does not allow)"),
    ],
)
def test_what_is_no_config_is_refused_in_one_line(tmp_path: Path, data: bytes, told: str) -> None:
    (tmp_path / "c.yaml").write_bytes(data)
    with pytest.raises(InputError) as caught:
        load_config(tmp_path / "c.yaml")
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_config_that_aliases_blow_up_is_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    (tmp_path / "c.yaml").write_text("\n".join(lines))
    with pytest.raises(InputError, match="more than 100,000 values"):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_config_with_a_byte_order_mark_is_read(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "c.yaml").write_text(MODEL + "name: Grün\n", encoding=encoding)
    assert main_of(tmp_path / "c.yaml").name == "Grün"


# --- text on the command line -------------------------------------------------------------------------------------

TEXTS = ["set #2.jsonl", "a: b.jsonl", "@x.jsonl", "*.jsonl", "[v2] set.jsonl", "runs/try #2", "{a}", "- x", "!x", "&x",
         "%x", "`x`", "a,b", "x: ", "> x", "| x", "? x", "'half", "it's", "C:\\x", "{{ answer }}", "a=b", "~/x", "x#y",
         "[a", "{a: b", "1: 2", "true", "07", " blank", "ünï"]  # fmt: skip
TEXT_KEYS = ["prompts.source", "run_dir", "name", "constitution", "model.path", "scoring.prompt", "scoring.system",
             "arms.a.scoring.prompt", "evaluation.families.x.source", "prompts.columns.prompt"]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_given_by_option_is_that_text_and_not_yaml(text: str) -> None:
    assert {key: parse_override(f"{key}={text}") for key in TEXT_KEYS} == {key: (key, text) for key in TEXT_KEYS}


@pytest.mark.parametrize(
    ("text", "value"),
    [("'a b'", "a b"), ('"a\\nb"', "a\nb"), ("null", None), ("~", None), ("", None), ("'null'", "null")],
)
def test_null_and_quoted_text_are_read_as_yaml(text: str, value: str | None) -> None:
    assert parse_override(f"prompts.source={text}") == ("prompts.source", value)


def test_a_key_that_takes_text_or_a_list_takes_both() -> None:
    assert parse_override("train.lora.target_modules=[q, k]")[1] == ["q", "k"]
    assert parse_override("train.lora.target_modules=all-linear")[1] == "all-linear"
    assert parse_override("objectives=[no, 1]")[1] == ["no", "1"]


# --- words for faults ---------------------------------------------------------------------------------------------

ODD: list[Any] = [
    None,
    True,
    3,
    -1,
    0,
    1.5,
    1e400,
    "x",
    "",
    [],
    [1],
    [1, 2, 3],
    [None],
    ["x"],
    [[]],
    {},
    {"a": 1},
    {"a": {"b": 1}},
]
PYTHON = re.compile(
    r"\b(tuple|dict|dictionary|NoneType|None|bool|boolean|str|string|int|integer|float|True|False|Input|input|instance"
    r"|validat\w*|unpack\w*|pars\w*|item|Value error|class)\b|_type|_pars"
)


def keys(section: type[BaseModel], above: str = "") -> list[str]:
    """Every key of the config, sections inside sections included."""
    found = []
    for name, info in section.model_fields.items():
        found.append(above + name)
        for member in members(info.annotation):
            inner = get_args(member)[1] if get_origin(member) is dict else member
            step = f"{above}{name}.k." if get_origin(member) is dict else f"{above}{name}."
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                found += keys(inner, step)
    return found


def test_every_fault_of_every_key_is_told_in_the_words_of_a_configs_author() -> None:
    refused = 0
    for key in keys(Config):
        for value in ODD:
            try:
                arm_configs({"model": {"path": "m"}}, [(key, value)], where="c.yaml", stem="c")
            except InputError as e:
                refused += 1
                told = str(e).replace(key, "KEY")
                assert "\n" not in told
                assert "KEY" in told or key.split(".")[-1] in told or re.search("objectives|arms|missing", told), (
                    key,
                    value,
                    told,
                )
                assert PYTHON.search(re.sub(r"'[^']*'|\w+\.input", "", told)) is None, (key, value, told)
    assert refused > 500


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("sampling.n=five", "sampling.n: must be a whole number, got 'five'"),
        ("sampling.n=[1]", "sampling.n: must be a whole number, got [1]"),
        ("sampling.n=0", "sampling.n: must be a whole number, 1 or more, got 0"),
        ("sampling.top_p=2", "sampling.top_p: must be a number, 1 or less, got 2"),
        ("train.lr=.nan", "train.lr: must be a number, and finite, got .nan"),
        ("train.offload=perhaps", "train.offload: must be true or false, got 'perhaps'"),
        ("objectives=helpful", "objectives: must be a list of texts, got 'helpful'"),
        ("objectives={a: b}", "objectives: must be a list of texts, got a mapping"),
        ("scoring.scale=[1]", "scoring.scale: must be a list of two whole numbers, got [1]"),
        ("scoring.scale=[1, 2, 3]", "scoring.scale: must be a list of two whole numbers"),
        ("scoring.scale=10", "scoring.scale: must be a list of two whole numbers, got 10"),
        ("train=5", "train: must be a mapping of keys to values, got 5"),
        ("train.lora=[1]", "train.lora: must be a mapping of keys to values or null, got [1]"),
        ("train.method=sfT", "train.method: must be one of spa"),
        ("train.method=spa-dpo", "did you mean spa_dpo?"),
        (
            "prompts.columns={promt: x}",
            "prompts.columns.promt: unknown key; one of prompt, messages, prompt_id (did you mean prompt?)",
        ),
        (
            "train.lora.target_modules={a: b}",
            "train.lora.target_modules: must be text or a list of texts, got a mapping",
        ),
        ("run_dir=null", "run_dir: must be text, got null"),
        ("pairs.order=only:funny", "pairs.order: 'funny' is not one of the objectives"),
        ("pairs.order=best", "pairs.order: must be one of lex, pareto, composite, mean"),
        ("pairs={order: mean, delta: auto}", "pairs.delta: auto is of score sums; order mean takes a number"),
        ("episodes.ranges={funny: [1, 2]}", "episodes.ranges: 'funny' is not one of the objectives"),
        ("episodes.ranges={helpful: [2, 1]}", "ranges.helpful must ascend, got [2.0, 1.0]"),
        ("pairs.weights={helpful: 1}", "pairs.weights: order lex has none; set order composite"),
        ("pairs.thresholds={helpful: many}", "pairs.thresholds.helpful: must be a number, got 'many'"),
    ],
)
def test_a_fault_says_what_the_key_takes(tmp_path: Path, override: str, told: str) -> None:
    assert told in refusal(tmp_path, "", override)


def test_several_faults_are_counted_and_named(tmp_path: Path) -> None:
    told = refusal(tmp_path, "sampling: {n: x, topp: 1}\ntrain: {lr: y}\n")
    assert "sampling.n: must be a whole number, got 'x' (2 more: sampling.topp, train.lr)" in told


@pytest.mark.parametrize("text", ["[]", "null", "[null]"])
def test_no_system_prompts_is_a_list_of_none(tmp_path: Path, text: str) -> None:
    assert main(tmp_path, f"sampling: {{system_prompts: {text}}}\n").sampling.system_prompts == (None,)
    assert main(tmp_path, "", f"sampling.system_prompts={text}").sampling.system_prompts == (None,)


def test_text_keys_are_known_by_their_type() -> None:
    assert takes_text(str | None)
    assert takes_text(Literal["a", "b"] | None)
    assert not takes_text(float | Literal["auto"])
    assert not takes_text(Any)
    assert not takes_text(int)


def test_a_home_folder_in_a_constitution_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.yaml").write_text("harmless: {principle: a}\nhelpful: {principle: 12:30}\n")
    assert load_objectives(main(tmp_path, "constitution: ~/own.yaml\n"))[1].principle == "12:30"
    with pytest.raises(InputError, match="neither built in"):
        load_objectives(main(tmp_path, "constitution: ~nobody/own.yaml\n"))
