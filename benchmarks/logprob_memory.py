"""Peak memory and time of the loss alone, hidden states → response log-probs → backward, by vocabulary and tokens.

`python benchmarks/logprob_memory.py [--vocab 32768,65536,131072] [--tokens 1024,4096,16384]` prints one JSON object.
Three ways: our head in chunks, all logits of the response tokens at once, and TRL's (all logits of all tokens). Each
case runs in a process of its own. A case whose logits cannot fit `--memory-gib` is left out, and the JSON says so.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import harness
import numpy as np

PATHS = ("chunked", "full", "trl")
# Of the logits, at the worst moment without chunks: what log-softmax keeps, two gradients, and a little.
COPIES = 3.2
BETA, GAMMA = 2.5, 1.375


@dataclass(frozen=True)
class Case:
    """`tokens` over sequences of at most `length`, of which `response_share` are scored."""

    path: str
    vocab: int
    tokens: int
    hidden: int
    length: int
    response_share: float
    logits_mib: int
    dtype: str
    seed: int
    repeats: int

    @property
    def logits_gib(self) -> float:
        """All logits of this path in float32, were they held at once."""
        return self.tokens * (1.0 if self.path == "trl" else self.response_share) * self.vocab * 4 / 2**30


def rows_of(case: Case) -> list[tuple[np.ndarray, np.ndarray]]:
    """Sequences of one length, so that no path pays for padding; an even number, the first half chosen."""
    rng = np.random.default_rng(case.seed)
    length = min(case.length, case.tokens // 2)
    prompt = length - round(case.response_share * length)
    ids = rng.integers(0, case.vocab, size=(case.tokens // length // 2 * 2, length))
    return [(row[:prompt], row[prompt:]) for row in ids]


class Tensors:
    """A case's inputs on the device."""

    def __init__(self, case: Case) -> None:
        import torch

        from spa_ray.training.forward import collate_padded

        device = "cuda" if torch.cuda.is_available() else "cpu"
        like: dict[str, Any] = {"device": device, "dtype": getattr(torch, case.dtype)}
        torch.manual_seed(case.seed)
        self.batch = collate_padded(rows_of(case), device)
        self.hidden = torch.randn(*self.batch.input_ids.shape, case.hidden, **like).requires_grad_()
        self.weight = torch.randn(case.vocab, case.hidden, **like).mul_(case.hidden**-0.5).requires_grad_()
        self.labels = torch.full_like(self.batch.input_ids, -100)
        self.labels.view(-1)[self.batch.predict + 1] = self.batch.targets


