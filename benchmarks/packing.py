"""Tokens that count per second, packed against padded, over the spread of answer and prompt lengths.

`python benchmarks/packing.py [--sigma 0,0.3,0.7,1.0]` prints one JSON object. The real training forward and backward
(`ResponseLogps`, SimPO), three layouts in turn: packed; padded in our micro-batches of like lengths; padded in random
micro-batches of a fixed number of pairs, as public trainers build them. σ is that of the log-length; 0: equal lengths.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from typing import Any

import harness
import numpy as np

BETA, GAMMA = 2.5, 1.375
# σ is given, the medians and bounds are those of preference data.
PROMPT_MEDIAN, _, *PROMPT_BOUNDS = harness.PROMPTS
ANSWER_MEDIAN, _, *ANSWER_BOUNDS = harness.ANSWERS


@dataclass(frozen=True)
class Work:
    """The pairs of one spread: ids, and the micro-batches of each layout as arrays of pairs."""

    prompts: list[tuple[np.ndarray, np.ndarray]]
    answers: list[tuple[np.ndarray, np.ndarray]]
    micro_batches: dict[str, list[np.ndarray]]

    def rows(self, pairs: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """The chosen sequences of these pairs, then the rejected ones."""
        return [(self.prompts[i][side], self.answers[i][side]) for side in (0, 1) for i in pairs]


def make_work(args: argparse.Namespace, sigma: float) -> Work:
    """Random pairs, and the three ways to cut them up. All layouts run every pair once."""
    from spa_ray.training.balance import deal

    rng = np.random.default_rng(args.seed)
    prompt = harness.log_normal(rng, args.pairs, PROMPT_MEDIAN, sigma, *PROMPT_BOUNDS)
    answer = harness.log_normal(rng, (args.pairs, 2), ANSWER_MEDIAN, sigma, *ANSWER_BOUNDS)
    # Sequences 2i and 2i + 1 are pair i's, and no other's.
    tokens = (prompt[:, None] + answer).ravel().tolist()
    pair_of = (np.arange(2 * args.pairs) // 2).tolist()
    micro_batches = {}
    for layout, packed in (("packed", True), ("padded_sorted", False)):
        (dealt,) = deal(tokens, pair_of, None, ranks=1, budget=args.micro_batch_tokens, packed=packed)
        micro_batches[layout] = [np.unique(np.array(places) // 2) for places in dealt]
    at = range(args.random_pairs, args.pairs, args.random_pairs)
    micro_batches["padded_random"] = np.split(rng.permutation(args.pairs), at)

    def ids(size: int) -> np.ndarray:
        return rng.integers(0, args.vocab, size=size)

    return Work(
        prompts=[(ids(n), ids(n)) for n in prompt],  # two: what sharing a prompt is worth is another question
        answers=[(ids(chosen), ids(rejected)) for chosen, rejected in answer],
        micro_batches=micro_batches,
    )


def make_policy(args: argparse.Namespace, dtype: str, *, packed: bool) -> Any:
    """The module that the step loop trains, set up as `make_engine` does it, without DeepSpeed around it."""
    import torch

    from spa_ray.training.attention import use_packed_attention
    from spa_ray.training.forward import ResponseLogps
    from spa_ray.training.linear import use_fast_linear

    model = harness.llama(hidden=args.hidden, layers=args.layers, vocab=args.vocab, seed=args.seed)
    model.to("cuda" if torch.cuda.is_available() else "cpu", getattr(torch, dtype))
    use_fast_linear(model)
    if packed:
        use_packed_attention(model)
    return ResponseLogps(model, packed=packed, logits_budget=args.logits_mib * 2**20 // 4).train()


def one_pass(policy: Any, work: Work, micro_batches: list[np.ndarray]) -> dict[str, float]:
    """Forward and backward over all micro-batches; seconds, tokens that count, tokens that were computed, the loss."""
    from spa_ray.training.losses import simpo_loss

    real = laid_out = 0
    loss = 0.0
    harness.finish_queued_work()
    start = time.perf_counter()
    for pairs in micro_batches:
        batch = policy.collate(work.rows(pairs), policy.model.device)
        summed, counts = policy(batch)
        chosen, rejected = (summed / counts).chunk(2)
        losses = simpo_loss(chosen, rejected, beta=BETA, gamma=GAMMA).sum() / len(work.prompts)
        losses.backward()
        loss += losses.item()
        real += batch.real_tokens
        laid_out += batch.input_ids.numel()
    harness.finish_queued_work()
    seconds = time.perf_counter() - start
    policy.zero_grad()
    return {"seconds": seconds, "real": real, "laid_out": laid_out, "loss": loss}


def measure(args: argparse.Namespace, dtype: str, sigma: float) -> dict[str, Any]:
    """One spread: every layout in turn, `repeats` times, after one pass that is not timed."""
    harness.use_all_cores()
    work = make_work(args, sigma)
    policies = {packed: make_policy(args, dtype, packed=packed) for packed in (True, False)}
    passes: dict[str, list[dict[str, float]]] = {layout: [] for layout in work.micro_batches}
    for _ in range(args.repeats + 1):
        for layout, micro_batches in work.micro_batches.items():
            passes[layout].append(one_pass(policies[layout == "packed"], work, micro_batches))
    rates = {layout: [p["real"] / p["seconds"] for p in timed[1:]] for layout, timed in passes.items()}
    medians = {layout: statistics.median(values) for layout, values in rates.items()}
    return {
        "sigma": sigma,
        "tokens_per_s": rates,
        "median_tokens_per_s": medians,
        "share_of_tokens_that_count": {layout: p[0]["real"] / p[0]["laid_out"] for layout, p in passes.items()},
        "micro_batches": {layout: len(m) for layout, m in work.micro_batches.items()},
        "loss": {layout: p[0]["loss"] for layout, p in passes.items()},
        "packed_over_sorted": medians["packed"] / medians["padded_sorted"],
        "packed_over_random": medians["packed"] / medians["padded_random"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--sigma", type=lambda x: [float(i) for i in x.split(",")], default=[0.0, 0.3, 0.7, 1.0])
    add("--pairs", type=int, default=48, help="pairs of a pass")
    add("--micro-batch-tokens", type=int, default=2048, help="of the packed and the sorted layout")
    add("--random-pairs", type=int, default=8, help="pairs in a random micro-batch; 8 is TRL's default")
    add("--hidden", type=int, default=256)
    add("--layers", type=int, default=8)
    add("--vocab", type=int, default=4096)
    add("--logits-mib", type=int, default=128, help="as train.logits_mib")
    add("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU, else float32")
    add("--seed", type=int, default=0)
    add("--repeats", type=int, default=3)
    args = parser.parse_args()
    where = harness.in_fresh_process(harness.environment)
    dtype = args.dtype or ("bfloat16" if where["cuda"] else "float32")
    spreads = []
    for sigma in args.sigma:
        spreads.append(harness.in_fresh_process(measure, args, dtype, sigma))
        harness.progress(f"σ {sigma}: packed over random {spreads[-1]['packed_over_random']:.2f}")
    harness.report(environment=where, settings=vars(args), spreads=spreads)


if __name__ == "__main__":
    from spa_ray.cli.guard import guarded

    guarded(main, name="packing")
