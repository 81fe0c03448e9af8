"""A judge's labels as the model would write them behind the rendered judge prompt.

After `[/INST]` a SentencePiece model writes "▁" and then the digit; a thinking model writes its empty thinking first.
Such ids, which come before any label, are the `prefix`: they are appended to the judge's prompt, so that constrained
and expected scores look where free generation has its digit. What the label itself becomes is asked of the template
(a conversation that is answered by the label), and where the template does not continue its own prompt, of the rendered
text with the label behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from spa_ray.errors import InputError
from spa_ray.rollout.chat import Chat
from spa_ray.rollout.thinking import CLOSE

QUESTION = [{"role": "user", "content": "Rate this answer."}]
DIGITS = "123456789"
CLOSED = f"\n{CLOSE}\n\n"

Ids = list[int]


@dataclass(frozen=True)
class Labels:
    """`prefix`: ids between the judge's prompt and any label; `tokens`: of each label, in order, what follows them."""

    texts: tuple[str, ...]
    prefix: tuple[int, ...]
    tokens: tuple[tuple[int, ...], ...]

    @property
    def single(self) -> tuple[int, ...] | None:
        """The labels' tokens where each label is one, and no two the same; else None."""
        ids = tuple(tokens[0] for tokens in self.tokens if len(tokens) == 1)
        return ids if len(set(ids)) == len(self.tokens) else None

    def require_single(self) -> tuple[int, ...]:
        """Raises: InputError where a label is several tokens."""
        if self.single is not None:
            return self.single
        text, tokens = next(
            ((t, ids) for t, ids in zip(self.texts, self.tokens, strict=True) if len(ids) != 1),
            (self.texts[0], self.tokens[0]),
        )
        raise InputError(
            f"scoring.mode expected needs one-token labels, and this tokenizer makes {len(tokens)} tokens of {text!r}; "
            "use scoring.scale=[1, 9] or scoring.mode=choice"
        )


def labels_of(chat: Chat, texts: Sequence[str]) -> Labels:
    """The labels behind a judge prompt of this chat's."""
    prompt = chat.prompt_ids(QUESTION)
    ways: list[Callable[[str], Ids | None]] = [
        lambda text: chat.answered_ids(QUESTION, text),
        lambda text: chat.continued_ids(QUESTION, (CLOSED if chat.opens_thinking else "") + text),
    ]
    for way in ways:
        rests = [_rest(way, prompt, digit) for digit in DIGITS]
        if not any(rest is None for rest in rests):
            prefix, suffix = _common([r for r in rests if r is not None])
            tokens = [_rest(way, prompt, text) for text in texts]
            cut = [_inner(ids, prefix, suffix) for ids in tokens]
            if all(cut):
                return Labels(tuple(texts), tuple(prefix), tuple(tuple(ids) for ids in cut if ids))
    raise InputError(
        f"model {chat.model}: its chat template does not say what follows a judge's prompt; use scoring.mode=regex"
    )


def _rest(way: Callable[[str], Ids | None], prompt: Ids, text: str) -> Ids | None:
    """The ids behind the prompt, None where the way does not begin with the prompt."""
    try:
        ids = way(text)
    except ValueError:
        return None
    return ids[len(prompt) :] if ids is not None and ids[: len(prompt)] == prompt else None


def _common(rests: Sequence[Ids]) -> tuple[Ids, Ids]:
    """What all begin with, and what all end with."""
    prefix = _shared_start(rests)
    suffix = _shared_start([rest[len(prefix) :][::-1] for rest in rests])[::-1]
    return prefix, suffix


def _shared_start(lists: Sequence[Ids]) -> Ids:
    return [column[0] for column in takewhile(lambda c: len(set(c)) == 1, zip(*lists, strict=False))]


def _inner(ids: Ids | None, prefix: Ids, suffix: Ids) -> Ids | None:
    """The ids between prefix and suffix, None where they are not of that form."""
    if ids is None or ids[: len(prefix)] != prefix or (suffix and ids[-len(suffix) :] != suffix):
        return None
    return ids[len(prefix) : len(ids) - len(suffix)]
