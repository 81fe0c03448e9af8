"""Prompts that overlap: the same 13 words in a row (GPT-3's rule, arXiv:2005.14165), or the same words altogether.

Words are letters and digits, in lower case. Only what users say is compared.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

LENGTH = 13
_WORD = re.compile(r"\w+")

Messages = Sequence[Mapping[str, str]]


class Grams:
    """Runs of LENGTH words in these prompts; of a shorter message all its words."""

    def __init__(self, prompts: Iterable[Messages]) -> None:
        self._known = {gram for messages in prompts for gram in _grams(messages)}

    def __contains__(self, messages: Messages) -> bool:
        return bool(self._known) and any(gram in self._known for gram in _grams(messages))


def _grams(messages: Messages) -> Iterator[bytes]:
    for message in messages:
        words = _words(message["content"]) if message["role"] == "user" else []
        for first in range(max(1, len(words) - LENGTH + 1) if words else 0):
            yield _hash(words[first : first + LENGTH])


class Wordings:
    """Near-duplicates: prompts whose words are those of an earlier one."""

    def __init__(self) -> None:
        self._known: set[bytes] = set()

    def repeats(self, messages: Messages) -> bool:
        """Whether these words came by before; from now on they have."""
        spoken = [[message["role"], *_words(message["content"])] for message in messages]
        digest = _hash([word for turn in spoken for word in turn])
        known = digest in self._known
        if any(len(turn) > 1 for turn in spoken):  # signs alone are no words
            self._known.add(digest)
        return known


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _hash(words: Sequence[str]) -> bytes:
    return hashlib.blake2b(" ".join(words).encode(), digest_size=16).digest()
