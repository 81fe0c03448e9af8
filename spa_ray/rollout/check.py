"""Whether a template can render the prompts, before anything starts: they are rendered, not cut into tokens."""

from __future__ import annotations

from collections.abc import Sequence

from spa_ray.rollout.chat import Chat
from spa_ray.rollout.template import Message

RENDERED = 20_000  # prompts that are rendered with their own text; of more, one of each sequence of roles


class PromptCheck:
    """Call it with the messages of one prompt after the other. Templates refuse sequences of roles, above all: each
    sequence is rendered under every system prompt the first time that it comes, and beyond `RENDERED` prompts only
    then. What is refused by its text after that becomes an error of its row in generation.
    """

    def __init__(self, chat: Chat, systems: Sequence[str | None] = ()) -> None:
        self._chat = chat
        self._systems = list(dict.fromkeys([None, *systems]))  # training renders prompts without one
        self._known: set[tuple[str, ...]] = set()
        self._seen = 0

    def __call__(self, messages: Sequence[Message]) -> None:
        """Raises: ValueError saying what the template refuses."""
        roles = tuple(message["role"] for message in messages)
        new = roles not in self._known
        self._seen += 1
        if not new and self._seen > RENDERED:
            return
        for system in self._systems if new else self._systems[:1]:
            self._chat.check(messages, system)
        self._known.add(roles)
