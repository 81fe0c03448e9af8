"""The command line: what each mistake answers (one line, exit 2, nothing written), plan, schema, inspect, clean."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path) -> Any:
    """Write a config that names the tiny model and two prompts, changed as asked; returns its path."""

    def write(**changes: Any) -> Path:
        prompts = tmp_path / "prompts.jsonl"
        if not prompts.exists():
            prompts.write_text('{"prompt": "How?"}\n{"prompt": "Why?"}\n')
        raw = {
            "run_dir": str(tmp_path / "run"),
            "model": {"path": str(tiny_model)},
            "prompts": {"source": str(prompts)},
            "sampling": {"max_tokens": 64},  # the tiny model's context has no room for the defaults
            "refine": {"max_tokens": 64},
            **changes,
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(raw))
        return path

    return write


def refused(answer: tuple[int, str, str], *parts: str) -> None:
    status, _, err = answer
    assert status == 2
    assert err.startswith("spa: ")
    assert err.count("\n") == 1
    for part in parts:
        assert part in err


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_is_planned(spa: Any, path: Path) -> None:
    raw = yaml.safe_load(path.read_text())
    if path.stem.startswith("real") and not Path(raw["model"]["path"]).is_dir():
        pytest.skip("`make real` fetches this config's model")
    status, out, _ = spa("plan", path, "--json")
    assert status == 0
    plan = json.loads(out.strip().splitlines()[-1])
    trained = [arm for arm, keys in raw["arms"].items() if "merge" not in keys]
    assert trained
    for arm in trained:
        assert plan["arms"][arm]["generate"]["requests"] > 0
        assert plan["arms"][arm]["train"]["lr"] > 0


def test_a_named_data_set_that_no_hub_has_is_refused_by_run_without_a_local_copy(spa: Any, config: Any) -> None:
    refused(spa("run", config(prompts={"source": "honeset"})), "honeset", "prompts.path=FILE")


def test_unknown_keys_name_the_nearest(spa: Any, config: Any) -> None:
    refused(spa("run", config(), "sampling.temprature=1"), "sampling.temprature", "sampling.temperature")


def test_a_missing_config_is_named(spa: Any) -> None:
    refused(spa("run", "nowhere.yaml"), "nowhere.yaml")


def test_a_missing_prompt_file_is_named(spa: Any, config: Any, tmp_path: Path) -> None:
    refused(spa("run", config(prompts={"source": str(tmp_path / "none.jsonl")})), "none.jsonl")


def test_a_bad_prompt_row_is_named_by_file_and_line(spa: Any, config: Any, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "How?"}\n{not json\n')
    refused(spa("run", config()), "prompts.jsonl:2")
    assert not list((tmp_path / "run").glob("stages/generate-*"))


def test_a_folder_that_is_no_model_is_refused(spa: Any, config: Any, tmp_path: Path) -> None:
    refused(spa("run", config(model={"path": str(tmp_path)})), "no config.json")


def test_an_adapter_alone_is_refused(spa: Any, config: Any, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    refused(spa("run", config(model={"path": str(adapter)})), "an adapter alone")


def test_a_model_without_a_chat_template_is_refused(spa: Any, config: Any, tmp_path: Path, tiny_model: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_model, bare)
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(settings))
    refused(spa("run", config(model={"path": str(bare)})), "chat template")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_pointer_in_the_place_of_a_file_is_refused(
    spa: Any, config: Any, tmp_path: Path, tiny_model: Path, name: str, command: str
) -> None:
    folder = tmp_path / "pointers"
    shutil.copytree(tiny_model, folder)
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")
    refused(spa(command, config(model={"path": str(folder)})), name, "git lfs pull")


def test_an_undefined_template_variable_is_refused(spa: Any, config: Any) -> None:
    refused(spa("run", config(scoring={"prompt": "{{ answr }}"})), "scoring.prompt", "answr")


def test_an_unknown_objective_is_refused(spa: Any, config: Any) -> None:
    refused(spa("run", config(objectives=["harmles", "helpful"])), "harmles", "harmless")


def test_episodes_that_are_none_are_refused(spa: Any, tmp_path: Path) -> None:
    refused(spa("build", tmp_path / "none", "--out", tmp_path / "out"), "no such folder")
    (tmp_path / "empty").mkdir()
    refused(spa("build", tmp_path / "empty", "--out", tmp_path / "out"), "no *.parquet")
    assert not (tmp_path / "out").exists()


def test_a_stage_name_that_is_none_is_refused(spa: Any, config: Any) -> None:
    refused(spa("run", config(), "--until", "tain"), "tain")


def test_plan_shows_the_defaults_of_the_method(spa: Any, config: Any) -> None:
    _, out, _ = spa("plan", config(train={"method": "spa_dpo"}), "--json")
    train = json.loads(out.strip().splitlines()[-1])["arms"]["main"]["train"]
    assert (train["beta"], train["lr"]) == (0.1, 5e-7)


def test_plan_says_when_the_learning_rate_is_out_of_place(spa: Any, config: Any) -> None:
    path = config()
    for lr, told in (("1e-4", 0), ("1e-1", 1)):
        _, out, _ = spa("plan", path, f"train.lr={lr}", "--json")
        notes = json.loads(out.strip().splitlines()[-1])["arms"]["main"]["notes"]
        assert sum(f"train.lr {float(lr):g} is far above" in note for note in notes) == told


def test_schema_is_json(spa: Any) -> None:
    status, out, _ = spa("schema")
    assert status == 0
    assert json.loads(out)["properties"]["objectives"]["default"] == ["harmless", "helpful"]


def test_a_folder_that_is_no_run_is_refused(spa: Any, tmp_path: Path) -> None:
    refused(spa("inspect", tmp_path, "id"), "not a run folder")
    refused(spa("clean", tmp_path), "not a run folder")


def test_clean_deletes_only_what_no_arm_uses(spa: Any, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("{}")
    for name in ("build-used", "build-stray"):
        (tmp_path / "stages" / name).mkdir(parents=True)
    (tmp_path / "arms" / "main").mkdir(parents=True)
    (tmp_path / "arms" / "main" / "iter_1.json").write_text(json.dumps({"stages": {"build": "build-used"}}))
    status, out, _ = spa("clean", tmp_path)
    assert status == 0
    assert "build-stray" in out
    assert [p.name for p in (tmp_path / "stages").iterdir()] == ["build-used"]


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("evaluation.judge=nonsense", ["evaluation.judge", "nonsense"]),
        ("evaluation.objectives=[harmless,nope]", ["nope"]),
        ("evaluation.objectives=[harmless]", ["evaluation.objectives"]),
        ("iterations={count: 2, prompts: diff}", ["prompts.limit"]),
        ("train.beta=0", ["train", "beta"]),
        ("train.lr=.inf", ["train.lr"]),
        ("tracking.backends=[wandb]", ["tracking.backends", "pip install wandb"]),
        ("tracking.backends=[tensorbord]", ["tracking.backends"]),
        ("model.engine=foo:bar", ["model.engine", "foo"]),
        ("model.max_model_len=64", ["max_tokens", "64"]),
        ("refine.max_tokens=1024", ["refine.max_tokens", "context of 1024"]),
        ("evaluation.prompts.source=none.jsonl", ["none.jsonl"]),
    ],
)
def test_what_would_fail_late_is_refused_before_anything_is_written(
    spa: Any, config: Any, tmp_path: Path, override: str, parts: list[str]
) -> None:
    held_out = {"prompts": {"source": str(tmp_path / "prompts.jsonl")}, "sampling": {"max_tokens": 64}}
    path = config(evaluation=held_out)
    refused(spa("run", path, override), *parts)
    assert not (tmp_path / "run").exists()


def test_too_few_prompts_for_a_second_iteration_are_refused(spa: Any, config: Any, tmp_path: Path) -> None:
    path = config(iterations={"count": 2, "prompts": "diff"})
    refused(spa("run", path, "prompts.limit=2"), "no prompt beyond the first 2")


def test_arms_cannot_differ_in_what_they_share(spa: Any, config: Any) -> None:
    refused(spa("run", config(arms={"a": {}, "b": {"resources.train_workers": 2}})), "arms: b", "resources")


def test_an_interrupted_command_says_how_to_go_on(spa: Any, config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("spa_ray.pipeline.commands.run_config", interrupted)
    status, _, err = spa("run", config())
    assert status == 130
    assert "run the same command again" in err
