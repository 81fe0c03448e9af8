"""From a rendered chat to token ids, so that only the template writes control tokens.

A control token (`<|im_end|>`, `[/INST]`, `</s>`) in the text of a message would be read as the token itself, and
whoever wrote the text could end his turn and open another. Before the template runs, `protect` therefore puts a mark,
one character that occurs nowhere else, inside every control token's text that a message holds: the template handles the
message as it would, and the tokenizer no longer sees a control token there. The mark is taken out again after control
tokens were looked for and before the text is cut into tokens (a normaliser or pre-tokenizer of a copy of the tokenizer
does it). Nothing else differs from the ordinary path: where text and template meet, tokens merge as ever. A chat
without control tokens in its messages takes the ordinary path itself.

Turns that a template marks with plain text (`[INST]` where it is no token) cannot be told from text.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

PIPED = re.compile(r"<[|\uff5c].*[|\uff5c]>", re.DOTALL)  # a token of this form is no text in any language
MARKS = [chr(code) for code in (*range(0xFDD0, 0xFDF0), *range(0xE000, 0xE100))]  # non-characters, then private ones
ROUND_TRIP = "Say {} twice"


@dataclass(frozen=True)
class Controls:
    """The control tokens of a tokenizer: text -> id, and a pattern that finds any of them."""

    ids: dict[str, int]
    pattern: re.Pattern[str] | None

    @classmethod
    def of(cls, tokenizer: Any, template: str, *, rows: int | None = None) -> Controls:
        """Special tokens, tokens that the template writes, tokens of the form <|name|>, and those that the embedding
        has no row for (`rows`). Tokens of one character cannot be told from text."""
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {str(text) for text in getattr(tokenizer, "all_special_tokens", ())}
        found = {}
        for number, token in added.items():
            text = token.content
            beyond = rows is not None and number >= rows
            written = text in template and not text.isspace() and any(mark in text for mark in "<[|")
            if token.special or text in special or written or PIPED.fullmatch(text) or beyond:
                found[text] = int(number)
        for text in special - found.keys():
            found[text] = int(tokenizer.convert_tokens_to_ids(text))
        found = {text: number for text, number in found.items() if len(text) > 1 and not text.isspace()}
        longest_first = sorted(found, key=len, reverse=True)
        return cls(found, re.compile("|".join(map(re.escape, longest_first))) if found else None)

    def inside(self, text: str) -> bool:
        return self.pattern is not None and self.pattern.search(text) is not None

    def protect(self, text: str, mark: str, *, spare: Iterable[str] = ()) -> str:
        """The text with the mark inside every control token's text but the spared ones."""
        if self.pattern is None:
            return text
        spared = frozenset(spare)
        while True:
            marked = self.pattern.sub(lambda m: m[0] if m[0] in spared else m[0][0] + mark + m[0][1:], text)
            if marked == text:
                return text
            text = marked  # what overlapped with a token that is broken now


def free_mark(texts: Iterable[str]) -> str:
    """A character that none of the texts holds. Raises: ValueError when they hold them all."""
    used = set().union(*map(set, texts))
    for mark in MARKS:
        if mark not in used:
            return mark
    raise ValueError("the text holds control tokens and every character that could mark them")


class FastEncoder:
    """The library under a transformers tokenizer, without what transformers does around it (as much time again)."""

    def __init__(self, tokenizer: Any, controls: Controls) -> None:
        self._backend = _bare(tokenizer.backend_tokenizer)
        self._controls = controls
        added = tokenizer.added_tokens_decoder
        # Tokens that are looked for in normalised text are found before a pre-tokenizer runs, and after a normaliser.
        self._early = not any(added[i].normalized for i in controls.ids.values() if i in added)
        self._by_mark: dict[str, Any] = {}

    def ids(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def many(self, texts: list[str]) -> list[int]:
        """The lengths in tokens of several texts, on all cores."""
        return [len(found) for found in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def protected(self, text: str, mark: str) -> list[int]:
        if mark not in self._by_mark:
            self._by_mark[mark] = self._with_mark(mark)
        return list(self._by_mark[mark].encode(text, add_special_tokens=False).ids)

    def _with_mark(self, mark: str) -> Any:
        from tokenizers import normalizers, pre_tokenizers

        backend = copy.deepcopy(self._backend)
        if self._early:
            own = [backend.normalizer] if backend.normalizer is not None else []
            backend.normalizer = normalizers.Sequence([normalizers.Replace(mark, ""), *own])
        else:
            own = [backend.pre_tokenizer] if backend.pre_tokenizer is not None else []
            backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(mark, "removed"), *own])
        return backend


class SlowEncoder:
    """A tokenizer written in Python: what is between two control tokens of the template is encoded as text alone."""

    def __init__(self, tokenizer: Any, controls: Controls) -> None:
        self._tokenizer, self._controls = tokenizer, controls

    def ids(self, text: str) -> list[int]:
        return [int(i) for i in self._tokenizer.encode(text, add_special_tokens=False)]

    def many(self, texts: list[str]) -> list[int]:
        return [len(self.ids(text)) for text in texts]

    def protected(self, text: str, mark: str) -> list[int]:
        ids: list[int] = []
        at = 0
        for found in self._controls.pattern.finditer(text) if self._controls.pattern else ():
            ids += self._plain(text[at : found.start()].replace(mark, ""))
            ids.append(self._controls.ids[found[0]])
            at = found.end()
        return ids + self._plain(text[at:].replace(mark, ""))

    def _plain(self, text: str) -> list[int]:
        if not text:
            return []
        ids = self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return [int(i) for i in ids]


Encoder = FastEncoder | SlowEncoder


def find_encoder(tokenizer: Any, controls: Controls, rendered: str, expected: list[int]) -> Encoder | None:
    """The fastest encoder that makes of a rendered chat what the tokenizer's own chat method does, None without one."""
    encoders: list[Encoder] = []
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        encoders.append(FastEncoder(tokenizer, controls))
    if hasattr(tokenizer, "added_tokens_decoder"):
        encoders.append(SlowEncoder(tokenizer, controls))
    return next((encoder for encoder in encoders if encoder.ids(rendered) == expected), None)


def leaks(encoder: Encoder, controls: Controls, unknown: int | None) -> list[str]:
    """The control tokens whose text becomes the token although it is protected. (`unknown` is what a tokenizer makes of
    any text that it does not know.)"""
    found = []
    for text, number in controls.ids.items():
        if number == unknown:
            continue
        sentence = ROUND_TRIP.format(text)
        if number in encoder.protected(controls.protect(sentence, MARKS[0]), MARKS[0]):
            found.append(text)
    return found


def _bare(backend: Any) -> Any:
    """A copy whose settings are its own, whoever uses the tokenizer besides."""
    own = copy.deepcopy(backend)
    own.no_truncation()
    own.no_padding()
    return own
