"""How much an answer repeats itself. Comes in: token ids. Goes out: a share. Never: models, tokenizers."""

from __future__ import annotations

from collections.abc import Sequence

NGRAM = 3


def repetition(token_ids: Sequence[int], n: int = NGRAM) -> float:
    """Share of an answer's n-grams that are not new: 1 - |unique n-grams| / |n-grams|; 0 where it has none.

    The field's seq-rep-n (Welleck et al. 2019, «Neural Text Generation with Unlikelihood Training», Eq. 10). A policy
    that has collapsed repeats a word and comes near 1. Raises: ValueError when n is below 1.
    """
    if n < 1:
        raise ValueError(f"n is {n}; an n-gram has at least one token")
    grams = [tuple(token_ids[i : i + n]) for i in range(len(token_ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
