"""What vLLM is started with, what its refusals mean, and how one request is put to it. No engine runs here."""

from __future__ import annotations

import ast
import json
import os
import pprint
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spa_ray.config.models import Model
from spa_ray.engine.protocol import Request
from spa_ray.engine.vllm_requests import before_stop, sampling_params, special_tokens
from spa_ray.engine.vllm_start import check_engine, engine_arguments, reason, start_error
from spa_ray.errors import InputError
from spa_ray.pipeline.plan_model import context_of, text_settings
from tests.tiny_model import build_tiny_tokenizer

FOLDER = Path("models/m")


def test_no_kernel_is_compiled_with_nvcc_when_an_engine_starts() -> None:
    """Asked in a fresh process, of vLLM's own flags: what is set has to reach vLLM before it is imported."""
    code = (
        "from spa_ray.engine.vllm_start import prepare_environment; prepare_environment(); import json, vllm.envs as e;"
        "print(json.dumps([e.VLLM_USE_FLASHINFER_SAMPLER, e.VLLM_ALLREDUCE_USE_FLASHINFER, e.VLLM_USE_DEEP_GEMM,"
        " e.VLLM_ENABLE_V1_MULTIPROCESSING]))"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    out = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=True)
    assert json.loads(out.stdout.splitlines()[-1]) == [False, False, False, False]


def test_the_users_own_environment_is_not_overruled(monkeypatch: pytest.MonkeyPatch) -> None:
    from spa_ray.engine.vllm_start import own_environment, prepare_environment

    monkeypatch.setenv("VLLM_USE_FLASHINFER_SAMPLER", "1")
    monkeypatch.delenv("VLLM_USE_DEEP_GEMM", raising=False)
    before = dict(os.environ)
    with own_environment():
        prepare_environment()
        assert os.environ["VLLM_USE_FLASHINFER_SAMPLER"] == "1"
        assert os.environ["VLLM_USE_DEEP_GEMM"] == "0"
    assert dict(os.environ) == before


@pytest.mark.parametrize("gpus", [1, 2])
def test_on_gpus_flashinfer_neither_tunes_nor_joins_sums_and_norms(gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    arguments = engine_arguments(Model(path="m", tensor_parallel_size=gpus), FOLDER)
    assert arguments["enable_flashinfer_autotune"] is False
    fused = arguments.get("compilation_config")
    assert fused == (None if gpus == 1 else {"pass_config": {"fuse_allreduce_rms": False}})
    assert "enforce_eager" not in arguments  # CUDA graphs stay


def test_vllm_takes_our_arguments_for_several_gpus(tiny_model: Path) -> None:
    from vllm import EngineArgs

    fused = {"pass_config": {"fuse_allreduce_rms": False}}
    made = EngineArgs(model=str(tiny_model), compilation_config=fused)  # type: ignore[arg-type]
    assert made.compilation_config.pass_config.fuse_allreduce_rms is False


# --- what a failed start means ----------------------------------------------------------------------------------------

PASSING = [
    ValueError(
        "Free memory on device cuda:0 (3.2/79.1 GiB) on startup is less than desired GPU memory utilization (0.92, "
        "72.8 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes."
    ),
    RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    AssertionError("Error in memory profiling. Initial free memory 70, current free memory 75."),
    RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable"),
    RuntimeError("Engine core initialization failed. See root cause above."),
    OSError("[Errno 98] Address already in use"),
    ValueError("NCCL error: unhandled system error"),
]
PERMANENT = [
    ValueError("User-specified max_model_len (9999) is greater than the derived max_model_len"),
    ValueError("Model architectures ['No'] are not supported for now."),
    ValueError("No available memory for the cache blocks. Try increasing `gpu_memory_utilization`."),
    TypeError("EngineArgs.__init__() got an unexpected keyword argument 'nope'"),
    KeyError("no such architecture"),
    ImportError("Please install bitsandbytes>=0.46.1"),
    NotImplementedError("this quantization is not supported"),
]


@pytest.mark.parametrize("error", PASSING, ids=str)
def test_a_state_that_passes_is_tried_again(error: Exception) -> None:
    assert type(start_error(error, FOLDER)) is RuntimeError


@pytest.mark.parametrize("error", PERMANENT, ids=str)
def test_what_no_later_try_can_mend_is_a_mistake_of_the_input(error: Exception) -> None:
    made = start_error(error, FOLDER)
    assert isinstance(made, InputError)
    assert "\n" not in str(made)
    assert "vLLM refuses it" in str(made)


def test_a_reason_is_the_first_thing_that_a_library_says_on_one_line() -> None:
    long = ValueError("The checkpoint has\n model type `x`.\n\nYou can update Transformers with `pip install`")
    assert reason(long) == "The checkpoint has model type `x`."
    assert reason(ValueError("")) == "ValueError"
    assert reason(KeyError("qwen9")) == "no entry 'qwen9'"
    assert len(reason(ValueError("x" * 5000))) <= 600


# --- before anything starts -------------------------------------------------------------------------------------------


def changed(tiny_model: Path, folder: Path, **config: Any) -> Path:
    """A copy of the tiny model (its headers suffice) with other settings."""
    shutil.copytree(tiny_model, folder)
    settings = json.loads((folder / "config.json").read_text())
    settings.pop("rope_parameters", None)
    (folder / "config.json").write_text(json.dumps(settings | config))
    return folder


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"max_model_len": 5000}, {}, "max_model_len (5000) is greater than the derived max_model_len"),
    ({}, {"architectures": ["NoSuchForCausalLM"]}, "NoSuchForCausalLM"),
    ({}, {"model_type": "nosuch", "architectures": ["NoSuchForCausalLM"]}, "nosuch"),
    ({"engine_kwargs": {"gpu_memory_utilisation": 0.5}}, {}, "did you mean gpu_memory_utilization?"),
    ({"engine_kwargs": {"no_such_thing_at_all": 1}}, {}, "has no such argument"),
    ({"engine_kwargs": {"gpu_memory_utilization": 7}}, {}, "gpu_memory_utilization"),
    ({"engine_kwargs": {"max_num_seqs": "many"}}, {}, "max_num_seqs"),
    ({"engine_kwargs": {"kv_cache_dtype": "fp3"}}, {}, "got 'fp3'"),
    ({"engine_kwargs": {"quantization": "nosuch"}}, {}, "nosuch"),
    ({"engine_kwargs": {"block_size": -3}}, {}, "block_size"),
    ({"engine_kwargs": {"max_num_batched_tokens": 8}}, {}, "max_num_batched_tokens"),
]


