"""The memory of a training step as planned: against saved tensors that were measured, and as refusals with fixes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spa_ray.config import load_config
from spa_ray.config.models import Resources
from spa_ray.config.training import Lora, Train
from spa_ray.errors import InputError
from spa_ray.pipeline import host as host_module
from spa_ray.pipeline import plan_cost as cost
from spa_ray.pipeline.host import Host, largest_host, planned_host
from spa_ray.pipeline.placement import Node
from spa_ray.pipeline.plan_memory import model_shape, refusal
from spa_ray.pipeline.plan_model import ModelFacts
from spa_ray.pipeline.preflight_memory import check_training_memory
from spa_ray.training.attention import use_attention
from spa_ray.training.forward import ResponseLogps
from spa_ray.training.guards import HALF_STEP, check_lr, check_movement, movement
from spa_ray.training.memory import (
    GIB,
    Shape,
    layer_bytes,
    logits_mib,
    lora_parameters,
    micro_batch,
    shape_of,
    step_memory,
)
from spa_ray.training.policy import add_lora, disable_dropout
from spa_ray.training.relief import changes, is_out_of_memory
from tests.training_support import make_job

CONFIGS = Path(__file__).parents[1] / "configs"
LLAMA_8B = ModelFacts("meta-llama/Llama-3.1-8B-Instruct", 8.03e9, "bfloat16", 16.06e9, None, None, 8192, True)
SIZES = {
    "hidden_size": 128, "intermediate_size": 448, "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 64,
    "head_dim": 16, "max_position_embeddings": 256, "tie_word_embeddings": False,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen2": {}, "qwen3": {}, "mistral": {"sliding_window": None}, "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 16}, "gemma3_text": {"query_pre_attn_scalar": 16},
}  # fmt: skip


def model_of(family: str, layers: int, dtype: torch.dtype) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES, **FAMILIES[family], num_hidden_layers=layers)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    disable_dropout(model)
    return model


def saved_bytes(policy: ResponseLogps, *, sequences: int = 2, length: int = 96) -> int:
    """Bytes of the distinct storages that autograd keeps for one micro-batch, parameters left out."""
    known = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no address is used twice
        return tensor

    ids = np.random.default_rng(0).integers(0, 64, size=(sequences, length))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        policy(policy.collate([(row[:32], row[32:]) for row in ids], "cpu"))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def measured_layer(
    family: str, dtype: torch.dtype, *, packed: bool, lora: Lora | None = None, checkpointing: bool = False
) -> float:
    """Bytes per token of one layer: the difference between models of three and of two layers."""
    found = []
    for layers in (2, 3):
        model = model_of(family, layers, dtype)
        model = model if lora is None else add_lora(model, lora, 0)
        if checkpointing:
            model.train()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        use_attention(model, packed=packed)
        found.append(saved_bytes(ResponseLogps(model, packed=packed, logits_budget=1 << 20)))
    return (found[1] - found[0]) / (2 * 96)


def shape(family: str) -> Shape:
    settings = model_of(family, 2, torch.float32).config.to_dict()
    found = shape_of(settings)
    assert found is not None
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layers_planned_activations_are_what_autograd_saves(family: str, dtype: torch.dtype) -> None:
    packed = family != "gemma2"
    measured = measured_layer(family, dtype, packed=packed)
    planned = layer_bytes(shape(family), dtype.itemsize, flash=False, longest=96)
    assert planned == pytest.approx(measured, rel=0.15)


def test_adapters_save_no_normalised_values() -> None:
    measured = measured_layer("llama", torch.bfloat16, packed=True, lora=Lora(r=8))
    small = shape("llama")
    planned = layer_bytes(small, 2, flash=False, frozen=True) + 2 * 8 * len(small.linears)
    assert planned == pytest.approx(measured, rel=0.15)


def test_with_checkpointing_a_layer_keeps_its_input() -> None:
    measured = measured_layer("llama", torch.bfloat16, packed=True, checkpointing=True)
    assert measured == pytest.approx(2 * SIZES["hidden_size"], rel=0.15)


def test_an_8b_layer_in_bfloat16_with_flash_attention_saves_196_kib_per_token() -> None:
    assert layer_bytes(model_shape(LLAMA_8B), 2, flash=True) / 1024 == pytest.approx(196, abs=1)


# --- a rank's state ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "expected"), [(1, (2, 2, 12 / 8)), (2, (2, 4 / 8, 12 / 8)), (3, (2 / 8, 4 / 8, 12 / 8))]
)
def test_zero_divides_what_it_says(stage: int, expected: tuple[float, float, float]) -> None:
    big = model_shape(LLAMA_8B)
    found = step_memory(Train(zero_stage=stage), big, 8, gpu=True)  # type: ignore[arg-type]
    bytes_each = tuple(x / big.parameters for x in (found.weights, found.gradients, found.optimizer))
    assert bytes_each == pytest.approx(expected)


def test_adapters_are_counted_as_peft_makes_them() -> None:
    model = add_lora(model_of("llama", 2, torch.float32), Lora(r=4), 0)
    real = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert lora_parameters(Train(lora=Lora(r=4)), shape("llama")) == real


def test_a_dense_models_parameters_follow_from_its_settings() -> None:
    model = model_of("llama", 2, torch.float32)
    assert shape("llama").parameters == pytest.approx(sum(p.numel() for p in model.parameters()), rel=0.01)


def test_a_micro_batch_is_limited_by_the_pairs_of_a_step() -> None:
    assert micro_batch(Train(max_length=100), 1) == 800
    assert micro_batch(Train(max_length=100, batch_size=8), 8) == 200
    assert micro_batch(Train(max_length=100, micro_batch_tokens=10), 1) == 100  # a sequence cannot be divided


def test_checkpointing_left_open_is_on_where_a_step_would_not_fit_and_off_without_a_gpu() -> None:
    big = model_shape(LLAMA_8B)
    train = Train(zero_stage=3)
    assert step_memory(train, big, 8, gpu=True, limit=80 * GIB).checkpointing
    assert not step_memory(train, big, 8, gpu=True, limit=200 * GIB).checkpointing
    assert not step_memory(train, big, 8, gpu=False).checkpointing
    explicit = train.model_copy(update={"gradient_checkpointing": False})
    assert not step_memory(explicit, big, 8, gpu=True, limit=80 * GIB).checkpointing


def test_checkpointing_left_open_changes_no_hash() -> None:
    assert Train().identity() == Train(gradient_checkpointing=False).identity()


# --- refusals ---------------------------------------------------------------------------------------------------------

RECIPE = str(CONFIGS / "llama-3.1-8b-saferlhf.yaml")


@pytest.mark.parametrize("gib", [48, 80])
@pytest.mark.parametrize("workers", [1, 2, 4, 8])
def test_the_8b_recipe_fits_or_is_refused_with_a_change_that_fits(workers: int, gib: int) -> None:
    given = [f"resources.train_workers={workers}", f"resources.gpu_memory_gib={gib}"]
    said = refusal(load_config(RECIPE, given), LLAMA_8B)
    assert (said is None) == (workers >= 4)
    if said is not None:
        assert "\n" not in said
        fix = said.partition("; set ")[2].split()
        assert refusal(load_config(RECIPE, [*given, *fix]), LLAMA_8B) is None


@pytest.mark.parametrize("billions", [1.2, 8.03, 70.6])
@pytest.mark.parametrize("gib", [12, 24, 80])
@pytest.mark.parametrize("train", [{}, {"train.lora.r": 16}, {"train.zero_stage": 0}, {"train.method": "spa_dpo"}])
def test_every_fix_that_is_named_is_one_that_the_config_takes_and_that_fits(
    billions: float, gib: int, train: dict[str, Any]
) -> None:
    facts = replace(LLAMA_8B, parameters=billions * 1e9)
    given = [f"resources.gpu_memory_gib={gib}", "arms={main: {}}", *(f"{k}={v}" for k, v in train.items())]
    said = refusal(load_config(RECIPE, given), facts)
    if said is not None and "; set " in said:
        fix = said.partition("; set ")[2].split()
        assert refusal(load_config(RECIPE, [*given, *fix]), facts) is None


@pytest.mark.parametrize("name", [*sorted(p.name for p in CONFIGS.glob("*-8b-*.yaml")), "mistral-7b-wildguard.yaml"])
def test_a_shipped_recipe_fits_its_gpus_and_moves_weights_by_more_than_bfloat16_rounds(name: str) -> None:
    arms = load_config(str(CONFIGS / name))
    assert refusal(arms, LLAMA_8B) is None
    for config in arms.values():
        train = config.train
        steps = cost.training(config, LLAMA_8B, 400, 30.0, cost.devices(config, LLAMA_8B.parameters)).steps
        assert movement(train, LLAMA_8B.parameters, steps) > 2 * HALF_STEP
        assert check_lr(train, LLAMA_8B.parameters) is None


@pytest.mark.parametrize(("lr", "steps", "lora", "said"), [
    (1e-6, 15, None, True), (5e-7, 15, None, True), (1e-6, 470, None, False), (3e-6, 115, None, False),
    (1e-5, 15, Lora(), True), (5e-5, 115, Lora(), False),
])  # fmt: skip
def test_a_run_that_moves_weights_by_less_than_bfloat16_rounds_is_said(
    lr: float, steps: int, lora: Lora | None, said: bool
) -> None:
    train = Train(lr=lr, lora=lora)
    assert (check_movement(train, 8e9, steps) is not None) == said
    assert check_movement(train.model_copy(update={"dtype": "float32"}), 8e9, steps) is None


def test_a_move_below_half_a_step_leaves_most_bfloat16_weights_as_they_were() -> None:
    weights = 0.02 * torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    same = [((weights + by).bfloat16() == weights.bfloat16()).float().mean() for by in (8e-6, 2 * HALF_STEP)]
    assert same[0] > 0.75
    assert same[1] < 0.1


def test_changes_that_leave_the_trained_weights_alike_come_first() -> None:
    found = [text for text, _ in changes(Train(), Resources(train_workers=2))]
    assert found[:4] == [
        "train.gradient_checkpointing=true", "train.micro_batch_tokens=2048",
        "train.zero_stage=3", "train.offload=true",
    ]  # fmt: skip
    kinds = [
        next(i for i, text in enumerate(found) if word in text) for word in ("offload", "lora.r", "nf4", "train_w")
    ]
    assert kinds == sorted(kinds)


def test_spa_plan_says_it_and_ends_with_exit_status_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from spa_ray.cli.main import main

    small = [
        "model.path=org/some-8B",
        "prompts.source=honeset",
        "evaluation.prompts=null",
        "prompts.decontaminate=null",
        "resources.train_workers=1",
    ]
    monkeypatch.setattr("sys.argv", ["spa", "plan", RECIPE, *small])
    with pytest.raises(SystemExit) as e:
        main()
    said = capsys.readouterr()
    assert e.value.code == 2
    assert "does not fit" in said.out
    assert "set train.offload=true" in said.err.splitlines()[-1]


def test_preflight_takes_the_memory_of_the_smallest_gpu_and_refuses(tiny_model: Path) -> None:
    def node(*types: str, gpus: float = 8.0) -> list[Node]:
        return [Node(t, "10.0.0.1", {"GPU": gpus, f"accelerator_type:{t}": 1.0}, None) for t in types]

    # The folder's model is tiny: micro-batches that no GPU of 24 GiB holds stand in for a large one.
    given = ["train.micro_batch_tokens=100000000", "train.gradient_checkpointing=true", "resources.train_workers=1"]
    arms = load_config(RECIPE, [*given, "train.max_length=8192", "train.batch_size=20000", "arms={main: {}}"])
    check_training_memory(load_config(RECIPE), tiny_model, node("L4"))
    with pytest.raises(InputError, match=r"a GPU has 24 .*set train.micro_batch_tokens=8192"):
        check_training_memory(arms, tiny_model, node("H100", "L4"))
    with pytest.raises(InputError, match="a GPU has 80 "):
        check_training_memory(arms, tiny_model, node("unknown"))


# --- the host's memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gib", [16, 64, 100, 200])
@pytest.mark.parametrize("gpu_gib", [24, 48, 80])
@pytest.mark.parametrize("workers", [1, 2, 8])
def test_offload_that_the_host_cannot_hold_is_refused_with_a_change_that_fits_both(
    gib: int, gpu_gib: int, workers: int
) -> None:
    given = [
        f"resources.train_workers={workers}", f"resources.gpu_memory_gib={gpu_gib}",
        f"resources.host_memory_gib={gib}", "train.offload=true",
    ]  # fmt: skip
    arms = load_config(RECIPE, given)
    host = planned_host(next(iter(arms.values())).resources, on_gpus=True)
    said = refusal(arms, LLAMA_8B, host)
    if gpu_gib >= 48:
        assert (said is None) == (gib == 200)  # 119.7 GiB, however many ranks share them
    if said is not None:
        if "a GPU has" not in said:
            assert f"train.offload keeps 119.7 GiB of {workers} ranks in the memory of one machine, and" in said
            assert f"a node has {gib:.1f} (resources.host_memory_gib); set " in said
        fix = said.partition("; set ")[2].split()
        assert refusal(load_config(RECIPE, [*given, *fix]), LLAMA_8B, host) is None


def test_offload_is_no_fix_where_the_host_is_too_small() -> None:
    arms = load_config(RECIPE, ["resources.train_workers=1"])
    assert "set train.offload=true" in str(refusal(arms, LLAMA_8B))
    assert "set train.offload=true" in str(refusal(arms, LLAMA_8B, Host(200, 8, "a node")))
    assert "offload" not in str(refusal(arms, LLAMA_8B, Host(64, 8, "a node"))).partition("; set ")[2]


def test_a_plan_knows_the_host_where_the_run_would_be_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(host_module, "DEVICES", tmp_path)
    monkeypatch.setattr(host_module, "memory_gib", lambda: 12.0)
    assert planned_host(Resources(), on_gpus=True) is None  # planned here, run elsewhere
    assert planned_host(Resources(train_workers=3), on_gpus=False) == Host(12.0, 3, "this machine")
    for name in ("nvidia0", "nvidia1", "nvidiactl"):
        (tmp_path / name).touch()
    assert planned_host(Resources(), on_gpus=True) == Host(12.0, 2, "this machine")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert planned_host(Resources(), on_gpus=True) is None
    assert planned_host(Resources(host_memory_gib=7), on_gpus=True) == Host(7.0, 8, "a node")


def test_a_containers_limit_is_below_the_machines_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = host_module.memory_gib()
    monkeypatch.setattr(host_module, "LIMITS", (tmp_path / "none", tmp_path / "max", tmp_path / "limit"))
    (tmp_path / "max").write_text("max\n")
    assert host_module.memory_gib() >= whole
    (tmp_path / "limit").write_text(f"{2**29}\n")
    assert host_module.memory_gib() == 0.5


def test_preflight_takes_the_largest_node_that_can_hold_a_rank(tiny_model: Path) -> None:
    def node(gib: float, **resources: float) -> Node:
        return Node("n", "10.0.0.1", {"memory": gib * GIB * 0.7, "object_store_memory": gib * GIB * 0.3, **resources})

    nodes = [node(999, CPU=64), node(1e-5, GPU=4, CPU=8), node(2e-5, GPU=2, CPU=8)]
    found = largest_host(Resources(), nodes, gpus=1.0)
    assert found is not None
    assert (round(found.gib, 6), found.ranks) == (2e-5, 2)
    assert largest_host(Resources(), nodes, gpus=16.0) is None
    arms = load_config(RECIPE, ["train.offload=true", "arms={main: {}}"])
    with pytest.raises(InputError, match=r"train.offload keeps 0\.0 GiB .* a node has 0\.0 .*set train.offload=false"):
        check_training_memory(arms, tiny_model, nodes)
    check_training_memory(load_config(RECIPE), tiny_model, nodes)
    on_cpus = load_config(RECIPE, ["train.offload=true", "arms={main: {}}", "resources.gpus_per_worker=0"])
    with pytest.raises(InputError, match=r"set train\.offload=false"):
        check_training_memory(on_cpus, tiny_model, [node(1e-5, CPU=8)])


def test_spa_plan_refuses_offload_that_this_machine_cannot_hold(spa: Any) -> None:
    small = [
        "model.path=org/some-8B",
        "prompts.source=honeset",
        "evaluation.prompts=null",
        "prompts.decontaminate=null",
        "resources.train_workers=1",
    ]
    status, _, err = spa("plan", RECIPE, *small, "train.offload=true", "resources.host_memory_gib=64")
    assert status == 2
    assert "in the memory of one machine, and a node has 64.0 (resources.host_memory_gib)" in err


# --- memory that is used up -------------------------------------------------------------------------------------------


def test_memory_that_is_used_up_is_recorded_in_one_line_and_the_groups_next_start_trains_nothing(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray.train

    from spa_ray.training import launch, loop, metrics

    calls: list[str] = []

    def run_job(job: Any, progress: Any = None) -> Any:
        calls.append(job.name)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total of 79 GiB")

    class Context:
        def get_world_rank(self) -> int:
            return 0

    class Quiet:
        def __init__(self, *_: Any, **__: Any) -> None: ...
        def start(self, **_: Any) -> None: ...
        def row(self, _: Any) -> None: ...

    monkeypatch.setattr(ray.train, "get_context", Context)
    monkeypatch.setattr(launch, "WorkerLog", Quiet)
    monkeypatch.setattr(metrics, "TrainMetrics", Quiet)
    monkeypatch.setattr(loop, "run_job", run_job)
    job = make_job(tmp_path, tiny_model, tmp_path / "pairs.parquet", name="spa")
    record = tmp_path / "ray" / "out_of_memory.json"
    config = {"jobs": [job.to_dict()], "stored": False, "run": "r", "log_level": "INFO", "out_of_memory": str(record)}
    with pytest.raises(torch.OutOfMemoryError):  # ends the group: the other ranks wait in a collective
        launch._train_on_worker(config)
    again = launch._train_on_worker(config)
    assert calls == ["spa"]
    assert again["kind"] == "RunError"
    assert "set train.gradient_checkpointing=true or train.micro_batch_tokens=" in again["error"]
    assert "job spa" in again["error"]
    assert "\n" not in again["error"]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("NCCL error: Cuda failure 2 'out of memory'"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_every_form_of_used_up_memory_is_known(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


def test_logits_auto_are_few_on_processors_and_many_on_gpus() -> None:
    assert [logits_mib(Train(), gpu) for gpu in (False, True)] == [128, 512]
    assert [logits_mib(Train(logits_mib=3), gpu) for gpu in (False, True)] == [3, 3]
    assert logits_mib(Train(logits_mib=None), True) is None
