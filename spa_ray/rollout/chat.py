"""From messages to prompt token ids, by the model's own chat template: the one renderer of generation and training.

Nothing adds special tokens again. A system turn that the template does not show stands in front of the first user turn.
Control tokens in the text of messages stay text (`encoding`). What a template cannot render is a `ValueError` of one
line, whatever the template raised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from spa_ray.config.models import Model
from spa_ray.errors import InputError
from spa_ray.rollout.encoding import Controls, find_encoder, free_mark, leaks
from spa_ray.rollout.settings import ChatSettings, today
from spa_ray.rollout.template import Message, Template, Turn
from spa_ray.rollout.thinking import CLOSE, OPEN, Thinking, find_thinking
from spa_ray.rollout.tokenizer import check_vocabulary, embedding_rows, load_tokenizer

QUESTION = [{"role": "user", "content": "What is 12 × 7?\n\nSay  why."}]
ENCODING_PROBE = "Naïve 東京 2048  déjà\tvu\n\nif (x != 10) { return; } 🙂"
THINKING_MARKS = (OPEN, CLOSE)  # an earlier answer's own: its template looks for them


@dataclass(frozen=True)
class Divided:
    """An answer's ids and text without its thinking. `closed` false: it was cut within its thinking."""

    ids: list[int]
    text: str
    thinking: str | None
    closed: bool


