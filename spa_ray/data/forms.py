"""The public forms of prompts: where a row holds its conversation, and how it becomes a list of {role, content}.

One table (`FORMS`) reads, another (`TOLD`) names forms that take a word from the user. A `BadRowError` says what to do.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Message = dict[str, str]
LastAnswer = Literal["error", "drop"]

ROLES = ("system", "user", "assistant")
_SPEAKERS = {  # of ShareGPT's `from`
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "system": "system",
}
_TURN_KEYS = (("role", "content"), ("from", "value"), ("role", "value"), ("from", "content"))
# What public logs keep beside a turn's text, and no template shows.
_BESIDE = frozenset(
    {
        "country",
        "created",
        "create_time",
        "hashed_ip",
        "header",
        "id",
        "index",
        "language",
        "loss",
        "message_id",
        "metadata",
        "openai_id",
        "redacted",
        "state",
        "temperature",
        "timestamp",
        "token_count",
        "token_counter",
        "top_p",
        "toxic",
        "turn_identifier",
        "usage",
        "weight",
    }
)
_LIKELY = (
    "question",
    "query",
    "instruction",
    "goal",
    "behavior",
    "forbidden_prompt",
    "user_prompt",
    "problem",
    "request",
    "user",
    "text",
    "input",
    "content",
    "sentence",
)
OUR_COLUMNS = frozenset({"prompt", "messages", "prompt_id", "conversations", "conversation", "instruction", "input"})


class BadRowError(Exception):
    """One row is no prompt; the text says why and how to fix it, `reason` in a word or two what kind of fault it is."""

    def __init__(self, text: str, reason: str = "malformed") -> None:
        super().__init__(text)
        self.reason = reason


@dataclass(frozen=True)
class Form:
    """A column whose presence shows the form, and what makes messages of the row. `read` removes what it uses."""

    column: str
    read: Callable[[MutableMapping[str, Any], str], list[Message]]


def take_messages(
    values: MutableMapping[str, Any], columns: Mapping[Any, str], last_answer: LastAnswer = "error"
) -> list[Message]:
    """The row's conversation up to the user's last turn. What it is made of is removed from `values`."""
    name, messages = _find(values, columns)
    if messages[-1]["role"] == "assistant" and last_answer == "drop":
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise BadRowError(f"`{name}` holds answers alone; a prompt ends with the user's message")
    if messages[-1]["role"] == "assistant":
        raise BadRowError(
            "the last message's role is 'assistant', as in SFT data; a prompt ends with the user's message: "
            "prompts.last_answer=drop leaves the last answer out"
        )
    if messages[-1]["role"] != "user":
        raise BadRowError(f"the last message's role is {messages[-1]['role']!r}; a prompt ends with the user's message")
    return messages


def _find(values: MutableMapping[str, Any], columns: Mapping[Any, str]) -> tuple[str, list[Message]]:
    named = [key for key in ("prompt", "messages") if key in columns]
    there = any(columns.get(key, key) in values for key in named or ["prompt", "messages"])
    taken = {
        key: value for key in named or ["prompt", "messages"] if not is_missing(value := take(values, columns, key))
    }
    if len(taken) > 1:
        raise BadRowError(
            "has both `prompt` and `messages`; say which one to read, for example prompts.columns={prompt: prompt}"
        )
    for key, value in taken.items():
        name = columns.get(key, key)
        return name, as_messages(value, name, text_is_prompt=key == "prompt", named=bool(named))
    if not named:
        for form in FORMS:
            if not is_missing(values.get(form.column)):
                return form.column, form.read(values, form.column)
        for shows, advice in TOLD:
            if shows(values):
                raise BadRowError(advice)
    wanted = " or ".join(f"`{columns.get(key, key)}`" for key in named or ["prompt", "messages"])
    raise BadRowError(
        f"no value in {wanted} (other columns: {_names(values)}); {_advice(values)}", "empty" if there else "no prompt"
    )


def take(values: MutableMapping[str, Any], columns: Mapping[Any, str], key: str) -> Any:
    """Remove and return our column `key`, None where it is absent; a dotted name reads inside a nested column.

    Raises: BadRowError when a named one is absent.
    """
    name = columns.get(key, key)
    if name in values or key not in columns:
        return values.pop(name, None)
    found: Any = values
    for part in name.split("."):
        if isinstance(found, Mapping) and part in found:
            found = found[part]
        elif isinstance(found, list | tuple) and part.isdigit() and int(part) < len(found):
            found = found[int(part)]
        else:
            near = difflib.get_close_matches(name, [str(n) for n in values], n=1, cutoff=0.6)
            same = [str(n) for n in values if str(n).strip().lower() == name.strip().lower()]
            meant = f"; did you mean {(same or near)[0]!r}?" if same or near else ""
            raise BadRowError(
                f"has no column {name!r}, which prompts.columns names for {key} (columns: {_names(values)}){meant}"
            )
    return found


def is_missing(value: Any) -> bool:
    """Null, or the NaN that tables write in its place."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _names(values: Mapping[str, Any]) -> str:
    return ", ".join(str(name) for name in values) or "none"


