"""Preference pairs that a user already has, in the forms that TRL reads, as prompt, chosen and rejected answer.

Columns `chosen` and `rejected`, as text, as messages or as transcripts («Human: … Assistant: …», HH-RLHF's); `prompt`,
as text or as messages, or nothing where `chosen` and `rejected` are complete conversations; a number for each answer
where there is one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

from spa_ray.config.prompts import Prompts
from spa_ray.data.forms import BadRowError, Message, as_messages, check_text, is_missing, take_messages
from spa_ray.data.prompts import PromptCounts
from spa_ray.data.readers import Row, read_rows

TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):")  # HH-RLHF's
SIDES = ("chosen", "rejected")
# Names of the two answers' scores in public data sets (UltraFeedback as TRL and Argilla give it).
SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen_rating", "rejected_rating"))


@dataclass(frozen=True)
class OwnPair:
    """`place` names the row in messages; `scores` are the chosen's and the rejected's, null where the row has none."""

    place: str
    prompt: list[Message]
    chosen: str
    rejected: str
    scores: tuple[float, float] | None


def read_own_pairs(
    source: str, *, split: str | None = None, on_bad_row: str = "error", counts: PromptCounts | None = None
) -> Iterator[OwnPair]:
    """The pairs of a file, a folder, a hub's data set or a reader, in its order. `counts` is told of rows left out.

    Raises: InputError with file and line at a bad row, unless `on_bad_row` is skip.
    """
    counts = counts or PromptCounts()
    for row in read_rows(Prompts(source=source, split=split), where="pairs", notes=counts.told):
        if row.blank:
            continue
        try:
            yield own_pair(row)
        except BadRowError as e:
            counts.refuse(row.place, e, on_bad_row)


def own_pair(row: Row) -> OwnPair:
    """Raises: BadRowError."""
    if row.values is None:
        raise BadRowError(str(row.problem), "unreadable")
    values = dict(row.values)
    for side in SIDES:
        if is_missing(values.get(side)):
            raise BadRowError(f"has no `{side}`; a pair has the columns prompt, chosen and rejected")
    scores = _scores(values)
    chosen, rejected = (_turns(values.pop(side), side) for side in SIDES)
    if is_missing(values.get("prompt")):
        prompt = _common(chosen, rejected)
    else:
        prompt = take_messages({"prompt": values["prompt"]}, {"prompt": "prompt"})
    answers = [_answer(turns, prompt, side) for turns, side in zip((chosen, rejected), SIDES, strict=True)]
    return OwnPair(row.place, prompt, answers[0], answers[1], scores)


def _turns(value: Any, side: str) -> list[Message] | str:
    if isinstance(value, str):
        is_transcript = TRANSCRIPT.match(value)
        return split_turns(value, TRANSCRIPT, side) if is_transcript else check_text(value, f"`{side}`", "an answer")
    return as_messages(value, side, text_is_prompt=False, named=True)


def split_turns(text: str, mark: re.Pattern[str], name: str) -> list[Message]:
    """The turns of a text in which `mark`, whose group is the speaker, heads each; the first may go without (a user's).

    Raises: BadRowError, for an empty turn as well.
    """
    first, *rest = mark.split(text)
    said = [*([("user", first)] if first.strip() else []), *zip(rest[::2], rest[1::2], strict=True)]
    turns = [{"from": speaker, "value": words.strip()} for speaker, words in said]
    return as_messages(turns, name, text_is_prompt=False, named=True)


def _common(chosen: list[Message] | str, rejected: list[Message] | str) -> list[Message]:
    """The prompt of two conversations that differ in their last answer."""
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise BadRowError("has no `prompt`, and `chosen` and `rejected` are text; give `prompt`, or conversations")
    if chosen[:-1] != rejected[:-1] or len(chosen) < 2:
        raise BadRowError("has no `prompt`, and `chosen` and `rejected` differ before their last message")
    return chosen[:-1]


def _answer(turns: list[Message] | str, prompt: list[Message], side: str) -> str:
    if isinstance(turns, str):
        return turns
    rest = turns[len(prompt) :] if turns[: len(prompt)] == prompt else turns
    if len(rest) != 1 or rest[0]["role"] != "assistant":
        raise BadRowError(f"`{side}` is not one assistant message, nor the prompt and one assistant message")
    return rest[0]["content"]


def _scores(values: MutableMapping[str, Any]) -> tuple[float, float] | None:
    for names in SCORES:
        if all(name in values for name in names):
            given = [score_of(values[name], name) for name in names]
            return given[0], given[1]
    return None


def score_of(value: Any, name: str) -> float:
    """Raises: BadRowError for what is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadRowError(f"`{name}` is {value!r}; a score is a finite number")
    return float(value)
