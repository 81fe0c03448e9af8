"""Whether vLLM and transformers answer alike from one folder: vLLM's greedy tokens beside transformers' logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

Answers = Sequence[tuple[list[int], list[int]]]  # prompt ids, greedily generated ids


@dataclass(frozen=True)
class Alike:
    """Of `tokens` that vLLM chose, `differ` are not the ones that transformers puts first; `worst` is by how much of a
    logit transformers prefers another at most (0 where all are its own choice)."""

    tokens: int
    differ: int
    worst: float


def compare_greedy(folder: Path, answers: Answers, *, dtype: str, device: str) -> Alike:
    """Feed vLLM's answers to transformers, token by token as they were generated."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()
    short: list[float] = []
    with torch.no_grad():
        for prompt, answer in answers:
            logits = model(torch.tensor([prompt + answer], device=device)).logits[0].float()
            predicted = logits[len(prompt) - 1 : -1]
            taken = predicted.gather(1, torch.tensor(answer, device=device)[:, None])[:, 0]
            short += (predicted.max(dim=1).values - taken).tolist()
    return Alike(len(short), sum(s > 0 for s in short), max(short))
