"""From messages to prompt token ids, by the model's own chat template, once: nothing adds special tokens again.

A template that refuses a system role gets the system text in front of the first user turn (Mistral's, Gemma's).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from spa_ray.errors import InputError
from spa_ray.rollout.tokenizer import why

Message = Mapping[str, str]


class Chat:
    """A tokenizer's chat template."""

    def __init__(self, tokenizer: Any, *, model: str) -> None:
        """Raises: InputError for a tokenizer without a chat template, or with one that refuses a plain question."""
        if not getattr(tokenizer, "chat_template", None):
            raise InputError(
                f"model {model}: its tokenizer has no chat template; add chat_template.jinja to its folder"
            )
        self._tokenizer = tokenizer
        self._fast = _fast_encoder(tokenizer)
        probe = [{"role": "user", "content": "What is 12 × 7?\n\nSay  why."}]
        try:
            if self._encode(probe) != self._encode_slowly(probe):
                self._fast = None
        except Exception as e:
            raise InputError(f"model {model}: its chat template refuses a user message ({why(e)})") from e
        self.knows_system = self._try_system()

    def prompt_ids(self, messages: Sequence[Message], system: str | None = None) -> list[int]:
        """Ids of the conversation up to where the assistant's answer begins.

        `system` stands in for the conversation's own system message where it has one. Raises: ValueError when the
        template refuses the roles.
        """
        turns = [dict(m) for m in messages]
        if system is not None:
            turns = [{"role": "system", "content": system}, *(m for m in turns if m["role"] != "system")]
        if turns[0]["role"] == "system" and not self.knows_system:
            head, *turns = turns
            first = next(turn for turn in turns if turn["role"] == "user")
            first["content"] = f"{head['content']}\n\n{first['content']}"
        try:
            return self._encode(turns)
        except Exception as e:
            raise ValueError(f"the chat template refuses this conversation ({why(e)})") from e

    def _encode(self, messages: Sequence[Message]) -> list[int]:
        if self._fast is None:
            return self._encode_slowly(messages)
        text = self._tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        return self._fast(text)

    def _encode_slowly(self, messages: Sequence[Message]) -> list[int]:
        ids = self._tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
        )
        return [int(i) for i in ids]

    def _try_system(self) -> bool:
        marker = "spa system probe"
        try:
            with_system = self._tokenizer.apply_chat_template(
                [{"role": "system", "content": marker}, {"role": "user", "content": "?"}],
                add_generation_prompt=True,
                tokenize=False,
            )
        except Exception:  # noqa: BLE001 whatever it raises: it takes no system turn
            return False
        return marker in with_system


def _fast_encoder(tokenizer: Any) -> Callable[[str], list[int]] | None:
    """Text to ids by the library under a transformers tokenizer, without what transformers does around it (as much
    again; at a prompt for every judgement it is felt). None where there is no such library."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    own = copy.deepcopy(backend)  # its settings are its own, whoever uses the tokenizer besides
    own.no_truncation()
    own.no_padding()
    return lambda text: list(own.encode(text, add_special_tokens=False).ids)
