"""`spa plan`: what it counts, shares, prices and assumes; and a run's plan beside what happened."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_ray.config import arm_configs
from spa_ray.config.models import Config
from spa_ray.engine import cpu_dtype
from spa_ray.engine.scripted import ScriptedTokenizer
from spa_ray.errors import InputError
from spa_ray.pipeline import plan_cost as cost
from spa_ray.pipeline.plan import SUMMED, make_plan
from spa_ray.pipeline.plan_compare import compare_run
from spa_ray.pipeline.plan_model import ModelFacts, context_of, engine_dtype, kv_values, model_facts
from spa_ray.pipeline.plan_prompts import COUNTED, prompt_facts
from spa_ray.pipeline.plan_tokens import BLOCK, CharEncoder, Work, _Cache, answer_work, episode_work
from spa_ray.pipeline.recipe import planned_stages
from spa_ray.pipeline.stages import STAGES
from spa_ray.rollout.chat import Chat
from tests.scripted import prompt, scripted_config, scripted_episodes

LLAMA_8B = ModelFacts("m", 8.03e9, "bfloat16", 16.06e9, 131_072.0, 8, 8192, False)
DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"


def configs(arms: dict[str, Any] | None = None, **raw: Any) -> dict[str, Config]:
    small = {"model": {"path": "org/some-8B"}, "prompts": {"source": "honeset", "limit": 400}}
    return arm_configs({**small, **raw, "arms": arms or {"main": {}}}, [], where="test", stem="test")


def config(**raw: Any) -> Config:
    return configs(**raw)["main"]


# --- which stages --------------------------------------------------------------------------------------------------


def stages_of(arms: dict[str, Config]) -> list[tuple[str, int, list[str]]]:
    return [(s.stage, s.iteration, s.arms) for s in planned_stages(arms)]


def test_arms_share_every_stage_whose_inputs_and_settings_are_equal() -> None:
    arms = configs({"sft": {"train.method": "sft"}, "spa": {}, "robust": {"profile": "robust"}, "same": {}})
    assert stages_of(arms) == [
        ("generate", 1, ["sft", "spa", "robust", "same"]),
        ("build", 1, ["sft", "spa", "same"]),
        ("build", 1, ["robust"]),
        ("train", 1, ["sft"]),
        ("train", 1, ["spa", "same"]),
        ("train", 1, ["robust"]),
    ]


def test_a_second_iteration_is_shared_only_from_the_same_policy() -> None:
    arms = configs({"two": {"iterations.count": 2}, "sft": {"iterations.count": 2, "train.method": "sft"}})
    assert [arms for stage, iteration, arms in stages_of(arms) if (stage, iteration) == ("generate", 2)] == [
        ["two"],
        ["sft"],
    ]


def test_evaluation_is_of_vanilla_and_of_every_different_last_model() -> None:
    held_out = {"prompts": {"source": "honeset", "limit": 50}}
    arms = configs({"spa": {}, "same": {}, "sft": {"train.method": "sft"}}, evaluation=held_out)
    evaluated = [arms for stage, _, arms in stages_of(arms) if stage == "evaluate"]
    assert evaluated == [["vanilla"], ["spa", "same"], ["sft"]]


def test_the_total_counts_a_shared_stage_once() -> None:
    one, two = (make_plan(configs(arms)) for arms in ({"a": {}}, {"a": {}, "b": {}}))
    assert two["total"] == one["total"]
    split = make_plan(configs({"a": {}, "b": {"sampling.temperature": 0.9}}))
    for key in ("requests", "prompt_tokens", "generated_tokens"):
        assert split["total"][key] == 2 * one["total"][key] > 0


# --- requests and tokens -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{}, {"sampling": {"n": 4}}, {"scoring": {"draws": 2}}, {"objectives": ["harmless", "helpful", "honest"]}],
)
def test_requests_are_those_that_an_engine_is_asked(changes: dict[str, Any]) -> None:
    arm = scripted_config({"answers": 10**9}, **changes)
    episodes, engine = scripted_episodes(arm)
    row = asyncio.run(episodes.run(prompt()))
    work = episode_work(arm, [prompt()["messages"]], Chat(ScriptedTokenizer(), model="m"), context=8192)
    assert work.requests == engine.served
    # Answers are of another length than assumed; everything else is the same prompts.
    assert work.prompt_tokens == pytest.approx(row["prompt_tokens"], rel=0.15)


def test_a_function_judge_asks_the_engine_nothing() -> None:
    arm = scripted_config(evaluation={"sampling": {"max_tokens": 40}})
    messages = [prompt()["messages"]]
    answered, scored = answer_work(arm, messages, CharEncoder(), judged=False)
    assert (answered.requests, scored) == (1, Work())
    again, judged = answer_work(arm, messages, CharEncoder(), judged=True)
    assert again == answered
    assert judged.requests == len(arm.objectives)


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=80), max_size=8))
def test_a_cache_never_computes_more_than_it_is_asked_nor_nothing(requests: list[list[int]]) -> None:
    cache = _Cache()
    for ids in requests:
        assert 1 <= cache.computed(ids) <= len(ids)
        assert cache.computed(ids) == len(ids) - (len(ids) - 1) // BLOCK * BLOCK  # all full blocks but a last one


def test_a_common_prefix_is_computed_once() -> None:
    cache = _Cache()
    head = list(range(64))
    assert cache.computed([*head, 1, 2]) == 66
    assert cache.computed([*head, 3, 4, 5]) == 3
    assert cache.computed([9, *head]) == 65


# --- the model -----------------------------------------------------------------------------------------------------


def test_the_type_of_auto_is_the_models_own_and_never_float32() -> None:
    assert engine_dtype("auto", "float16") == "float16"
    assert engine_dtype("auto", "bfloat16") == "bfloat16"
    assert engine_dtype("auto", "float32") == "bfloat16"  # vLLM turns such models to 16 bits
    assert engine_dtype("float32", "bfloat16") == "float32"


def test_a_plan_for_processors_takes_the_type_that_a_run_takes(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_dtype, "built_for_cpu", lambda: True)
    monkeypatch.setattr(cpu_dtype, "processor_flags", lambda: frozenset({"avx2"}))
    model = {"path": str(tiny_model), "dtype": "auto"}
    assert make_plan(configs(model=model))["model"]["dtype"] == "float32"
    assert make_plan(configs(model=model, resources={"gpus_per_engine": 1}))["model"]["dtype"] == "bfloat16"
    monkeypatch.setattr(cpu_dtype, "processor_flags", lambda: frozenset({"avx512_bf16"}))
    assert make_plan(configs(model=model))["model"]["dtype"] == "bfloat16"


def test_facts_are_read_off_the_model_folder(tiny_model: Path) -> None:
    notes: list[str] = []
    settings = json.loads((tiny_model / "config.json").read_text())
    for dtype, size in (("float32", 4), ("auto", 2)):
        facts = model_facts(config(model={"path": str(tiny_model), "dtype": dtype}).model, notes)
        heads, layers = settings["num_key_value_heads"], settings["num_hidden_layers"]
        head = settings.get("head_dim") or settings["hidden_size"] // settings["num_attention_heads"]
        assert facts.kv_bytes_per_token == 2 * layers * heads * head * size
        assert facts.weight_bytes == facts.parameters * size > 0
        assert facts.context == settings["max_position_embeddings"]
    assert notes == []


def test_a_model_that_is_not_here_is_estimated_and_said_so() -> None:
    notes: list[str] = []
    facts = model_facts(config(model={"path": "org/Some-70B-Instruct"}).model, notes)
    assert (facts.parameters, facts.estimated, facts.kv_bytes_per_token) == (70e9, True, None)
    assert "70 B parameters estimated from its name" in notes[0]


def test_a_model_that_was_fetched_before_is_read(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    there = tmp_path / "models--org--tiny-8B"
    shutil.copytree(tiny_model, there / "snapshots" / "abc")
    (there / "refs").mkdir()
    (there / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    asked = config(model={"path": "org/tiny-8B"}).model
    assert not model_facts(asked, []).estimated
    (there / "snapshots" / "abc" / "model.safetensors").unlink()
    assert model_facts(asked, []).estimated


def test_kv_cache_of_known_architectures() -> None:
    llama = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}
    assert kv_values(llama) == (65_536, 8)
    latent = {"num_hidden_layers": 61, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "num_attention_heads": 128}
    assert kv_values(latent) == (35_136, 1)
    assert kv_values({"model_type": "unknown"}) == (None, None)
    assert context_of({"n_positions": 1024}) == 1024
    assert context_of({}) is None


# --- memory, time, money -------------------------------------------------------------------------------------------


def gpu(arm: Config) -> cost.Devices:
    return cost.devices(arm, LLAMA_8B.parameters)


def memory_of(arm: Config) -> dict[str, Any]:
    return cost.memory(arm, LLAMA_8B, gpu(arm), prompt_tokens=100)


def test_contexts_that_fit_into_the_cache() -> None:
    found = memory_of(config())
    assert found["kv_cache_per_context"] == 1.0  # 8,192 tokens of 128 KiB
    assert found["kv_cache"] == pytest.approx(80 * 0.92 - 16.06e9 / 2**30 - 4, abs=0.001)
    assert found["contexts"] == int(found["kv_cache"])
    samples = 5 * (1024 + 100) * 128 / 2**20  # GiB of a prompt's five answers at their longest
    assert found["prompts"] == int(found["kv_cache"] / samples)
    small = memory_of(arm := config(resources={"gpu_memory_gib": 20}))
    assert small["contexts"] == 0
    assert any("does not fit" in note for note in cost.does_it_fit(arm, small))


def test_a_cache_that_is_smaller_than_the_concurrency_is_said() -> None:
    found = memory_of(config())
    assert 64 < found["prompts"] < 128
    assert any("resources.concurrency is 128" in note for note in cost.does_it_fit(config(), found))
    assert not any(
        "resources.concurrency" in note for note in cost.does_it_fit(config(resources={"concurrency": 64}), found)
    )


def test_tensor_parallel_engines_divide_weights_and_heads() -> None:
    for spread, heads in ((2, 2), (8, 8), (16, 8)):  # 8 heads cannot be divided by 16: each GPU holds one
        arm = config(model={"path": "m/8B", "tensor_parallel_size": spread})
        found = memory_of(arm)
        assert found["engine_weights"] == pytest.approx(16.06e9 / 2**30 / spread, abs=0.001)
        assert found["kv_cache_per_context"] == pytest.approx(1 / heads, abs=0.001)
        assert gpu(arm).gpus_per_engine == spread


def test_a_cache_in_8_bits_holds_twice_as_much(tiny_model: Path) -> None:
    path = {"path": str(tiny_model)}
    plain, eight = (
        model_facts(config(model={**path, "engine_kwargs": k}).model, []) for k in ({}, {"kv_cache_dtype": "fp8"})
    )
    assert plain.kv_bytes_per_token == 2 * (eight.kv_bytes_per_token or 0)


def test_the_kind_of_device_follows_the_config_and_else_the_models_size() -> None:
    assert gpu(config()).gpus_per_engine == 1
    assert gpu(config(resources={"gpus_per_engine": 0})).rates is cost.CPU
    assert cost.devices(config(), 1.1e6).rates is cost.CPU
    assert cost.devices(config(), 1.1e6).assumed
    both = config(resources={"gpus_per_engine": 1, "gpus_per_worker": 1})
    assert not cost.devices(both, 1.1e6).assumed
    assert cost.devices(both, 1.1e6).rates is cost.GPU


def test_twice_the_engines_take_half_the_working_time() -> None:
    work = Work(1e6, 1e9, 1e9, 1e8)
    one, two = (config(resources={"engines": {"min": 1, "max": n}}) for n in (1, 2))
    start = cost.pass_seconds(LLAMA_8B, cost.GPU)
    long, short = (cost.generate_seconds(work, LLAMA_8B, gpu(arm)) - start for arm in (one, two))
    assert long == pytest.approx(2 * short)


def test_training_counts_what_passes_through_the_model() -> None:
    def job(**train: Any) -> cost.Training:
        arm = config(train=train)
        return cost.training(arm, LLAMA_8B, 4000, 100.0, gpu(arm))

    plain = job()
    assert plain.pairs == cost.pairs_of(config(), 4000) > 0
    assert job(method="sft").tokens < plain.tokens / 2  # each chosen answer once
    assert 3 < plain.tokens / job(order="prompts").tokens < 4.5  # a prompt's pairs share their sequences
    assert job(order="prompts", batch_size=128).tokens < job(order="prompts").tokens
    few = {"max_pairs": 462}  # a tenth, drawn over all prompts: few of them share a sequence
    assert job(order="prompts", **few).tokens > 0.7 * job(**few).tokens
    assert job(epochs=2.0).tokens == 2 * plain.tokens
    assert job(max_pairs=64).pairs == 64
    assert job(max_steps=7).steps == 7
    assert job(method="spa_dpo").seconds > plain.seconds  # the reference's log-probs
    without = job(gradient_checkpointing=False)
    assert job(gradient_checkpointing=True).seconds == pytest.approx(without.seconds * 8 / 6)


def test_fewer_filters_leave_more_pairs() -> None:
    strict = cost.pairs_of(config(), 1000)
    assert strict < cost.pairs_of(config(denoise={"informativeness": False}), 1000)
    assert strict < cost.pairs_of(config(denoise={"consistency": "off"}), 1000)
    assert strict < cost.pairs_of(config(denoise={"on_inconsistent": "drop_refined"}), 1000)
    assert strict > cost.pairs_of(config(pairs={"include": "refined_only"}), 1000)


def test_what_looks_at_no_rejected_answer_takes_each_answer_once() -> None:
    def examples(method: str, **sections: Any) -> float:
        arm = config(train={"method": method}, sampling={"n": 4}, **sections)
        return cost.examples_of(arm, 1000, cost.pairs_of(arm, 1000))

    given = {"denoise": {"consistency": "off", "informativeness": False}, "pairs": {"include": "candidates_only"}}
    assert examples("sft", **given) == 3000  # all but each prompt's worst
    assert examples("cpo", **given) == examples("ric", **given) == 4000
    assert examples("sft", **{**given, "pairs": {"order": "mean"}}) == 1000


def test_the_highest_mean_against_the_lowest_is_one_pair_per_prompt() -> None:
    mean = config(pairs={"order": "mean"}, train={"method": "spa_dpo"})
    assert cost.pairs_of(mean, 1000) == 1000
    assert cost.sequences_a_pair(mean, pairs=1000, of=1000, batch=64) == 2


def test_a_price_makes_costs_of_gpu_hours_and_changes_no_address() -> None:
    free, dear = configs(), configs(resources={"price_per_gpu_hour": 4.0})
    assert make_plan(free)["total"]["cost"] is None
    plan = make_plan(dear)
    assert plan["total"]["cost"] == pytest.approx(4 * plan["total"]["gpu_hours"], abs=0.01)
    assert make_plan(dear, price=2.0)["total"]["cost"] == pytest.approx(plan["total"]["cost"] / 2, abs=0.01)
    hashes = [STAGES["generate"].key(c["main"], {}) for c in (free, dear)]
    assert hashes[0] == hashes[1]


def test_the_total_is_the_stages_and_the_starts_of_the_workers() -> None:
    plan = make_plan(configs({"a": {}, "b": {"iterations.count": 2}}, evaluation={"prompts": {"source": "honeset"}}))
    for key in SUMMED[:4]:
        assert plan["total"][key] == sum(stage[key] for stage in plan["stages"])
    starts = 2 * cost.GPU.group_start
    assert plan["total"]["seconds"] == pytest.approx(sum(s["seconds"] for s in plan["stages"]) + starts, abs=0.1)
    assert {stage["stage"] for stage in plan["stages"]} == {"generate", "build", "train", "evaluate"}


# --- prompts -------------------------------------------------------------------------------------------------------


def test_a_limit_beyond_the_source_is_not_believed(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("".join(f'{{"prompt": "question {i}"}}\n' for i in range(30)))
    facts = prompt_facts(config(prompts={"source": str(tmp_path / "p.jsonl"), "limit": 1000}).prompts, [], "prompts")
    assert (facts.count, facts.estimated) == (30, False)


@pytest.mark.parametrize(("suffix", "limit", "count"), [("parquet", None, 12_000), ("jsonl", None, COUNTED)])
def test_a_large_source_is_counted_by_its_own_word_or_said_not_to_be(
    tmp_path: Path, suffix: str, limit: int | None, count: int
) -> None:
    texts = [f"question {i}" for i in range(12_000)]
    path = tmp_path / f"p.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.table({"prompt": texts}), path)
    else:
        path.write_text("".join(json.dumps({"prompt": t}) + "\n" for t in texts))
    notes: list[str] = []
    facts = prompt_facts(config(prompts={"source": str(path), "limit": limit}).prompts, notes, "prompts")
    assert (facts.count, facts.estimated) == (count, True)
    assert len(notes) == 1
    assert facts.sample[0] != facts.sample[-1]


# --- the command ---------------------------------------------------------------------------------------------------


def test_planning_imports_no_engine_and_no_cluster() -> None:
    code = (
        "import sys; from spa_ray.config import load_config; from spa_ray.pipeline.plan import make_plan;"
        f"plan = make_plan(load_config({str(DEMO)!r}));"
        "print(plan['total']['requests'], sorted({'ray', 'vllm', 'torch', 'deepspeed'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # 18 requests for each of 1,500 prompts; 450 held-out answers of the base model and of three arms.
    assert done.stdout.split("\n")[0] == f"{18 * 1500 + 4 * 450} []"


def test_the_command_prices_and_prints(spa: Any) -> None:
    status, out, _ = spa("plan", DEMO, "resources.gpus_per_engine=1", "--price", "2.5", "--json")
    assert status == 0
    plan = json.loads(out.splitlines()[-1])
    assert plan["price_per_gpu_hour"] == 2.5
    assert plan["total"]["cost"] > 0
    assert "cost" in out
    for line in plan["assumptions"]:
        assert f"assumed: {line}" in out


def test_the_command_prints_how_answers_are_sampled(spa: Any) -> None:
    given = ["sampling.min_p=0.1", "sampling.top_k=40", "sampling.repetition_penalty=1.1", "sampling.stop=[User]"]
    _, plain, _ = spa("plan", DEMO)
    _, out, _ = spa("plan", DEMO, *given)
    assert "n 5, temperature 1.2, top_p 1, max_tokens 80 " in plain
    assert "top_p 1, min_p 0.1, top_k 40, repetition_penalty 1.1, max_tokens 80, stop ['User']" in out


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--price", "-1"], "--price"),
        (["--compare", "."], "--compare"),
    ],
)
def test_what_makes_no_sense_is_refused(spa: Any, arguments: list[str], part: str) -> None:
    status, _, err = spa("plan", DEMO, *arguments)
    assert status == 2
    assert part in err


# --- planned beside actual -----------------------------------------------------------------------------------------


@pytest.fixture
def run_dir(tmp_path: Path, tiny_model: Path) -> Path:
    """A run as the pipeline leaves it in the middle: generate done, build done, train begun, no evaluation."""
    folder = tmp_path / "run"
    (tmp_path / "p.jsonl").write_text('{"prompt": "How?"}\n{"prompt": "Why?"}\n')
    raw = {
        "model": {"path": str(tiny_model)},
        "prompts": {"source": str(tmp_path / "p.jsonl")},
        "evaluation": {"prompts": {"source": str(tmp_path / "p.jsonl")}},
    }
    arms = configs({"a": {}, "b": {"train.method": "sft"}}, **raw)
    facts = {"requests": 36, "prompt_tokens": 500, "generated_tokens": 100, "seconds": 4.5, "engine_busy": 0.5}
    names = {"prompts": "prompts-1", "generate": "generate-1", "build": "build-1", "train": "train-1"}
    for name, marker in {"generate-1": {"rows": 2, **facts}, "build-1": {"seconds": 1.0}, "train-1": None}.items():
        (folder / "stages" / name).mkdir(parents=True)
        if marker is not None:
            (folder / "stages" / name / "stage.json").write_text(json.dumps(marker))
    for arm in arms:
        (folder / "arms" / arm).mkdir(parents=True)
    (folder / "arms" / "a" / "iter_1.json").write_text(json.dumps({"stages": names}))
    resolved = {name: arm.model_dump(mode="json", exclude={"arms"}) for name, arm in arms.items()}
    (folder / "config.yaml").write_text(yaml.safe_dump({"arms": resolved}))
    (folder / "plan.json").write_text(json.dumps(make_plan(arms)))
    return folder


def found(compared: dict[str, Any], stage: str, arm: str) -> dict[str, Any]:
    return next(s for s in compared["stages"] if s["stage"] == stage and arm in s["arms"])


def test_a_run_is_compared_stage_by_stage(run_dir: Path) -> None:
    compared = compare_run(run_dir)
    generate = found(compared, "generate", "a")
    assert (generate["status"], generate["folder"]) == ("done", "generate-1")
    assert generate["planned"]["requests"] == 36
    assert generate["actual"]["engine_busy"] == 0.5
    assert generate["ratio"]["requests"] == 1.0
    assert generate["ratio"]["seconds"] == pytest.approx(4.5 / generate["planned"]["seconds"], abs=0.001)
    assert found(compared, "train", "a")["status"] == "unfinished"
    assert found(compared, "train", "b")["status"] == "not begun"
    assert found(compared, "evaluate", "vanilla")["actual"] == {}


def test_the_total_is_over_finished_stages_alone(run_dir: Path) -> None:
    total = compare_run(run_dir)["total"]
    assert total["actual"] == {"requests": 36, "prompt_tokens": 500, "generated_tokens": 100, "seconds": 5.5}
    assert total["planned"]["requests"] == 36
    assert total["ratio"]["requests"] == 1.0


def test_a_stage_under_way_shows_what_is_written(run_dir: Path) -> None:
    stage = run_dir / "stages" / "generate-1"
    (stage / "stage.json").unlink()
    (stage / "episodes" / "part=0").mkdir(parents=True)
    rows = pa.table({"prompt_id": ["x"], "prompt_tokens": [40], "generated_tokens": [7]})
    pq.write_table(rows, stage / "episodes" / "part=0" / "a.parquet")
    (stage / "episodes" / "part=0" / "b.parquet").write_bytes(b"PAR1 and no more")
    generate = found(compare_run(run_dir), "generate", "a")
    assert (generate["status"], generate["ratio"]) == ("unfinished", {})
    assert generate["actual"] == {"rows": 1, "prompt_tokens": 40, "generated_tokens": 7}


def test_a_run_older_than_its_plan_gets_one_now(run_dir: Path) -> None:
    with_plan = compare_run(run_dir)
    (run_dir / "plan.json").unlink()
    without = compare_run(run_dir)
    assert "no plan.json" in without["notes"][0]
    assert without["stages"] == with_plan["stages"]


def test_the_command_shows_both_sides_and_refuses_a_folder_that_is_no_run(spa: Any, run_dir: Path) -> None:
    status, out, _ = spa("plan", "--compare", run_dir, "--json")
    assert status == 0
    assert json.loads(out.splitlines()[-1])["run_dir"] == str(run_dir)
    assert "36 / 36 (×1.00)" in out
    status, _, err = spa("plan", "--compare", run_dir.parent)
    assert status == 2
    assert "not a run folder" in err


def test_a_cut_weight_file_stops_the_plan(tmp_path: Path, tiny_model: Path) -> None:
    import shutil

    shutil.copytree(tiny_model, tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(InputError, match="cut at"):
        model_facts(config(model={"path": str(tmp_path / "cut")}).model, [])
