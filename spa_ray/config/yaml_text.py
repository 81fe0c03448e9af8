"""YAML as the author of a config means it.

A key that occurs twice is refused. An unquoted scalar that YAML reads as something else than text (`no`, `2026-11-25`,
`0123456`) keeps its text beside its value, so that a key that takes text gets the text (`kinds.settle`). Numbers are
those of YAML 1.2: `1e-6` is a number, `12:30` and a date are text, `010` is ten.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import yaml

LARGEST = 100_000  # values of one document, repetitions by alias included
DEEPEST = 50  # mappings and lists inside each other

_TRUE = frozenset({"yes", "true", "on"})
_SCALARS = (
    ("bool", r"(?:yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF)", "yYnNtTfFoO"),
    ("int", r"[-+]?(?:0x[0-9a-fA-F]+|0o[0-7]+|[0-9]+(?:_[0-9]+)*)", "-+0123456789"),
    (
        "float",
        r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:_[0-9]+)*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))",
        "-+0123456789.",
    ),
    ("merge", r"<<", "<"),
    ("null", r"(?:~|null|Null|NULL|)", ["~", "n", "N", ""]),
)


@dataclass(frozen=True)
class Plain:
    """An unquoted scalar that is no text by YAML's rules: what it reads as, and how it is written."""

    value: Any
    text: str


class YamlFaultError(Exception):
    """The text is no YAML that a config can be read from. `line` counts from 1."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.line = line


def read_plain(text: str) -> Any:
    """The document's mappings, lists and scalars; what is not text is `Plain`, keys are their text.

    Raises: YamlFaultError.
    """
    try:
        tree = _Loader(text).get_single_data()
        _bounded(tree, [0], 0)
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        raise YamlFaultError(_reason(e), None if mark is None else mark.line + 1) from e
    except yaml.YAMLError as e:
        raise YamlFaultError("a character that YAML does not allow") from e
    except RecursionError as e:
        raise YamlFaultError("nested too deeply") from e
    except (ValueError, OverflowError) as e:  # an explicit tag on a value that it does not fit
        raise YamlFaultError("a value does not fit its tag") from e
    return tree


def _reason(error: yaml.MarkedYAMLError) -> str:
    problem = str(error.problem or "syntax error")
    if "'\\t'" in problem:
        return "a tab; YAML is indented with blanks"
    return problem


def _bounded(tree: Any, seen: list[int], depth: int) -> None:
    """Raises: YamlFaultError for a document that aliases blow up, or that contains itself."""
    seen[0] += 1
    if seen[0] > LARGEST:
        raise YamlFaultError(f"more than {LARGEST:,} values, repetitions by alias included")
    if depth > DEEPEST:
        raise YamlFaultError("nested too deeply")
    for inner in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        _bounded(inner, seen, depth + 1)


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Checked here, before merge keys are resolved: a key of its own may repeat one that is merged in."""
        node = super().compose_mapping_node(anchor)
        first: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key is text", problem_mark=key.start_mark)
            line = key.start_mark.line + 1
            if key.value in first:
                told = f"the key {key.value!r} occurs twice, first in line {first[key.value]}; remove one"
                raise yaml.MarkedYAMLError(problem=told, problem_mark=key.start_mark)
            first[key.value] = line
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        self.flatten_mapping(node)
        return {key.value: self.construct_object(value, deep=deep) for key, value in node.value}


def _scalar(kind: str) -> Any:
    def construct(loader: _Loader, node: yaml.ScalarNode) -> Any:
        text = str(loader.construct_scalar(node))
        value: Any
        if kind == "bool":
            value = text.lower() in _TRUE
        elif kind == "int":
            digits = text.replace("_", "")
            value = int(digits, 0) if digits.lstrip("+-")[:2] in {"0x", "0o"} else int(digits)
        else:
            value = float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))
        return Plain(value, text) if node.style is None else value

    return construct


_Loader.yaml_implicit_resolvers = {}  # none of YAML 1.1's
for _kind, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^{_pattern}$"), list(_first))
    if _kind in {"bool", "int", "float"}:
        _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _scalar(_kind))
