"""What a key of the config takes, read off the pydantic models: its kind, in words and for reading YAML.

Pure functions of annotations; no files.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, create_model

from spa_ray.config.models import Config
from spa_ray.config.training import method_class
from spa_ray.config.yaml_text import Plain
from spa_ray.errors import InputError

_WORDS = {
    date: "a day, YYYY-MM-DD",
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    type(None): "null",
}
_MANY = {str: "texts", int: "whole numbers", float: "numbers"}
_COUNTS = {2: "two", 3: "three"}


def members(annotation: Any) -> list[Any]:
    """The alternatives of an annotation; one for what is no union."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return members(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [inner for member in get_args(annotation) for inner in members(member)]
    return [annotation]


def is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def below(annotation: Any, part: str | int) -> Any:
    """What the key or the index `part` inside a value of this kind takes; `Any` where that is not known."""
    for member in members(annotation):
        inner = get_args(member)
        if is_section(member):
            if part in member.model_fields:
                return member.model_fields[part].annotation
        elif get_origin(member) is dict:
            return inner[1]
        elif get_origin(member) in (tuple, list) and str(part).isdigit():
            fixed = get_origin(member) is tuple and inner[-1] is not Ellipsis
            return inner[min(int(part), len(inner) - 1)] if fixed else inner[0]
    return Any


def annotation_at(path: Sequence[str], root: type[BaseModel] = Config) -> Any:
    """What the dotted key takes, in an arm too (`arms.NAME.train.lr`); `root` may be `config_of` a method."""
    if len(path) > 2 and path[0] == "arms":
        return annotation_at(path[2:], root)
    found: Any = root
    for part in path:
        found = below(found, part)
    return found


def known_keys(path: Sequence[str], root: type[BaseModel] = Config) -> list[str]:
    """The keys that a section at `path` knows; empty when there is no such section."""
    return [key for m in members(annotation_at(path, root)) if is_section(m) for key in m.model_fields]


def config_of(method: object) -> type[Config]:
    """`Config` with the `train` section of this method, whose own keys it knows; as it is for an unknown method."""
    try:
        section = method_class(str(method)).Config
    except InputError:
        return Config
    return create_model("Config", __base__=Config, train=(section, ...))


def takes_text(annotation: Any) -> bool:
    """Whether a scalar that is given for it is meant as text: it takes text or named words, and no number or flag."""
    kinds = members(annotation)
    text = [kind is str or (get_origin(kind) is Literal and isinstance(get_args(kind)[0], str)) for kind in kinds]
    return any(text) and not any(kind in (Any, int, float, bool) for kind in kinds)


def takes_structure(annotation: Any) -> bool:
    return any(
        kind is Any or is_section(kind) or get_origin(kind) in (tuple, list, dict) for kind in members(annotation)
    )


def settle(tree: Any, path: Sequence[str] = (), kind_of: Callable[[Sequence[str]], Any] = annotation_at) -> Any:
    """The tree at `path` with every `Plain` scalar decided: its text where the key takes text, else its value."""
    if isinstance(tree, Mapping):
        in_arm = len(path) > 1 and path[0] == "arms"  # whose keys are dotted
        return {k: settle(v, [*path, *(k.split(".") if in_arm else [k])], kind_of) for k, v in tree.items()}
    if isinstance(tree, list):
        return [settle(value, [*path, str(number)], kind_of) for number, value in enumerate(tree)]
    if not isinstance(tree, Plain):
        return tree
    annotation = kind_of(path)
    kinds = members(annotation)
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    if takes_text(annotation) or tree.text in words:
        return tree.text
    flag_for_number = isinstance(tree.value, bool) and not any(kind in (Any, bool) for kind in kinds)
    return tree.text if flag_for_number and not takes_structure(annotation) else tree.value


def describe(annotation: Any) -> str:
    """What the key takes, in words: «a whole number or null», «a list of texts»."""
    kinds = members(annotation)
    return " or ".join(dict.fromkeys(_describe(kind) for kind in sorted(kinds, key=lambda kind: kind is type(None))))


def _describe(kind: Any) -> str:
    inner = get_args(kind)
    if kind in _WORDS:
        return _WORDS[kind]
    if get_origin(kind) is Literal:
        return f"one of {', '.join(str(word) for word in inner)}" if len(inner) > 1 else str(inner[0])
    if get_origin(kind) in (tuple, list):
        fixed = get_origin(kind) is tuple and inner[-1] is not Ellipsis
        entry = _MANY.get(inner[0], f"entries, each {describe(inner[0])}")
        return f"a list of {_COUNTS.get(len(inner), len(inner))} {entry}" if fixed else f"a list of {entry}"
    return "a mapping of keys to values"