@pytest.mark.parametrize(("model", "config", "said"), REFUSED, ids=[r[2] for r in REFUSED])
def test_what_vllm_would_refuse_is_refused_before_it_starts_with_its_reason(
    model: dict[str, Any], config: dict[str, Any], said: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = changed(tiny_model, tmp_path / "m", **config)
    before = dict(os.environ)
    with pytest.raises(InputError) as caught:
        check_engine(Model(path=str(folder), **model), folder)
    assert said in str(caught.value)
    assert "errors.pydantic.dev" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("config", "context"),
    [
        ({}, 1024),
        ({"max_position_embeddings": 512}, 512),
        ({"max_position_embeddings": 512, "rope_scaling": {"type": "linear", "factor": 2.0}}, 1024),
        ({"max_position_embeddings": 512, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, 2048),
        ({"max_position_embeddings": 512, "model_max_length": 2048}, 2048),
        (
            {
                "max_position_embeddings": 512,
                "original_max_position_embeddings": 128,
                "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16},
            },
            128,
        ),
        (
            {
                "max_position_embeddings": 512,
                "rope_scaling": {
                    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128,
                },
            },
            512,
        ),
        (
            {
                "max_position_embeddings": 512,
                "rope_scaling": {
                    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
            },
            512,
        ),
    ],
    ids=str,
)  # fmt: skip
def test_a_plans_context_is_vllms(config: dict[str, Any], context: int, tiny_model: Path, tmp_path: Path) -> None:
    folder = changed(tiny_model, tmp_path / "m", **config)
    assert check_engine(Model(path=str(folder), dtype="float32"), folder) == context
    assert context_of(text_settings(folder)) == context


# --- requests ---------------------------------------------------------------------------------------------------------


def test_every_sampling_setting_reaches_vllm() -> None:
    asked = Request(
        [1, 2], 9, 0.7, 3, top_p=0.9, min_p=0.05, top_k=40, repetition_penalty=1.1, stop=("User:", "<|unused|>")
    )
    params = sampling_params(asked, special_tokens(build_tiny_tokenizer(), asked.stop))
    assert (params.temperature, params.top_p, params.min_p, params.top_k) == (0.7, 0.9, 0.05, 40)
    assert (params.repetition_penalty, params.max_tokens, params.seed) == (1.1, 9, 3)
    assert params.stop == ["User:", "<|unused|>"]
    assert params.stop_token_ids == [build_tiny_tokenizer().convert_tokens_to_ids("<|unused|>")]
    plain = sampling_params(Request([1], 9, 1.0, 3))
    assert (plain.min_p, plain.top_k, plain.repetition_penalty, plain.stop) == (0.0, 0, 1.0, [])
    assert not plain.detokenize  # decoding every token would cost for nothing


@pytest.mark.parametrize(
    ("answer", "stop", "kept"),
    [
        ("Paris.\n\nUser: and", "User:", "Paris.\n\n"),
        ("User: I", "User:", ""),
        ("É\n\nÉ", "\n\n", "É"),
        ("score 10, 10", "0, 1", "score "),  # "10" is one token: it goes with the stop string that begins inside it
    ],
)
def test_an_answer_ends_before_its_stop_string_in_whole_tokens(answer: str, stop: str, kept: str) -> None:
    tokenizer = build_tiny_tokenizer()
    ids = tokenizer.encode(answer, add_special_tokens=False)
    left = before_stop(tokenizer, ids, stop)
    assert left == ids[: len(left)]
    assert tokenizer.decode(left) == kept


def test_a_stop_string_that_the_tokens_do_not_hold_is_an_error() -> None:
    tokenizer = build_tiny_tokenizer()
    with pytest.raises(RuntimeError, match="do not hold"):
        before_stop(tokenizer, tokenizer.encode("Paris"), "Rome")


def test_half_of_the_compile_cache_costs_one_start() -> None:
    """vLLM writes its index of compiled graphs in place (`compilation/backends.py`), and reads it by `literal_eval`:
    what an engine that starts in this millisecond meets is an error that passes, whichever part it sees."""
    entry = {"graph_handle": ("artifact_compile_range_1_8192_subgraph_0", "/cache/rank_0_0"), "cache_key": "f3a"}
    written = pprint.pformat({((1, 8192), i, "inductor_standalone"): entry for i in range(3)}, indent=4)
    assert ast.literal_eval(written)
    for size in range(len(written)):
        with pytest.raises(SyntaxError) as caught:
            ast.literal_eval(written[:size])
        assert not isinstance(start_error(caught.value, Path("m")), InputError)
