"""What is wrong with a config, in one line and in the words of its author: keys, lists, mappings, numbers, text.

Takes pydantic's `ValidationError` for a `Config`. None of pydantic's own sentences come out, nor names of Python types.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError

from spa_ray.config.kinds import annotation_at, below, describe, is_section, known_keys, members
from spa_ray.config.models import Config
from spa_ray.config.section import Section

LONGEST_VALUE = 80  # characters of a value that a message quotes
_BOUNDS = {
    "greater_than": ("gt", "above {}"),
    "greater_than_equal": ("ge", "{} or more"),
    "less_than": ("lt", "below {}"),
    "less_than_equal": ("le", "{} or less"),
}


def explain(error: ValidationError, root: type[Section] = Config) -> str:
    """The first fault, and which other keys have one. `root`: `Config`, `config_of` a method, or a single section."""
    faults: dict[str, str] = {}
    for fault in error.errors(include_url=False):
        path = _path(fault["loc"], root)
        if fault["type"] == "missing" and isinstance(fault["loc"][-1], int):  # a list that is too short
            fault["type"], path = "tuple_type", path[:-1]
        if fault["type"] == "string_type" and isinstance(fault["input"], Mapping) and known_keys(path, root):
            continue  # of a key that takes text or a section: the section's own faults say more
        faults.setdefault(".".join(path), _one(fault, path, root))
    first, *rest = faults
    others = [key for key in rest if not f"{key}.".startswith(f"{first}.") and not f"{first}.".startswith(f"{key}.")]
    more = f" ({len(others)} more: {', '.join(_short(key) for key in others[:5])})" if others else ""
    return (f"{first}: {faults[first]}" if first else faults[first]) + more


def _path(loc: Sequence[str | int], root: type[Section]) -> list[str]:
    """The keys of a place, without the marks that pydantic sets for members of unions and for keys of mappings."""
    path: list[str] = []
    found: Any = root
    for part in loc:
        kinds = members(found)
        if tagged := [kind for kind in kinds if is_section(kind) and part in tags(kind)]:
            found = tagged[0]  # which member of a union of sections a fault is about
            continue
        known = any(is_section(kind) and part in kind.model_fields for kind in kinds)
        holder = any(get_origin(kind) is dict for kind in kinds) and part != "[key]"
        entry = isinstance(part, int) and any(get_origin(kind) in (tuple, list) for kind in kinds)
        sections_only = all(is_section(kind) or kind is type(None) for kind in kinds)
        unknown = sections_only and len([k for k in kinds if is_section(k)]) == 1 and part == loc[-1]
        if known or holder or entry or unknown:
            path.append(str(part))
            found = below(found, part)
    return path


def tags(section: Any) -> tuple[Any, ...]:
    """The values of the key that tells a section from others of a union."""
    return get_args(section.model_fields["kind"].annotation) if "kind" in section.model_fields else ()


def _one(fault: Mapping[str, Any], path: list[str], root: type[Section]) -> str:
    kind, context, given = fault["type"], fault.get("ctx", {}), fault.get("input")
    if kind == "extra_forbidden":
        return f"unknown key{_near_key(path, root)}"
    if kind == "missing":
        return "missing; give it a value"
    if kind in ("value_error", "assertion_error"):
        return str(fault["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if kind == "union_tag_invalid":
        return f"{context['discriminator'].strip(chr(39))} is {context['tag']!r}; one of {context['expected_tags']}"
    if kind == "union_tag_not_found":
        return f"{context['discriminator'].strip(chr(39))} is missing; give it one"
    taken = annotation_at(path, root)
    if fault["loc"] and fault["loc"][-1] == "[key]":
        known = [word for k in members(annotation_at(path[:-1], root)) for word in _key_words(k)]
        return f"unknown key; one of {', '.join(known)}{_near(path[-1], known)}"
    return f"must be {_wanted(kind, context, taken, given)}, got {shown(given)}"


def _wanted(kind: str, context: Mapping[str, Any], taken: Any, given: Any) -> str:
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        return f"{describe(taken)}, {words.format(f'{context[key]:g}')}"
    if kind in ("too_short", "too_long", "string_too_short", "string_too_long"):
        least = context.get("min_length")
        bound = f"at least {least}" if least is not None else f"at most {context.get('max_length')}"
        unit = "characters" if kind.startswith("string") else "entries"
        return f"{describe(taken)}, {bound} {unit if bound != 'at least 1' else unit.replace('ies', 'y').rstrip('s')}"
    if kind == "finite_number":
        return f"{describe(taken)}, and finite"
    choices = [word for k in members(taken) if get_origin(k) is Literal for word in get_args(k)]
    return describe(taken) + (_near(given, choices) if isinstance(given, str) else "")


def _near(given: object, words: Sequence[Any]) -> str:
    near = difflib.get_close_matches(str(given), [str(word) for word in words], n=1, cutoff=0.6)
    return f" (did you mean {near[0]}?)" if near else ""


def _near_key(path: list[str], root: type[Section]) -> str:
    known = known_keys(path[:-1], root)
    near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {'.'.join([*path[:-1], near[0]])}?"
    section, dot, rest = path[-1].partition(".")
    if dot and section in known:
        return f"; in a file it is written {section}: {{{rest}: …}}"
    return f"; known here: {', '.join(known)}"


def _key_words(kind: Any) -> list[str]:
    return [str(w) for k in members(get_args(kind)[0]) for w in get_args(k)] if get_origin(kind) is dict else []


def shown(value: object) -> str:
    """A value as it would be written in a config, cut where it is long."""
    if isinstance(value, str):
        text = repr(value)
    elif isinstance(value, float) and not math.isfinite(value):
        text = ".nan" if math.isnan(value) else f"{'-' if value < 0 else ''}.inf"
    elif isinstance(value, Mapping):
        text = "a mapping" if value else "an empty mapping"
    else:
        text = json.dumps(value, ensure_ascii=False, default=str)
    return _short(text)


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 1]}…"
