"""The thinking of a model that writes `<think> … </think>` before its answer."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

OPEN, CLOSE = "<think>", "</think>"


@dataclass(frozen=True)
class Thinking:
    """Which ids of an answer are thinking: the first `length`. Where it is not `closed`, the answer was cut before it
    began."""

    length: int = 0
    closed: bool = True


def find_thinking(tokenizer: Any, ids: Sequence[int], *, opened: bool) -> Thinking:
    """Where the thinking in an answer's ids ends. `opened`: the prompt itself ends in `<think>`."""
    text = str(tokenizer.decode(list(ids), skip_special_tokens=False))
    if CLOSE in text:
        return Thinking(1 + bisect_left(range(1, len(ids)), True, key=lambda n: _closes(tokenizer, ids[:n])))
    if opened or text.lstrip().startswith(OPEN):
        return Thinking(len(ids), closed=False)
    return Thinking()


def _closes(tokenizer: Any, ids: Sequence[int]) -> bool:
    return CLOSE in str(tokenizer.decode(list(ids), skip_special_tokens=False))
