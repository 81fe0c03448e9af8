"""Seconds and peak memory of planning a training run: which pair goes to which step, rank and micro-batch.

`python benchmarks/planning.py [--pairs 1000000]` prints one JSON object. Order, weights and every step's deal, from
lengths and gaps alone, in both orders, packed and padded, each in a process of its own.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from itertools import product
from typing import Any

import harness
import numpy as np


def measure(args: argparse.Namespace, by_prompt: bool, packed: bool) -> dict[str, Any]:
    """Plan one epoch `repeats` times: prompts of 5 answers, all 10 pairs of each."""
    from spa_ray.training.batches import order_pairs, step_weights
    from spa_ray.training.deal import Plan, Sequences
    from spa_ray.training.losses import pair_weights

    rng = np.random.default_rng(args.seed)
    prompts = args.pairs // 10
    head = np.repeat(harness.log_normal(rng, prompts, *harness.PROMPTS), 5)
    responses = harness.log_normal(rng, 5 * prompts, *harness.ANSWERS)
    of_prompt = np.stack(np.triu_indices(5, k=1), axis=1)
    of_pair = (5 * np.arange(prompts)[:, None, None] + of_prompt).reshape(-1, 2)
    sequences = Sequences(head + responses, responses, head, np.repeat(np.arange(prompts), 5), of_pair)
    gap = rng.integers(0, 10, size=len(of_pair)).astype(np.float64)
    before = harness.resident_mib()
    seconds = []
    for _ in range(args.repeats):
        start = time.perf_counter()
        order = order_pairs(
            len(of_pair),
            seed=args.seed,
            batch_size=args.batch_size,
            epochs=1,
            max_steps=None,
            prompts=sequences.prompt_of_pair if by_prompt else None,
        )
        weights = step_weights(order, gap, partial(pair_weights, alpha=1.0))
        plan = Plan(order, weights, sequences, args.ranks, args.micro_batch_tokens, packed)
        for number in range(plan.steps):
            plan.step(number)
        seconds.append(time.perf_counter() - start)
    return {
        "order": "prompts" if by_prompt else "pairs",
        "layout": "packed" if packed else "padded",
        "seconds": seconds,
        "median_seconds": statistics.median(seconds),
        "peak_resident_mib": harness.peak_resident_mib(),
        "resident_before_mib": before,
        "steps": plan.steps,
        **spread(plan),
    }


def spread(plan: Any) -> dict[str, float]:
    """How evenly the steps are dealt, by the tokens that are laid out, and how many times as many their pairs have."""
    sequences, packed = plan.sequences, plan.packed

    def laid_out(which: np.ndarray) -> int:
        tokens = sequences.tokens[which]
        return sequences.tokens_together(which) if packed else len(tokens) * int(tokens.max(initial=0))

    micro_batches = tokens = busiest = 0
    for step in map(plan.step, range(plan.steps)):
        ranks = [[*shared, *whole] for shared, whole in zip(step.shared, step.whole, strict=True)]
        load = [sum(laid_out(step.sequences[part.sequences]) for part in parts) for parts in ranks]
        micro_batches += len(ranks[0])
        tokens, busiest = tokens + sum(load), busiest + max(load)
    return {
        "micro_batches_a_step": micro_batches / plan.steps,
        "busiest_rank_over_mean": busiest * plan.ranks / tokens,
        "tokens_of_pairs_over_tokens": int(sequences.tokens[sequences.of_pair].sum()) / tokens,
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
    for by_prompt, packed in product((True, False), repeat=2):
        layouts.append(harness.in_fresh_process(measure, args, by_prompt, packed))
        harness.progress(f"{layouts[-1]['order']}, {layouts[-1]['layout']}: {layouts[-1]['median_seconds']:.1f} s")
    harness.report(environment=where, settings=vars(args), layouts=layouts)


if __name__ == "__main__":
    from spa_ray.cli.guard import guarded

    guarded(main, name="planning")
