"""Which stages each config key starts again: one table for all keys, held against the addresses that stages get."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from spa_ray.config import Config, load_config
from spa_ray.errors import InputError
from spa_ray.pipeline.stage_keys import NEUTRAL_ENGINE_ARGUMENTS, attempt
from spa_ray.pipeline.stages import STAGES, UNTIL
from spa_ray.storage.folder import StageFolder
from spa_ray.storage.hashing import model_hash

# Key -> another value than the base's, and the stages whose keys cover it. A new key of the config has to join.
TABLE: dict[str, tuple[Any, str]] = {
    "seed": (7, "GTE"),
    "objectives": (["helpful", "harmless"], "GBE"),
    "constitution": ("CONSTITUTION", "GE"),
    "model.dtype": ("bfloat16", "GE"),
    "model.max_model_len": (512, "GE"),
    "model.trust_remote_code": (True, "GE"),
    "model.engine": ("tests.chaos_engine:vllm", "GE"),
    "model.engine_kwargs": ({"kv_cache_dtype": "fp8"}, "GE"),
    "model.chat_template_kwargs": ({"enable_thinking": False}, "GTE"),
    "model.date": ("2026-01-31", "GTE"),
    "model.think": ("mask", "GTE"),
    "sampling.n": (6, "G"),
    "sampling.temperature": (0.9, "G"),
    "sampling.top_p": (0.9, "G"),
    "sampling.min_p": (0.1, "G"),
    "sampling.top_k": (40, "G"),
    "sampling.repetition_penalty": (1.1, "G"),
    "sampling.max_tokens": (64, "G"),
    "sampling.stop": (["User:"], "G"),
    "sampling.system_prompts": ([None], "G"),
    "sampling.resample_duplicates": (False, "G"),
    "scoring.scale": ([1, 9], "GE"),
    "scoring.mode": ("expected", "GE"),
    "scoring.draws": (2, "GBE"),
    "scoring.temperature": (0.5, "GE"),
    "scoring.retries": (1, "GE"),
    "scoring.max_tokens": (4, "GE"),
    "scoring.prompt": ("Rate {{ answer }}", "GE"),
    "scoring.system": ("You judge.", "GE"),
    "scoring.layout": ("answer_first", "GE"),
    "scoring.judge": ("spa_ray.microworld.oracle:judge", "G"),  # an endpoint's: test_endpoint.py
    "scoring.compare": ({"mode": "choice"}, "G"),
    "scoring.chat_template_kwargs": ({"enable_thinking": False}, "GE"),
    "refine.temperature": (0.9, "G"),
    "refine.top_p": (0.9, "G"),
    "refine.min_p": (0.1, "G"),
    "refine.top_k": (40, "G"),
    "refine.repetition_penalty": (1.1, "G"),
    "refine.max_tokens": (64, "G"),
    "refine.stop": (["User:"], "G"),
    "refine.attempts": (2, "G"),
    "refine.prompt": ("Better than {{ candidates }}", "G"),
    "refine.system": ("You write.", "G"),
    "refine.chat_template_kwargs": ({"enable_thinking": False}, "G"),
    "denoise.consistency": ("off", "B"),
    "denoise.on_inconsistent": ("drop_refined", "B"),
    "denoise.informativeness": (False, "B"),
    "denoise.ddof": (0, "B"),
    "denoise.tau": (3.0, "B"),
    "denoise.tau_quantile": (0.5, "B"),
    "denoise.tau_over": ("all", "B"),
    "episodes.ranges": ({"harmless": [1, 10], "helpful": [1, 10]}, "B"),
    "pairs.delta": (1.0, "B"),
    "pairs.order": ("pareto", "B"),
    "pairs": ({"order": "composite", "weights": {"helpful": 1}}, "B"),
    "pairs.include": ("refined_only", "B"),
    "pairs.thresholds": ({"harmless": 7}, "B"),
    "pairs.score_grid": (0.5, "B"),
    "pairs.keep_system": (True, "B"),
    "pairs.truncated": ("allow", "B"),
    "evaluation.judge": ("spa_ray.microworld.oracle:judge", "E"),
    "evaluation.objectives": (["helpful", "harmless"], "E"),
    "evaluation.scoring": ({"scale": [1, 5]}, "E"),
    "evaluation.sampling.temperature": (0.5, "E"),
    "evaluation.sampling.top_p": (0.9, "E"),
    "evaluation.sampling.min_p": (0.1, "E"),
    "evaluation.sampling.top_k": (40, "E"),
    "evaluation.sampling.repetition_penalty": (1.1, "E"),
    "evaluation.sampling.max_tokens": (64, "E"),
    "evaluation.sampling.stop": (["User:"], "E"),
    "steer.how": ("none", "GE"),
    "steer.column": ("wish", "GE"),
    "steer.floors": ({"harmless": 0.8}, "GE"),
    "steer.discretize": (True, "GE"),
    "steer": ({"helpful": 0.9}, "GE"),
}

# Sections and keys that no key of a stage covers, and why.
UNCOVERED = {
    "name": "names the run",
    "run_dir": "says where it is",
    "profile": "is resolved into other keys",
    "arms": "are resolved into configs",
    "model.path": "the files' hash stands for it",
    "model.revision": "the files' hash stands for it",
    "model.tensor_parallel_size": "changes rounding alone",
    "prompts": "their contents are an input",
    "episodes": "their contents are an input",
    "evaluation.prompts": "their contents are an input",
    "evaluation.families": "their contents are an input",
    "merge": "an arm's: has a stage of its own: test_merge.py",
    "evaluation.rv": "has a stage of its own: test_rv.py",
    "evaluation.judges": "each has a stage of its own: test_pairwise.py",
    "evaluation.pairwise": "has a stage of its own: test_pairwise.py",
    "evaluation.benchmarks": "each has a stage of its own: test_evaluation_benchmarks.py",
    "evaluation.bootstrap": "is read when the metrics are computed, by no stage",
    "evaluation.unsafe_below": "is read when the metrics are computed, by no stage",
    "scoring.pattern": "is read in mode regex alone",
    "generation": "how rows are asked and asked again",
    "iterations": "reach the stages as their inputs",
    "resources": "where the work runs",
    "tracking": "what is reported",
    "budget": "when a run stops",
}

CHANGED = {
    "train": {
        "method": "sft", "beta": 1.0, "gamma": 0.2, "alpha": 0.5, "gap": "l1", "w_max": 2.0, "lr": 1e-5, "epochs": 2.0,
        "batch_size": 8, "order": "prompts", "gap_mean": "epoch", "max_length": 128, "dtype": "float32",
        "zero_stage": 3, "adam_betas": [0.95, 0.95],
    },
}  # fmt: skip


def base(tmp_path: Path, **more: Any) -> Config:
    return load(tmp_path, {"model.path": "none"} | more)


def load(folder: Path, values: dict[str, Any]) -> Config:
    import yaml

    tree: dict[str, Any] = {}
    for dotted, value in values.items():
        *above, last = dotted.split(".")
        inner = tree
        for name in above:
            inner = inner.setdefault(name, {})
        inner[last] = value
    file = folder / "c.yaml"
    file.write_text(yaml.safe_dump(tree))
    return load_config(file, [])["main"]


def keys(config: Config) -> dict[str, str]:
    return {name[0].upper(): STAGES[name].key(config, {}) for name in UNTIL}


def changed(before: Config, after: Config) -> str:
    a, b = keys(before), keys(after)
    return "".join(stage for stage in a if a[stage] != b[stage])


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        inner = field.annotation
        if typing.get_origin(inner) in (typing.Union, types.UnionType):
            inner = next((a for a in typing.get_args(inner) if isinstance(a, type) and issubclass(a, BaseModel)), inner)
        if isinstance(inner, type) and issubclass(inner, BaseModel) and inner.__name__ != "Lora":
            yield from leaves(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def test_every_key_of_the_config_is_in_the_table() -> None:
    known = {*TABLE, *UNCOVERED}
    missing = [
        key
        for key in leaves(Config)
        if not key.startswith("train.") and not any(key == k or key.startswith(f"{k}.") for k in known)
    ]
    assert not missing, "say here which stages these keys start again"


@pytest.mark.parametrize("key", TABLE)
def test_a_key_starts_those_stages_again_that_read_it(key: str, tmp_path: Path) -> None:
    value, stages = TABLE[key]
    if value == "CONSTITUTION":
        value = str(tmp_path / "own.yaml")
        Path(value).write_text("{harmless: {principle: other}, helpful: {principle: words}}")
    assert changed(base(tmp_path), base(tmp_path, **{key: value})) == stages


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.revision", "abc"),
        ("model.tensor_parallel_size", 2),
        ("generation", {"max_attempts": 9, "stall_timeout_s": 5, "rows_per_block": 4}),
        ("resources", {"concurrency": 7, "train_workers": 3, "engines": {"min": 2, "max": 4}}),
        ("tracking", {"backends": []}),
        ("evaluation.bootstrap", 10),
        ("evaluation.unsafe_below", 4.0),
        ("scoring.pattern", r"(\d)"),
        ("scoring", {"prompt": None, "layout": "objective_first"}),
        *(("model.engine_kwargs", {name: 1}) for name in sorted(NEUTRAL_ENGINE_ARGUMENTS)),
    ],
)
def test_what_changes_no_result_starts_nothing_again(key: str, value: Any, tmp_path: Path) -> None:
    assert changed(base(tmp_path), base(tmp_path, **{key: value})) == ""


@pytest.mark.parametrize(("name", "value"), CHANGED["train"].items())
def test_training_keys_start_training_alone(name: str, value: Any, tmp_path: Path) -> None:
    assert changed(base(tmp_path), base(tmp_path, **{f"train.{name}": value})) == "T"


def test_a_weight_by_the_draws_starts_training_alone_and_none_is_as_before_the_key(tmp_path: Path) -> None:
    drawn = {"scoring.draws": 3}
    before = base(tmp_path, **drawn)
    assert changed(before, base(tmp_path, **drawn, **{"train.uncertainty": "draws"})) == "T"
    assert not {"uncertainty", "adam_betas"} & before.train.identified_by()
    with pytest.raises(InputError, match=r"set scoring\.draws to 2 or more"):
        base(tmp_path, **{"train.uncertainty": "draws"})


NEUTRAL = {"gpu_memory_utilization", "max_num_seqs", "max_num_batched_tokens", "enforce_eager", "disable_log_stats"}
NEUTRAL |= {"enable_prefix_caching", "block_size"}


def test_the_neutral_arguments_are_those_seven_and_all_of_vllms_for_swapping_and_offloading() -> None:
    import dataclasses

    from vllm import EngineArgs

    known = {field.name for field in dataclasses.fields(EngineArgs)}
    moving = {name for name in known if "offload" in name or "swap" in name}
    assert moving | NEUTRAL <= known
    assert NEUTRAL | moving | {"swap_space"} == NEUTRAL_ENGINE_ARGUMENTS  # the last is an older vLLM's


@pytest.mark.parametrize("name", ["kv_cache_dtype", "quantization", "seed", "enable_chunked_prefill", "hf_overrides"])
def test_every_other_argument_counts(name: str, tmp_path: Path) -> None:
    assert changed(base(tmp_path), base(tmp_path, **{"model.engine_kwargs": {name: 1}})) == "GE"


def test_another_engines_arguments_all_count(tmp_path: Path) -> None:
    own = {"model.engine": "spa_ray.engine.scripted:ScriptedEngine"}
    before, after = base(tmp_path, **own), base(tmp_path, **own, **{"model.engine_kwargs": {"max_num_seqs": 3}})
    assert changed(before, after) == "GE"


def test_a_mode_does_not_cover_the_keys_that_it_never_reads(tmp_path: Path) -> None:
    expected = {"scoring.mode": "expected"}
    for key, value in (("draws", 3), ("retries", 0), ("max_tokens", 3)):
        assert changed(base(tmp_path, **expected), base(tmp_path, **expected, **{f"scoring.{key}": value})) == ""
    regex = {"scoring.mode": "regex"}
    assert changed(base(tmp_path, **regex), base(tmp_path, **regex, **{"scoring.pattern": r"(\d)"})) == "GE"


def test_a_function_that_judges_reads_the_scale_alone_and_its_code_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = tmp_path / "own_judge_of_keys.py"
    code.write_text("def judge(*a): return 1")
    judged = {"evaluation.judge": "own_judge_of_keys:judge"}
    before = base(tmp_path, **judged)
    assert changed(before, base(tmp_path, **judged, **{"scoring.draws": 3})) == "GB"
    assert changed(before, base(tmp_path, **judged, **{"scoring.scale": [1, 9]})) == "GE"
    first = keys(before)["E"]
    code.write_text("def judge(*a): return 2")
    assert keys(before)["E"] != first


def test_the_weights_key_covers_the_models_code_and_no_second_copy_of_its_weights(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"w")
    first = model_hash(tmp_path)
    (tmp_path / "consolidated.safetensors").write_bytes(b"w")
    (tmp_path / "README.md").write_text("r")
    assert model_hash(tmp_path) == first
    (tmp_path / "modeling_own.py").write_text("1")
    assert model_hash(tmp_path) != first


def test_a_stage_records_each_attempts_values(tmp_path: Path) -> None:
    stage = StageFolder("generate", "h", tmp_path)
    for share in (0.9, 0.5):
        config = base(tmp_path, **{"model.engine_kwargs": {"gpu_memory_utilization": share}})
        stage.begin(attempt(config))
    found = stage.finish(0.0)["attempts"]
    assert [a["model"]["engine_kwargs"] for a in found] == [{"gpu_memory_utilization": s} for s in (0.9, 0.5)]
    assert stage.facts()["attempts"] == found
    assert {"started", "resources", "generation"} <= set(found[0])


def test_a_judge_prompt_of_ones_own_has_no_layout(tmp_path: Path) -> None:
    own = {"scoring.prompt": "Rate {{ answer }}"}
    assert changed(base(tmp_path, **own), base(tmp_path, **own, **{"scoring.layout": "answer_first"})) == ""