def average_logps(case: Case, x: Tensors) -> Any:
    """The mean log-prob of every sequence's response, by the case's path."""
    import torch
    from torch.nn import functional as F

    from spa_ray.training.head import head_logps
    from spa_ray.training.linear import linear
    from spa_ray.training.losses import token_logps

    if case.path == "trl":
        from trl.experimental.cpo import CPOTrainer

        # Under bf16 TRL's trainer turns the model's outputs into float32 (accelerate's autocast does).
        return CPOTrainer.get_batch_logps(F.linear(x.hidden, x.weight).float(), x.labels, average_log_prob=True)
    picked = x.hidden.flatten(0, 1)[x.batch.predict]
    if case.path == "chunked":
        logps = head_logps(picked, x.weight, None, x.batch.targets, logits_budget=case.logits_mib * harness.MIB // 4)
    else:
        logps = token_logps(linear(picked, x.weight, None), x.batch.targets)
    summed = logps.new_zeros(x.batch.sequences).index_add(0, x.batch.owner, logps)
    return summed / torch.bincount(x.batch.owner)


def one_pass(case: Case, x: Tensors) -> tuple[float, float]:
    """Forward and backward; seconds and the loss."""
    from spa_ray.training.losses import simpo_loss

    start = time.perf_counter()
    loss = simpo_loss(*average_logps(case, x).chunk(2), beta=BETA, gamma=GAMMA).mean()
    loss.backward()
    harness.finish_queued_work()
    seconds = time.perf_counter() - start
    x.hidden.grad = x.weight.grad = None
    return seconds, loss.item()


def measure(case: Case) -> dict[str, float]:
    """The growth of memory over what stood before, and the median seconds of a pass."""
    import torch

    harness.use_all_cores()
    small = replace(case, vocab=64, tokens=16)
    one_pass(small, Tensors(small))  # loads the libraries that the path needs
    x = Tensors(case)
    harness.finish_queued_work()
    before = torch.cuda.memory_allocated() / harness.MIB if torch.cuda.is_available() else harness.resident_mib()
    seconds, losses = zip(*(one_pass(case, x) for _ in range(case.repeats)), strict=True)
    return {
        "growth_mib": harness.peak_memory_mib() - before,
        # The gradients of the hidden states and the head's weight: no path can do without them.
        "gradients_mib": (x.hidden.numel() + x.weight.numel()) * x.hidden.element_size() / harness.MIB,
        "seconds": statistics.median(seconds),
        "loss": losses[0],
    }


def run(case: Case, memory_gib: float) -> dict[str, Any]:
    row: dict[str, Any] = {"path": case.path, "vocab": case.vocab, "tokens": case.tokens}
    needed = COPIES * case.logits_gib
    if case.path != "chunked" and needed > memory_gib:
        return {**row, "skipped": f"may need {needed:.0f} GiB"}
    row |= harness.in_fresh_process(measure, case)
    harness.progress(f"{case.path}, vocabulary {case.vocab}, {case.tokens} tokens: {row['growth_mib']:.0f} MiB")
    return row


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line a vocabulary: how the chunked head's memory grows with tokens, and its share of the other paths'."""
    lines = []
    for vocab in sorted({row["vocab"] for row in rows}):
        growth = {(r["path"], r["tokens"]): r["growth_mib"] for r in rows if r["vocab"] == vocab and "growth_mib" in r}
        line: dict[str, Any] = {"vocab": vocab}
        line["chunked_mib"] = {t: x for (path, t), x in growth.items() if path == "chunked"}
        for other in ("full", "trl"):
            shares = {t: growth["chunked", t] / x for (path, t), x in growth.items() if path == other}
            line[f"chunked_over_{other}"] = shares
        lines.append(line)
    return lines


def numbers(text: str) -> list[int]:
    return [int(x) for x in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--vocab", type=numbers, default=[32768, 65536, 131072])
    add("--tokens", type=numbers, default=[1024, 4096, 16384])
    add("--hidden", type=int, default=256)
    add("--length", type=int, default=512, help="tokens of a sequence")
    add("--response-share", type=float, default=0.7, help="share of a sequence's tokens that are scored")
    add("--logits-mib", type=int, default=128, help="the chunked head's budget, as train.logits_mib")
    add("--memory-gib", type=float, help="default: 8 on the CPU, what the device has on a GPU")
    add("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU, else float32")
    add("--seed", type=int, default=0)
    add("--repeats", type=int, default=1, help="passes that are timed in each process")
    args = parser.parse_args()
    where = harness.in_fresh_process(harness.environment)
    fits = args.memory_gib or (where["memory_gib"] if where["cuda"] else 8.0)
    rows = []
    for vocab in args.vocab:
        for tokens in args.tokens:
            for path in PATHS:
                case = Case(
                    path=path,
                    vocab=vocab,
                    tokens=tokens,
                    hidden=args.hidden,
                    length=args.length,
                    response_share=args.response_share,
                    logits_mib=args.logits_mib,
                    dtype=args.dtype or ("bfloat16" if where["cuda"] else "float32"),
                    seed=args.seed,
                    repeats=args.repeats,
                )
                rows.append(run(case, fits))
    harness.report(environment=where, settings=vars(args), cases=rows, summary=summary(rows))


if __name__ == "__main__":
    from spa_ray.cli.guard import guarded

    guarded(main, name="logprob_memory")
