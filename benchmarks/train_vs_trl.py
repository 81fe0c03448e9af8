"""Training speed, peak memory and loss curve of `spa_ray.training` against TRL's CPOTrainer, on the same SimPO work.

`python benchmarks/train_vs_trl.py [--model DIR] [--repeats 3]` prints one JSON object. Runs alternate, each in a
process of its own. Neither side uses Ray. Both get the same pairs in the same steps; each gets its fastest micro-batch.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import harness
import numpy as np
from matmul import matmul_rates
from training_work import Run, Setup, make_inputs, ordered_rows


class EnoughError(Exception):
    """Ends a run of ours after the steps that were asked for; its plan and its schedule are the whole run's."""


def run_ours(setup: Setup, micro_batch_tokens: int, steps: int) -> Run:
    """`spa_ray.training.loop` in this process, without Ray, for the first `steps` steps."""
    from spa_ray.training import comm
    from spa_ray.training.loop import run_job
    from spa_ray.training.policy import quiet_deepspeed

    quiet_deepspeed()  # so that what it takes in memory counts as an import, as TRL's imports do
    folder = Path(tempfile.mkdtemp(dir=setup.folder))
    job = setup.job(folder, micro_batch_tokens)
    run = Run(harness.resident_mib())

    def step_ended(row: dict[str, Any]) -> None:
        run.step_ended()
        run.losses.append(row["loss"])
        if len(run.losses) == steps:
            raise EnoughError

    with comm.process_group(), suppress(EnoughError):
        run_job(job, step_ended)
    shutil.rmtree(folder)
    return run


