"""Seconds and peak memory of planning a training run: which pair goes to which step, rank and micro-batch.

`python benchmarks/planning.py [--pairs 1000000]` prints one JSON object. Order, weights and plan, from lengths and gaps
alone, packed and padded, each in a process of its own.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import harness
import numpy as np


def measure(args: argparse.Namespace, packed: bool) -> dict[str, Any]:
    """Plan one epoch `repeats` times."""
    from spa_ray.training.batches import PairTokens, make_plan, order_pairs, step_weights

    rng = np.random.default_rng(args.seed)
    prompt = harness.log_normal(rng, args.pairs, *harness.PROMPTS)
    answer = harness.answer_lengths(rng, args.pairs, correlation=0.5)
    tokens = PairTokens(longest=prompt + answer.max(axis=1), total=2 * prompt + answer.sum(axis=1))
    gap = rng.integers(0, 10, size=args.pairs).astype(np.float64)
    del prompt, answer
    before = harness.resident_mib()
    seconds = []
    for _ in range(args.repeats):
        start = time.perf_counter()
        order = order_pairs(args.pairs, seed=args.seed, batch_size=args.batch_size, epochs=1, max_steps=None)
        weights = step_weights(order, gap, alpha=1.0, w_max=None)
        plan = make_plan(
            order, weights, tokens, ranks=args.ranks, micro_batch_tokens=args.micro_batch_tokens, packed=packed
        )
        seconds.append(time.perf_counter() - start)
    return {
        "layout": "packed" if packed else "padded",
        "seconds": seconds,
        "median_seconds": statistics.median(seconds),
        "peak_resident_mib": harness.peak_resident_mib(),
        "resident_before_mib": before,
        "steps": plan.steps,
        "micro_batches_a_step": float(plan.micros.mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pairs", type=int, default=1_000_000)
    add("--ranks", type=int, default=8)
    add("--batch-size", type=int, default=128, help="pairs in an optimizer step")
    add("--micro-batch-tokens", type=int, default=8192)
    add("--seed", type=int, default=0)
    add("--repeats", type=int, default=3)
    args = parser.parse_args()
    where = harness.in_fresh_process(harness.environment)
    layouts = []
    for packed in (True, False):
        layouts.append(harness.in_fresh_process(measure, args, packed))
        harness.progress(f"{layouts[-1]['layout']}: {layouts[-1]['median_seconds']:.1f} s")
    harness.report(environment=where, settings=vars(args), layouts=layouts)


if __name__ == "__main__":
    from spa_ray.cli.guard import guarded

    guarded(main, name="planning")
