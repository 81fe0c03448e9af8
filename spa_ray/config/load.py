"""From a YAML file, a profile, arms and `key=value` overrides to validated `Config`s, one an arm.

Order of precedence, weakest first: model defaults, profile, file, command-line overrides, arm overrides (an arm's own
`profile` replaces the run's). Every mistake is an `InputError` of one line that names the file and the key.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from spa_ray.config.models import PROFILES, Config
from spa_ray.errors import InputError

Raw = dict[str, Any]


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> dict[str, Config]:
    """Read a config file.

    Returns: arm name -> that arm's config, in the file's order.
    Raises: InputError naming the file and the key.
    """
    path = Path(path)
    return arm_configs(read_yaml(path), overrides, where=str(path), stem=path.stem)


def read_yaml(path: Path) -> Raw:
    """Read a YAML mapping. Raises: InputError when there is no such file or it is not a mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror}); give the path of a YAML config") from e
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: not UTF-8 text; give the path of a YAML config") from e
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise InputError(f"{path}{line}: not YAML ({getattr(e, 'problem', None) or 'syntax error'})") from e
    if not isinstance(raw, dict):
        raise InputError(f"{path}: a config is a mapping of keys to values, this is a {type(raw).__name__}")
    return raw


def arm_configs(raw: Mapping[str, Any], overrides: Iterable[str], *, where: str, stem: str) -> dict[str, Config]:
    """Validate the merged mapping once for every arm. Raises: InputError."""
    base: Raw = {"name": stem, **raw}
    for text in overrides:
        key, value = parse_override(text)
        set_dotted(base, key, value, where=text)
    base.setdefault("run_dir", f"runs/{base['name']}")
    arms = base.get("arms") or {"main": {}}
    if not isinstance(arms, dict) or not all(isinstance(v, dict | None) for v in arms.values()):
        raise InputError(f"{where}: arms: must map a name to overrides, for example {{sft: {{train.method: sft}}}}")
    base["arms"] = {str(name): changes or {} for name, changes in arms.items()}
    return {name: _validate(_with_arm(base, changes, where), where, name) for name, changes in base["arms"].items()}


def _with_arm(base: Raw, changes: Raw, where: str) -> Raw:
    merged = _copy(base)
    for key, value in changes.items():
        if key.split(".")[0] in {"arms", "name", "run_dir"}:
            raise InputError(f"{where}: arms: {key!r} belongs to the run and cannot differ between arms")
        set_dotted(merged, key, value, where=f"{where}: arms")
    profile = merged.get("profile", "paper")
    if profile not in PROFILES:
        raise InputError(f"{where}: profile: {profile!r} is unknown; one of {', '.join(PROFILES)}")
    return _merge(PROFILES[profile], merged)


def parse_override(text: str) -> tuple[str, Any]:
    """Split `a.b=value`; the value is read as YAML. Raises: InputError."""
    key, sep, value = text.partition("=")
    if not sep or not key.strip():
        raise InputError(f"{text!r}: an override is written key=value, for example sampling.n=4")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError as e:
        raise InputError(f"{text!r}: the value is not YAML") from e


def set_dotted(tree: Raw, key: str, value: Any, *, where: str) -> None:
    """Set `a.b.c` in a nested dict, making the dicts on the way. Raises: InputError when a value is in the way."""
    *path, last = key.split(".")
    for depth, part in enumerate(path):
        below = tree.get(part)
        if below is None:
            below = {}
        if not isinstance(below, dict):
            raise InputError(f"{where}: {'.'.join(path[: depth + 1])} is a value, not a section")
        tree[part] = below = dict(below)
        tree = below
    tree[last] = value


def _merge(weak: Mapping[str, Any], strong: Mapping[str, Any]) -> Raw:
    out = dict(weak)
    for key, value in strong.items():
        mine = out.get(key)
        out[key] = _merge(mine, value) if isinstance(mine, dict) and isinstance(value, dict) else value
    return out


def _copy(tree: Any) -> Any:
    return {k: _copy(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


def _validate(raw: Raw, where: str, arm: str) -> Config:
    try:
        return Config.model_validate(raw)
    except ValidationError as e:
        first = e.errors()[0]
        loc = [str(part) for part in first["loc"]]
        of_arm = "" if arm == "main" else f" (arm {arm})"
        raise InputError(f"{where}{of_arm}: {_explain(first, loc)}") from e


def _explain(error: Mapping[str, Any], loc: list[str]) -> str:
    key = ".".join(loc)
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(loc[-1], known_keys(loc[:-1]), n=1, cutoff=0.5)
        mend = (
            f"; did you mean {'.'.join([*loc[:-1], near[0]])}?"
            if near
            else f"; known here: {', '.join(known_keys(loc[:-1]))}"
        )
        return f"{key}: unknown key{mend}"
    if error["type"] == "missing":
        return f"{key}: missing; give it a value"
    message = error["msg"].removeprefix("Value error, ")
    given = error.get("input")
    shown = "" if isinstance(given, dict) or error["type"] == "value_error" else f", got {given!r}"
    return f"{key}: {message}{shown}" if key else f"{message}{shown}"


def known_keys(path: list[str]) -> list[str]:
    """The keys that a section at `path` knows; empty when there is no such section."""
    model: type[BaseModel] | None = Config
    for part in path:
        info = model.model_fields.get(part) if model else None
        if info is None:  # an entry of a mapping of sections (evaluation.families.NAME): the section stays
            continue
        model = _section_of(info.annotation)
    return list(model.model_fields) if model else []


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _section_of(inner)
        if found:
            return found
    return None