def run_trl(setup: Setup, micro_batch: int, steps: int) -> Run:
    """CPOTrainer, set to SimPO, on the first `steps` steps; `micro_batch` in pairs."""
    from datasets import Dataset
    from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
    from trl.experimental.cpo import CPOTrainer

    harness.use_all_cores()
    run = Run(harness.resident_mib())

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            run.step_ended()

        def on_log(self, *args: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if "loss" in logs:
                run.losses.append(logs["loss"])

    texts, expected = ordered_rows(setup)
    model, optimizers = trl_model(setup)
    with tempfile.TemporaryDirectory(dir=setup.folder) as out:
        trainer = CPOTrainer(
            model=model,
            args=trl_arguments(setup, out, micro_batch, steps),
            train_dataset=Dataset.from_list(texts),
            processing_class=AutoTokenizer.from_pretrained(setup.model),
            callbacks=[Clock()],
            optimizers=optimizers,
        )
        trainer.remove_callback(PrinterCallback)
        for row, ids in zip(trainer.train_dataset, expected, strict=True):
            assert all(row[f"{side}_input_ids"] == ids[side] for side in ids), "TRL tokenised other ids than ours"
        trainer.train()
    return run


def trl_model(setup: Setup) -> tuple[Any, tuple[Any, Any]]:
    """The model, and our optimizer and schedule, so that both sides take the same steps."""
    import torch
    from transformers import AutoModelForCausalLM

    from spa_ray.training.linear import use_fast_linear
    from spa_ray.training.schedule import lr_multiplier

    train, steps = setup.train(), setup.steps
    model = AutoModelForCausalLM.from_pretrained(
        setup.model, dtype=getattr(torch, setup.trl_weights), attn_implementation=setup.trl_attention
    )
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    if "linear" in setup.lend:
        use_fast_linear(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=setup.lr, weight_decay=train.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_multiplier(min(step, steps - 1), steps, kind=train.scheduler, warmup=train.warmup)
    )
    return model, (optimizer, schedule)


def trl_arguments(setup: Setup, out: str, micro_batch: int, steps: int) -> Any:
    import torch
    from trl.experimental.cpo import CPOConfig

    autocast = setup.dtype == "bfloat16" and setup.trl_weights == "float32"
    return CPOConfig(
        output_dir=out,
        loss_type="simpo",
        cpo_alpha=0.0,
        beta=setup.beta,
        simpo_gamma=setup.gamma,  # divided by β and multiplied by it again: Eq. 3's γ itself, as ours
        max_length=harness.MAX_LENGTH,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=setup.batch_size // micro_batch,
        max_steps=steps,
        max_grad_norm=setup.train().grad_clip,
        train_sampling_strategy="sequential",
        gradient_checkpointing=False,  # on by default there; ours has it off
        bf16=autocast,
        use_liger_kernel=setup.trl_liger,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        seed=setup.seed,
    )


def attempt(run: Callable[[Setup, int, int], Run], setup: Setup, micro_batch: int, steps: int) -> Run | None:
    """None where the GPU has not enough memory for this micro-batch."""
    import torch

    try:
        return run(setup, micro_batch, steps)
    except torch.OutOfMemoryError:
        return None


def best_micro_batch(
    run: Callable[[Setup, int, int], Run], setup: Setup, sizes: list[int], args: argparse.Namespace
) -> tuple[int, dict[int, dict[str, float] | None]]:
    """A side's fastest micro-batch, and speed and memory of each, a curve; None is one that did not fit. One alone is
    not measured."""
    if len(sizes) == 1:
        return sizes[0], {}
    steps = min(setup.steps, args.sweep_steps)
    curve: dict[int, dict[str, float] | None] = {}
    for size in sizes:
        done = harness.in_fresh_process(attempt, run, setup, size, steps)
        curve[size] = done and {
            "pairs_per_s": done.pairs_per_s(setup.batch_size, min(args.warmup, steps - 1)),
            "peak_memory_mib": done.peak_memory_mib,
        }
        harness.progress(f"{run.__name__}, micro-batch {size}: {curve[size]}")
    return max(sizes, key=lambda size: (curve[size] or {"pairs_per_s": 0.0})["pairs_per_s"]), curve


def side(runs: list[Run], setup: Setup, warmup: int) -> dict[str, Any]:
    rates = [run.pairs_per_s(setup.batch_size, warmup) for run in runs]
    return {
        "pairs_per_s": rates,
        "median_pairs_per_s": statistics.median(rates),
        "peak_memory_mib": [run.peak_memory_mib for run in runs],
        "median_peak_memory_mib": statistics.median(run.peak_memory_mib for run in runs),
        "resident_before_mib": [run.memory_before_mib for run in runs],
        "step_seconds": [np.diff(run.ends).round(4).tolist() for run in runs],
        "loss": runs[0].losses,
    }


def compare(setup: Setup, args: argparse.Namespace) -> dict[str, Any]:
    """Both sides in turn, each with its fastest micro-batch, and what the figures come to."""
    tokens, our_sweep = best_micro_batch(run_ours, setup, args.micro_batch_tokens, args)
    pairs, trl_sweep = best_micro_batch(run_trl, setup, args.trl_micro_batch, args)
    ours: list[Run] = []
    trl: list[Run] = []
    limits: list[dict[str, Any]] = []
    for k in range(args.repeats):
        ours.append(harness.in_fresh_process(run_ours, setup, tokens, setup.steps))
        trl.append(harness.in_fresh_process(run_trl, setup, pairs, setup.steps))
        limits.append(harness.in_fresh_process(matmul_rates, str(setup.model), setup.dtype))
        rates = [round(x[-1].pairs_per_s(setup.batch_size, args.warmup), 2) for x in (ours, trl)]
        harness.progress(f"run {k + 1} of {args.repeats}: ours {rates[0]} pairs/s, TRL {rates[1]}")
    a, b = (side(runs, setup, args.warmup) for runs in (ours, trl))
    return {
        "matmul": median_rates(limits),
        "ours": {"micro_batch_tokens": tokens, "sweep": our_sweep, **a},
        "trl": {"micro_batch_pairs": pairs, "sweep": trl_sweep, **b},
        "speed_ratio": a["median_pairs_per_s"] / b["median_pairs_per_s"],
        "speed_ratio_by_run": (np.array(a["pairs_per_s"]) / b["pairs_per_s"]).tolist(),
        "memory_ratio": a["median_peak_memory_mib"] / b["median_peak_memory_mib"],
        "largest_loss_difference": float(max(np.abs(np.subtract(x.losses, y.losses)).max() for x in ours for y in trl)),
    }


def median_rates(limits: list[dict[str, Any]]) -> dict[str, Any]:
    """The machine's limit over all repeats, and the library that training took in each."""
    rates = {name: statistics.median(limit["gflops"][name] for limit in limits) for name in limits[0]["gflops"]}
    return {"gflops": rates, "best_gflops": max(rates.values()), "taken": [limit["taken"] for limit in limits]}


def share(figures: dict[str, Any], work: dict[str, Any], name: str, limit: dict[str, Any], warmup: int) -> float:
    """A side's FLOP/s over the machine's, by the least FLOPs of its own work (TRL's: every pair's two sequences)."""
    seconds = statistics.median(s for steps in figures["step_seconds"] for s in steps[warmup - 1 :])
    return work["gflops_a_step"][name] / seconds / limit["best_gflops"]


def numbers(text: str) -> list[int]:
    return [int(x) for x in text.split(",")]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--work", choices=["independent", "spa"], default="independent", help="spa: a prompt's pairs share its answers")
    add("--order", choices=["pairs", "prompts"], help="ours: train.order; default: prompts with --work spa, else pairs")
    add("--pairs-per-prompt", type=int, default=13, help="of the 15 pairs of 6 answers (--work spa, without --pairs)")
    add("--pairs", type=Path, help="a pairs folder that `spa build` wrote (--work spa), with --model")
    add("--model", type=Path, help="a local model folder; without it, a random Llama of the next three sizes")
    add("--hidden", type=int, default=256)
    add("--layers", type=int, default=8)
    add("--vocab", type=int, default=8192, help="with the default sizes the head is as large a share as in a 1B Llama")
    add("--steps", type=int, default=6, help="optimizer steps of a run")
    add("--warmup", type=int, default=2, help="first steps that are not timed, 1 or more")
    add("--batch-size", type=int, default=16, help="pairs in an optimizer step")
    add("--lr", type=float, default=2e-4)
    add("--beta", type=float, default=2.5)
    add("--gamma", type=float, default=1.375)
    add("--correlation", type=float, default=0.5, help="of the log-lengths of a pair's two answers, 0 to 1")
    add("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU, else float32")
    add("--micro-batch-tokens", type=numbers, default=[1600, 3200, 6400], help="ours; the fastest of these")
    add("--trl-micro-batch", type=numbers, default=[1, 2, 4, 8], help="pairs, TRL; the fastest of these")
    add("--sweep-steps", type=int, default=2, help="steps by which the fastest is found, the first not timed")
    add("--zero-stage", type=int, default=2, help="ours; 2 is the config's default")
    add("--trl-weights", choices=["float32", "bfloat16"], default="float32", help="bfloat16: no float32 master copy")
    add("--trl-attention", default="sdpa", help="transformers' attn_implementation")
    add("--trl-liger", action="store_true", help="Liger kernels for TRL's model (GPU)")
    add("--lend", nargs="*", choices=["linear", "sorting"], default=[], help="give TRL this part of ours as well")
    add("--seed", type=int, default=0)
    add("--repeats", type=int, default=3)
    args = parser.parse_args()
    if not 1 <= args.warmup < args.steps:
        parser.error("--warmup must be 1 or more and below --steps")
    if args.work == "spa" and not 1 <= args.pairs_per_prompt <= 15:
        parser.error("--pairs-per-prompt must be 1 to 15")
    if args.pairs is not None and (args.work != "spa" or args.model is None):
        parser.error("--pairs goes with --work spa and --model")
    if args.sweep_steps < 2:
        parser.error("--sweep-steps must be 2 or more: the first step is not timed")
    if any(args.batch_size % size for size in args.trl_micro_batch):
        parser.error("every --trl-micro-batch must divide --batch-size")
    return args


def main() -> None:
    args = arguments()
    where = harness.in_fresh_process(harness.environment)
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup(
            folder=Path(folder),
            seed=args.seed,
            steps=args.steps,
            batch_size=args.batch_size,
            lr=args.lr,
            beta=args.beta,
            gamma=args.gamma,
            dtype=args.dtype or ("bfloat16" if where["cuda"] else "float32"),
            correlation=args.correlation,
            zero_stage=args.zero_stage,
            trl_weights=args.trl_weights,
            trl_attention=args.trl_attention,
            trl_liger=args.trl_liger,
            lend=tuple(args.lend),
            ordered_by=args.order or ("prompts" if args.work == "spa" else "pairs"),
            pairs_per_prompt=args.pairs_per_prompt if args.work == "spa" else None,
        )
        sizes = args.hidden, args.layers, args.vocab
        work = harness.in_fresh_process(make_inputs, setup, args.model, args.pairs, *sizes)
        harness.progress(f"{work['parameters'] / 1e6:.1f} M parameters, {work['pairs']} pairs")
        figures = compare(setup, args)
        limit = figures["matmul"]
        limit["share"] = {side: share(figures[side], work, side, limit, args.warmup) for side in ("ours", "trl")}
        harness.report(environment=where, settings=vars(args), work=work, **figures)


if __name__ == "__main__":
    from spa_ray.cli.guard import guarded

    guarded(main, name="train_vs_trl")
