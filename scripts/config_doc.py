"""Write docs/CONFIG.md: every config key with its type, its default and its meaning, read off the pydantic models.

`python scripts/config_doc.py` writes the file; with `--check` it only says (exit status 1) that it is out of date.
"""

from __future__ import annotations

import datetime
import difflib
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from spa_ray.config.models import PROFILES, Config
from spa_ray.config.plugs import METHODS
from spa_ray.config.training import BY_METHOD, method_class

OUT = Path(__file__).parents[1] / "docs" / "CONFIG.md"

HOMES = {info.annotation: name for name, info in Config.model_fields.items()}

HEAD = """# Config keys

Written from `spa_ray/config/models.py` by `make docs`; do not edit.

A config is one YAML file. Every key can be given on the command line as `key=value` with dots (`sampling.n=4`).
Unknown keys are refused. What wins, weakest first: the defaults below, `profile`, the file, the command line, an
arm's own overrides. A method may bring keys of other sections (METHODS.md). `spa schema` prints the same as a JSON
schema.
"""


def render() -> str:
    """The whole document."""
    parts = [HEAD]
    for path, model in sections(Config, ""):
        of_kind = f", kind `{kind}`" if (kind := tag(model)) else ""
        title = f"## `{path}`{of_kind}" if path else "## The run"
        parts.append("\n\n".join(text for text in (title, first_paragraph(model), table(model)) if text) + "\n")
    parts.append(profiles())
    parts.append(method_defaults())
    return "\n".join(parts)


def sections(
    model: type[BaseModel], path: str, told: dict[type[BaseModel], str] | None = None
) -> Iterator[tuple[str, type[BaseModel]]]:
    """The model and those below it, each with its dotted path, in the order of the fields; each model once."""
    told = {} if told is None else told
    yield path, model
    for name, info in model.model_fields.items():
        for below in sections_of(info.annotation):
            if not is_known(below, model) and below not in told:
                told.update({below: path} if tag(below) else {})
                yield from sections(below, f"{path}.{name}".lstrip("."), told)


def is_known(section: type[BaseModel], parent: type[BaseModel]) -> bool:
    """Whether a section stands in the document under another key already (prompts, below evaluation)."""
    return parent is not Config and section in {section_of(i.annotation) for i in Config.model_fields.values()}


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The config section inside a type (`Lora | None`, `dict[str, Prompts]`), if there is one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(iter(sections_of(annotation)), None)


def sections_of(annotation: Any) -> list[type[BaseModel]]:
    """All config sections inside a type: several where a `kind` tells which."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for inner in get_args(annotation) for found in sections_of(inner)]


def tag(section: type[BaseModel]) -> str:
    """The `kind` of a section that has one."""
    return get_args(section.model_fields["kind"].annotation)[0] if "kind" in section.model_fields else ""


def table(model: type[BaseModel]) -> str:
    """One row a key."""
    rows = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, info in model.model_fields.items():
        below = section_of(info.annotation)
        like = f" (as `{HOMES[below]}`)" if below is not None and is_known(below, model) else ""
        kind = type_text(info.annotation) + bounds(info) + like
        cells = [f"`{name}`", kind, default_text(info), cell(info.description or "")]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def type_text(annotation: Any) -> str:
    """A type as a reader of YAML knows it."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " \\| ".join(f"`{yaml_text(value)}`" for value in inner)
    if origin is Annotated:
        return type_text(inner[0])
    if origin in (Union, types.UnionType):
        return " \\| ".join(dict.fromkeys(text for part in inner for text in type_text(part).split(" \\| ")))
    if origin is tuple:
        open_ended = len(inner) == 2 and inner[1] is Ellipsis
        return f"list of {type_text(inner[0])}" if open_ended else f"[{', '.join(map(type_text, inner))}]"
    if origin is dict:
        return f"mapping of {type_text(inner[0])} to {type_text(inner[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    names = {str: "text", int: "whole number", float: "number", bool: "true \\| false", type(None): "null", Any: "any"}
    names[datetime.date] = "date"
    return names[annotation]


def bounds(info: FieldInfo) -> str:
    """The limits of a value, for example ` (> 0, ≤ 1)`."""
    signs = {Ge: "≥ {0.ge}", Gt: "> {0.gt}", Le: "≤ {0.le}", Lt: "< {0.lt}", MinLen: "at least {0.min_length}"}
    found = [signs[type(limit)].format(limit) for limit in info.metadata if type(limit) in signs]
    return f" ({', '.join(found)})" if found else ""


def default_text(info: FieldInfo) -> str:
    default = info.get_default(call_default_factory=True, validated_data={})
    if default is PydanticUndefined:
        return "required"
    if isinstance(default, BaseModel):
        return "see below"
    return cell(f"`{yaml_text(default)}`")


def yaml_text(value: Any) -> str:
    value = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...")


def cell(text: str) -> str:
    return re.sub(r"(?<!\\)\|", r"\\|", text)


def first_paragraph(model: type[BaseModel]) -> str:
    """The class's docstring; none where it is the base's own."""
    return (model.__dict__.get("__doc__") or "").split("\n\n")[0].strip()


def profiles() -> str:
    rows = [f"| `{name}` | {dotted(change)} |" for name, change in PROFILES.items()]
    return "\n".join(["## Profiles", "", "| profile | changes these defaults |", "| --- | --- |", *rows, ""])


def dotted(change: dict[str, dict[str, Any]]) -> str:
    keys = [f"`{section}.{key}: {yaml_text(value)}`" for section, body in change.items() for key, value in body.items()]
    return ", ".join(keys) or "none"


def method_defaults() -> str:
    """What null means for β, γ and the learning rate."""
    keys = BY_METHOD
    defaults = {name: method_class(name).Config().model_dump() for name in METHODS}
    lines = ["## Defaults by `train.method`", "", f"| method | {' | '.join(f'`{k}`' for k in keys)} |"]
    lines.append("| --- |" + " --- |" * len(keys))
    lines += [f"| `{m}` | {' | '.join(f'{d[k]:g}' for k in keys)} |" for m, d in defaults.items()]
    return "\n".join([*lines, ""])


def main() -> int:
    text = render()
    if "--check" not in sys.argv[1:]:
        OUT.parent.mkdir(exist_ok=True)
        OUT.write_text(text, encoding="utf-8")
        return 0
    have = OUT.read_text(encoding="utf-8") if OUT.exists() else ""
    changed = list(difflib.unified_diff(have.splitlines(), text.splitlines(), lineterm="", n=0))
    if changed:
        print("docs/CONFIG.md is out of date, run `make docs`:", *changed, sep="\n")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