class Chat:
    """A tokenizer's chat template and settings."""

    def __init__(
        self, tokenizer: Any, *, model: str, settings: ChatSettings | None = None, rows: int | None = None
    ) -> None:
        """`rows` is the number of rows of the model's embedding, where it is known.

        Raises: InputError for a tokenizer without a chat template, with one that refuses or leaves out a plain
        question, or with ids that the embedding has no row for.
        """
        self.settings = ChatSettings(date=today()) if settings is None else settings
        self.model, self.rows = model, rows
        self._tokenizer = tokenizer
        self._template = Template(tokenizer, model=model, settings=self.settings)
        try:
            text, ids = self._template.text(QUESTION), self._template.ids(QUESTION)
            controls = Controls.of(tokenizer, self._template.source, rows=rows)
            encoder = find_encoder(tokenizer, controls, text, ids)
        except ValueError as e:
            raise InputError(f"model {model}: a plain question cannot be rendered: {e}") from e
        self._controls, self._encoder = controls, encoder
        self._check(text, ids)
        mentioned = CLOSE in self._template.source or CLOSE in controls.ids
        self.thinks, self.opens_thinking = mentioned, text.rstrip().endswith(OPEN)

    def with_kwargs(self, kwargs: Mapping[str, Any] | None) -> Chat:
        """The same chat with other variables for its template; itself where they are null or the same.

        Raises: InputError as the constructor does.
        """
        if kwargs is None or dict(kwargs) == self.settings.kwargs:
            return self
        settings = self.settings.model_copy(update={"kwargs": dict(kwargs)})
        return Chat(self._tokenizer, model=self.model, settings=settings, rows=self.rows)

    @property
    def source(self) -> str:
        """The template."""
        return self._template.source

    def prompt_ids(self, messages: Sequence[Message], system: str | None = None) -> list[int]:
        """Ids of the conversation up to where the assistant's answer begins.

        `system` stands in for the conversation's own system message where it has one. Raises: ValueError for what the
        template refuses, and for ids that the embedding has no row for.
        """
        ids = self._ids(self._turns(messages, system))
        if self.rows is not None and max(ids) >= self.rows:
            raise ValueError(f"the prompt holds token id {max(ids)}, and the model's embedding has {self.rows} rows")
        return ids

    def check(self, messages: Sequence[Message], system: str | None = None) -> None:
        """Render without cutting into tokens. Raises: ValueError as `prompt_ids` does, but for single ids."""
        turns = self._turns(messages, system)
        mark = self._mark(turns)
        self._template.text(turns if mark is None else self._protected(turns, mark))

    def lengths(self, conversations: Sequence[tuple[Sequence[Message], str | None]]) -> list[int]:
        """Tokens of many prompts, on all cores where the tokenizer can; 0 for one that the template refuses."""
        if self._encoder is None:
            return [len(self._ids_or_none(messages, system)) for messages, system in conversations]
        return self._encoder.many([self._text_or_none(messages, system) for messages, system in conversations])

    def answered_ids(self, messages: Sequence[Message], answer: str) -> list[int]:
        """Ids of a conversation with its answer, as the template writes it. Raises: ValueError."""
        return self._ids([*self._turns(messages, None), {"role": "assistant", "content": answer}], answered=True)

    def message_ids(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation to the end of its last message, where no answer begins. Raises: ValueError."""
        return self._ids(self._turns(messages, None), answered=True)

    def continued_ids(self, messages: Sequence[Message], text: str) -> list[int] | None:
        """Ids of the prompt with a text right behind it; None where the tokenizer only renders by itself."""
        if self._encoder is None:
            return None
        return self._encoder.ids(self._template.text(self._turns(messages, None)) + text)

    def text_ids(self, text: str) -> list[int]:
        """Ids of a text that no template renders, behind the tokenizer's own beginning of a text where it has one."""
        opening = [int(i) for i in self._tokenizer.encode("", add_special_tokens=True)][:1]
        opening = [i for i in opening if i == getattr(self._tokenizer, "bos_token_id", None)]
        return opening + self._plain(text, [{"role": "user", "content": text}], lambda turns: turns[0]["content"])

    def continuation_ids(self, prompt: Sequence[Message] | str, text: str) -> tuple[list[int], list[int]]:
        """Ids of a prompt (messages, or a text that no template renders), and what a text right behind it adds.

        Where they meet, tokens merge as in one text. Raises: ValueError as `prompt_ids` does, and for a text that adds
        no token.
        """
        if isinstance(prompt, str):
            before, both = self.text_ids(prompt), self.text_ids(prompt + text)
        else:
            before = self.prompt_ids(prompt)
            turns = [*self._turns(prompt, None), {"role": "assistant", "content": text}]
            both = self._plain(text, turns, lambda turns: self._template.text(turns[:-1]) + turns[-1]["content"])
            both = before + both if self._encoder is None else both
        if len(both) <= len(before):
            raise ValueError(f"the continuation {text[:60]!r} adds no token to its prompt")
        return both[: len(before)], both[len(before) :]

    def _plain(self, text: str, turns: list[Turn], written: Callable[[list[Turn]], str]) -> list[int]:
        """Ids of what is written of the turns, with control tokens in them as text; of the text alone where the
        tokenizer only renders by itself."""
        if self._encoder is None:
            return [int(i) for i in self._tokenizer.encode(text, add_special_tokens=False)]
        mark = self._mark(turns)
        if mark is None:
            return self._encoder.ids(written(turns))
        return self._encoder.protected(written(self._protected(turns, mark)), mark)

    def encodes_as(self, tokenizer: Any) -> bool:
        """Whether another tokenizer object makes the same ids of a text."""
        text = self._template.text(QUESTION) + ENCODING_PROBE
        mine, other = (t.encode(text, add_special_tokens=False) for t in (self._tokenizer, tokenizer))
        return list(mine) == list(other)

    def thinking(self, ids: list[int]) -> Thinking:
        """How much of an answer is thinking; nothing where the model is none that thinks."""
        if not (self.thinks and ids):
            return Thinking()
        return find_thinking(self._tokenizer, ids, opened=self.opens_thinking)

    def divide(self, ids: list[int]) -> Divided:
        """An answer of this model's, and its thinking apart."""
        tokenizer, found = self._tokenizer, self.thinking(ids)
        answer = ids[found.length :]
        text = str(tokenizer.decode(answer, skip_special_tokens=True))
        thought = str(tokenizer.decode(ids[: found.length], skip_special_tokens=True)) if found.length else None
        return Divided(answer, text, thought, found.closed)

    def _ids_or_none(self, messages: Sequence[Message], system: str | None) -> list[int]:
        try:
            return self._ids(self._turns(messages, system))
        except ValueError:
            return []

    def _text_or_none(self, messages: Sequence[Message], system: str | None) -> str:
        try:
            return self._template.text(self._turns(messages, system))
        except ValueError:
            return ""

    # --- from messages to turns, text and ids -----------------------------------------------------------------------

    def _turns(self, messages: Sequence[Message], system: str | None) -> list[Turn]:
        turns = [dict(m) for m in messages]
        if system is not None:
            turns = [{"role": "system", "content": system}, *(m for m in turns if m["role"] != "system")]
        if not turns:
            raise ValueError("a conversation without messages")
        return self._template.folded(turns)

    def _ids(self, turns: list[Turn], *, answered: bool = False) -> list[int]:
        if self._encoder is None:
            return self._template.ids(turns, answered=answered)
        mark = self._mark(turns)
        if mark is None:
            return self._encoder.ids(self._template.text(turns, answered=answered))
        return self._encoder.protected(self._template.text(self._protected(turns, mark), answered=answered), mark)

    def _mark(self, turns: Sequence[Mapping[str, str]]) -> str | None:
        """A mark for control tokens in the turns' text, None where there are none."""
        if self._encoder is None or not any(self._controls.inside(turn["content"]) for turn in turns):
            return None
        return free_mark([self._template.source, *(turn["content"] for turn in turns)])

    def _protected(self, turns: Sequence[Turn], mark: str) -> list[Turn]:
        spare = {"assistant": THINKING_MARKS}
        return [
            {**turn, "content": self._controls.protect(turn["content"], mark, spare=spare.get(turn["role"], ()))}
            for turn in turns
        ]

    def _check(self, text: str, ids: list[int]) -> None:
        if "12 × 7" not in text:
            raise InputError(f"model {self.model}: its chat template leaves out the user's message")
        if self.rows is not None and max(ids) >= self.rows:
            raise InputError(
                f"model {self.model}: its chat template writes token id {max(ids)}, and its embedding has {self.rows} "
                "rows; resize the embedding to the tokenizer (model.resize_token_embeddings)"
            )
        unknown = getattr(self._tokenizer, "unk_token_id", None)
        kept = leaks(self._encoder, self._controls, unknown) if self._encoder else []
        if kept:
            raise InputError(f"model {self.model}: its tokenizer reads {kept[0]} in a message as a control token")


def open_chat(model: Model, folder: Path, *, day: date | None = None, estimate: bool = False) -> Chat:
    """The chat of a model folder by a config's model section. `day` is what templates see as today where the section
    names no date; `estimate` is `load_tokenizer`'s. Raises: InputError for a tokenizer, template or embedding that does
    not work."""
    tokenizer = load_tokenizer(folder, trust_remote_code=model.trust_remote_code, estimate=estimate)
    return chat_of(tokenizer, folder, ChatSettings.of(model, day=day))


def chat_of(tokenizer: Any, folder: Path, settings: ChatSettings) -> Chat:
    """The chat of a tokenizer that belongs to a model folder. Raises: InputError."""
    rows = embedding_rows(folder)
    check_vocabulary(tokenizer, rows, model=str(folder))
    return Chat(tokenizer, model=str(folder), settings=settings, rows=rows)