def _advice(values: Mapping[str, Any]) -> str:
    """Which column is likely meant, with the key that says so."""
    plain = {str(name).strip().lower(): str(name) for name in values}
    for ours in ("prompt", "messages"):
        if ours in plain and plain[ours] != ours:
            return f"name the column with prompts.columns={{{ours}: {plain[ours]}}}"
        for name, value in values.items():
            if isinstance(value, Mapping) and not is_missing(value.get(ours)):
                return f"name the column with prompts.columns={{{ours}: {name}.{ours}}}"
    for likely in _LIKELY:
        if isinstance(values.get(plain.get(likely, "")), str):
            return f"name the column with prompts.columns, for example prompts.columns={{prompt: {plain[likely]}}}"
    if any(str(name).rstrip().endswith(("?", ".", ":")) and len(str(name).split()) > 3 for name in values):
        return "the first line of a CSV names the columns, and this one looks like a row; add a line of names"
    return "name the column with prompts.columns"


# --- conversations ---------------------------------------------------------------------------------------------------


def as_messages(value: Any, name: str, *, text_is_prompt: bool, named: bool) -> list[Message]:
    """A prompt's text, or a conversation in any of the forms that public data sets have."""
    if isinstance(value, str) and text_is_prompt:
        if not named:
            _refuse_disguised(value, name)
        return [{"role": "user", "content": check_text(value, f"`{name}`")}]
    if isinstance(value, str):  # CSV has no lists
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as e:
            raise BadRowError(f"`{name}` is text that is not JSON; give a list of {{role, content}}") from e
    if isinstance(value, Mapping):
        value = _turns_of_object(value, name)
    if not isinstance(value, list | tuple):
        wanted = "a prompt is text" if text_is_prompt else "give a list of {role, content}, the last one by the user"
        raise BadRowError(f"`{name}` is {in_words(value)}; {wanted}")
    if not value:
        raise BadRowError(f"`{name}` is empty; give a list of {{role, content}}, the last one by the user", "empty")
    if text_is_prompt and all(isinstance(turn, str) for turn in value):
        raise BadRowError(
            f"`{name}` is a list of texts; a prompt is text or a list of {{role, content}}: its first text is "
            f"read with prompts.columns={{prompt: {name}.0}}"
        )
    return [_message(turn, number, f"`{name}`[{number}]") for number, turn in enumerate(value)]


def _refuse_disguised(text: str, name: str) -> None:
    """Text that holds a conversation in another form; who means it as text names the column."""
    as_text = f"; if it is meant as text, say prompts.columns={{prompt: {name}}}"
    if text.startswith("\n\nHuman:"):
        raise BadRowError(
            f"`{name}` is a transcript (HH-RLHF's «Human: … Assistant: …»); turn it into `messages`{as_text}"
        )
    if text.lstrip().startswith("[") and '"role"' in text and '"content"' in text:
        try:
            turns = json.loads(text)
        except (ValueError, RecursionError):
            return
        if turns and all(isinstance(turn, Mapping) and {"role", "content"} <= turn.keys() for turn in turns):
            raise BadRowError(
                f"`{name}` is a list of messages written as text; read it with prompts.columns={{messages: {name}}}"
                f"{as_text}"
            )


def _turns_of_object(value: Mapping[str, Any], name: str) -> Any:
    """One message, or a struct of lists as Parquet writers make of a list of structs."""
    for role, content in _TURN_KEYS:
        if role in value and content in value:
            roles, contents = value[role], value[content]
            if isinstance(roles, str):
                return [value]
            if isinstance(roles, list | tuple) and isinstance(contents, list | tuple) and len(roles) == len(contents):
                return [{role: r, content: c} for r, c in zip(roles, contents, strict=True)]
            raise BadRowError(f"`{name}` holds {role!r} and {content!r} of different lengths")
    inner = [str(key) for key, part in value.items() if isinstance(part, str | list)]
    fix = f"; name the part with prompts.columns={{prompt: {name}.{inner[0]}}}" if inner else ""
    raise BadRowError(f"`{name}` is an object with the keys {_names(value)}; a prompt is text{fix}")


def _message(value: Any, position: int, name: str) -> Message:
    keys = next((k for k in _TURN_KEYS if isinstance(value, Mapping) and k[0] in value and k[1] in value), None)
    if keys is None:
        raise BadRowError(f"{name} is not an object with `role` and `content`")
    extra = sorted(str(key) for key in value if key not in keys and key not in _BESIDE and not _is_empty(value[key]))
    if extra:
        raise BadRowError(f"{name} has the key {extra[0]!r}; only `role` and `content` are read, remove it")
    role = value[keys[0]]
    if keys[0] == "from" and isinstance(role, str):
        role = _SPEAKERS.get(role.lower(), role)
    if role not in ROLES:
        known = ROLES if keys[0] == "role" else tuple(_SPEAKERS)
        raise BadRowError(f"{name} has the role {role!r}; a role is one of {', '.join(known)}")
    if role == "system" and position > 0:
        raise BadRowError(f"{name} has the role 'system'; a system message may only come first")
    return {"role": role, "content": _content(value[keys[1]], name)}


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, list | dict | str) and not value)


