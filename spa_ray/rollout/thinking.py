"""The thinking of a model that writes `<think> … </think>` before its answer, and whether a config says what is to
become of it."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from spa_ray.config.models import Model

OPEN, CLOSE = "<think>", "</think>"
# Variables of templates: Qwen3's, SmolLM3's and others'; DeepSeek-V3.1's and Granite's.
_SWITCH = re.compile(r"\benable_thinking\b|(?:(?<=if )|(?<=not )|(?<=and )|(?<=or ))thinking\b")
_CODE = re.compile(r"\{[%{].*?[%}]\}", re.DOTALL)  # of a template, what is no text


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


def switch_of(template: str) -> str | None:
    """The variable by which a chat template turns thinking on or off, None where it has none."""
    found = _SWITCH.search(" ".join(_CODE.findall(template)))
    return found.group() if found else None


def unsaid(template: str, model: Model, *, opened: bool) -> str | None:
    """One line where a template knows thinking and neither its variable nor `model.think` is set. `opened`: its prompts
    end in `<think>`."""
    switch = switch_of(template)
    if "think" in model.model_fields_set or not (switch or opened) or switch in model.chat_template_kwargs:
        return None
    what = f"asks for `{switch}`" if switch else f"opens {OPEN} in every prompt"
    off = f"model.chat_template_kwargs={{{switch}: false}} turns it off; " if switch else ""
    return (
        f"model.chat_template_kwargs: the chat template {what} and the config does not say whether the model shall "
        "think: thinking counts against max_tokens (an answer that ends inside it is none), and a judge that has to "
        f"give a number at once cannot; {off}model.think=strip or mask says that it is meant"
    )


def _closes(tokenizer: Any, ids: Sequence[int]) -> bool:
    return CLOSE in str(tokenizer.decode(list(ids), skip_special_tokens=False))
