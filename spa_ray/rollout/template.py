"""The chat template of a tokenizer: which one of several, and how it treats roles.

A template is somebody's program: whatever it raises becomes a `ValueError` of one line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spa_ray.errors import InputError
from spa_ray.rollout.settings import ChatSettings
from spa_ray.rollout.tokenizer import why

Message = Mapping[str, str]
Turn = dict[str, str]
PROBE = "spaprobe"  # letters alone, so that no template finds something to change in it


class Template:
    """A tokenizer's template with its variables."""

    def __init__(self, tokenizer: Any, *, model: str, settings: ChatSettings) -> None:
        """Raises: InputError for a tokenizer without a template, or with several and none called default."""
        self.source = choose(getattr(tokenizer, "chat_template", None), model=model)
        self._tokenizer = tokenizer
        self._given = settings.given(self.source)
        if isinstance(getattr(tokenizer, "chat_template", None), dict):
            self._given["chat_template"] = self.source
        self._systems: dict[tuple[str, ...], bool] = {}

    def text(self, turns: Sequence[Message], *, answered: bool = False) -> str:
        """The rendered conversation up to where the assistant's answer begins, or, with `answered`, its answer too.

        Raises: ValueError for what the template refuses, or makes nothing of.
        """
        return self._render(turns, answered=answered, tokenize=False)

    def ids(self, turns: Sequence[Message], *, answered: bool = False) -> list[int]:
        """The same as token ids by the tokenizer's own method. Raises: ValueError."""
        return [int(i) for i in self._render(turns, answered=answered, tokenize=True, return_dict=False)]

    def _render(self, turns: Sequence[Message], *, answered: bool, **how: Any) -> Any:
        try:
            rendered = self._tokenizer.apply_chat_template(
                [dict(turn) for turn in turns], add_generation_prompt=not answered, **how, **self._given
            )
        except Exception as e:
            raise ValueError(f"the chat template refuses this conversation ({why(e)})") from e
        if not rendered:
            raise ValueError("the chat template makes nothing of this conversation")
        return rendered

    def folded(self, turns: Sequence[Turn]) -> list[Turn]:
        """The turns, with the system's text in front of the first user turn where the template does not show a system
        turn of its own (Mistral's and Gemma's refuse it, others drop it without a word)."""
        if turns[0]["role"] != "system" or self.shows_system(tuple(turn["role"] for turn in turns)):
            return list(turns)
        system, *rest = (dict(turn) for turn in turns)
        first = next((turn for turn in rest if turn["role"] == "user"), None)
        if first is None:
            raise ValueError("the chat template takes no system turn, and there is no user turn to put it in")
        first["content"] = f"{system['content']}\n\n{first['content']}"
        return rest

    def shows_system(self, roles: tuple[str, ...]) -> bool:
        """Whether the system's text appears where a conversation of these roles is rendered; asked once per roles."""
        if roles not in self._systems:
            self._systems[roles] = self._appears(roles, position=0)
        return self._systems[roles]

    def _appears(self, roles: Sequence[str], *, position: int) -> bool:
        turns = [{"role": role, "content": f"{PROBE}{i}x"} for i, role in enumerate(roles)]
        try:
            text = self.text(turns)
        except ValueError:
            return False
        return turns[position]["content"] in text.lower()


def template_text(folder: Path) -> str:
    """The text of every chat template in a model folder's files, for a stage's key: read without a tokenizer."""
    files = [*sorted(folder.glob("*.jinja")), *sorted(folder.glob("additional_chat_templates/*.jinja"))]
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        texts.append(settings.read_text(encoding="utf-8", errors="replace"))
    return "\n".join(texts)


def choose(given: Any, *, model: str) -> str:
    """The template's source, out of what a tokenizer has: one, or several by name. Raises: InputError."""
    if isinstance(given, list | tuple):  # as tokenizer_config.json writes several
        given = {entry["name"]: entry["template"] for entry in given}
    if isinstance(given, dict) and given:
        if "default" not in given and len(given) > 1:
            raise InputError(
                f"model {model}: its tokenizer has the chat templates {', '.join(sorted(given))} and none called "
                "default; write the one to use into chat_template.jinja"
            )
        given = given.get("default") or next(iter(given.values()))
    if not given or not isinstance(given, str):
        raise InputError(f"model {model}: its tokenizer has no chat template; add chat_template.jinja to its folder")
    return given