def _content(value: Any, name: str) -> str:
    """Text, or the joined texts of content parts. Raises: BadRowError for images, audio and the like, by name."""
    if not isinstance(value, list | tuple) or not value or not all(isinstance(part, Mapping) for part in value):
        return check_text(value, name)
    texts = []
    for number, part in enumerate(value):
        kind = part.get("type") or ("text" if isinstance(part.get("text"), str) else next(iter(part), "nothing"))
        if kind not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
            raise BadRowError(f"{name} holds {str(kind)!r} (part {number + 1}); only text is read, leave such rows out")
        texts.append(part["text"])
    return check_text("\n".join(texts), name)


def check_text(value: Any, name: str, what: str = "a prompt") -> str:
    if not isinstance(value, str):
        raise BadRowError(f"{name} is {in_words(value)}; {what} is text")
    if not value.strip():
        raise BadRowError(f"{name} is empty; give it a text or remove the row", "empty")
    return encodable(value, name)


def encodable(text: str, name: str) -> str:
    """The text itself. Lone surrogates come from bytes that are not UTF-8, or from half of an escaped pair in JSON."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise BadRowError(f"{name} is not valid Unicode (character {e.start + 1}); save the file as UTF-8") from e
    return text


def messages_digest(messages: Sequence[Mapping[str, str]]) -> bytes:
    """A hash (16 bytes) of roles and contents, the same on every machine."""
    canonical = json.dumps([[m["role"], m["content"]] for m in messages], ensure_ascii=False, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode(), digest_size=16).digest()


def in_words(value: object) -> str:
    """What kind of value this is, in the words of data files."""
    if value is None:
        return "null"
    for kinds, words in (
        (bool, "true or false"),
        (int, "a whole number"),
        (float, "a number"),
        (str, "text"),
        (bytes, "bytes"),
        (Mapping, "an object"),
        ((list, tuple), "a list"),
    ):
        if isinstance(value, kinds):
            return words
    return f"a value of the kind {type(value).__name__}"


# --- the tables ------------------------------------------------------------------------------------------------------


def _read_conversation(values: MutableMapping[str, Any], column: str) -> list[Message]:
    """ShareGPT: `conversations` of {from, value}; LMSYS and WildChat: `conversation` of {role, content}."""
    messages = as_messages(values.pop(column), column, text_is_prompt=False, named=False)
    return _with_system(values, messages)


def _read_alpaca(values: MutableMapping[str, Any], column: str) -> list[Message]:
    """Alpaca and Dolly: `instruction` with `input` or `context` below it, after `history` where there is one."""
    text = check_text(values.pop(column), f"`{column}`")
    beside = next(
        (key for key in ("input", "context") if isinstance(values.get(key), str) and values[key].strip()), None
    )
    if beside:
        text = f"{text}\n{check_text(values.pop(beside), f'`{beside}`')}"
    earlier: list[Message] = []
    for number, turn in enumerate(values.pop("history", None) or []):
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise BadRowError(f"`history`[{number}] is not a list of a question and its answer")
        earlier += [
            {"role": role, "content": check_text(said, f"`history`[{number}]")}
            for role, said in zip(("user", "assistant"), turn, strict=True)
        ]
    return _with_system(values, [*earlier, {"role": "user", "content": text}])


def _with_system(values: MutableMapping[str, Any], messages: list[Message]) -> list[Message]:
    system = values.get("system")
    if not isinstance(system, str) or not system.strip() or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": check_text(values.pop("system"), "`system`")}, *messages]


FORMS = (
    Form("conversations", _read_conversation),
    Form("conversation", _read_conversation),
    Form("instruction", _read_alpaca),
)


def _starts(column: str, start: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda values: isinstance(values.get(column), str) and values[column].lstrip().startswith(start)


def _is_list(column: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda values: isinstance(values.get(column), list | tuple)


TOLD: tuple[tuple[Callable[[Mapping[str, Any]], bool], str], ...] = (
    (
        _starts("chosen", "Human:"),
        "has no prompt: these are transcripts («Human: … Assistant: …») in `chosen` and `rejected`, as in HH-RLHF; "
        "turn them into `messages`",
    ),
    (
        _is_list("chosen"),
        "has no prompt: these are preference pairs of conversations; their prompts are read with "
        "prompts.columns={messages: chosen} prompts.last_answer=drop",
    ),
    (
        _is_list("turns"),
        "has no prompt: these are questions in `turns`, as in MT-Bench; the first of each is read with "
        "prompts.columns={prompt: turns.0}",
    ),
    (
        lambda values: _starts("text", "### Human")(values) or _starts("text", "<|im_start|>")(values),
        "has no prompt: `text` is a conversation rendered by a template; give its turns as `messages`",
    ),
)
