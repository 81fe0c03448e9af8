"""From a YAML file, a profile, arms and `key=value` overrides to validated `Config`s, one an arm.

Order of precedence, weakest first: model defaults, profile, file, command-line overrides, arm overrides (an arm's own
`profile` replaces the run's). A training method's `defaults` go before the profile, and of an arm that names the method
before the command line. A section that is given as a mapping changes the keys that it names and no other. Every
mistake is an `InputError` of one line that names the file and the key.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from spa_ray.config.faults import explain, shown
from spa_ray.config.kinds import annotation_at, config_of, is_section, settle, takes_structure, takes_text
from spa_ray.config.models import PROFILES, Config
from spa_ray.config.training import DEFAULT_METHOD, method_class
from spa_ray.config.yaml_text import YamlFaultError, read_plain
from spa_ray.errors import InputError

Raw = dict[str, Any]
Override = str | tuple[str, Any]  # key=value, or a key and the value itself

_NULL = frozenset({"", "~", "null", "Null", "NULL"})


def load_config(path: str | Path, overrides: Iterable[Override] = ()) -> dict[str, Config]:
    """Read a config file.

    Returns: arm name -> that arm's config, in the file's order.
    Raises: InputError naming the file and the key.
    """
    path = Path(path)
    return arm_configs(read_yaml(path), overrides, where=str(path), stem=path.stem)


def read_yaml(path: Path) -> Raw:
    """Read a YAML mapping; what an unquoted scalar means is decided by the key that it is given for.

    Raises: InputError when there is no such file, when it is no mapping, and when a key occurs twice.
    """
    try:
        data = Path(os.path.expanduser(path)).read_bytes()
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or e
        raise InputError(f"{path}: cannot be read ({reason}); give the path of a YAML config") from e
    return parse_yaml(data, where=str(path))


def parse_yaml(
    data: bytes, *, where: str, what: str = "config", kind_of: Callable[[Sequence[str]], Any] = annotation_at
) -> Raw:
    """A YAML mapping out of a file's bytes. Raises: InputError as `read_yaml`."""
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        raw = read_plain(data.decode(encoding))
    except UnicodeDecodeError as e:
        raise InputError(f"{where}: not UTF-8 text (byte {e.start + 1}); save the file as UTF-8") from e
    except YamlFaultError as e:
        line = f":{e.line}" if e.line else ""
        raise InputError(f"{where}{line}: not YAML ({e})") from e
    if not isinstance(raw, dict):
        kind = {list: "a list", str: "text", type(None): "empty"}.get(type(raw), "one value")
        raise InputError(f"{where}: a {what} is a mapping of keys to values, this is {kind}")
    tree: Raw = settle(raw, kind_of=kind_of)
    return tree


def arm_configs(raw: Mapping[str, Any], overrides: Iterable[Override], *, where: str, stem: str) -> dict[str, Config]:
    """Validate the merged mapping once for every arm. Raises: InputError."""
    base: Raw = {"name": stem, **raw}
    for override in overrides:
        key, value = parse_override(override) if isinstance(override, str) else override
        _apply(base, key, value, where=override if isinstance(override, str) else key)
    base.setdefault("run_dir", f"runs/{base['name']}")
    if base.get("merge") is not None:
        raise InputError(f"{where}: merge: belongs to one arm; write arms: {{soup: {{merge: {{of: {{..}}}}}}}}")
    arms = base.get("arms") or {"main": {}}
    if not isinstance(arms, dict) or not all(isinstance(v, dict | None) for v in arms.values()):
        raise InputError(f"{where}: arms: must map a name to overrides, for example {{sft: {{train.method: sft}}}}")
    base["arms"] = {str(name): changes or {} for name, changes in arms.items()}
    return {name: validated(_with_arm(base, name, where), where, name) for name in base["arms"]}


def _with_arm(base: Raw, arm: str, where: str) -> Raw:
    merged, changes = _copy(base), list(_leaves(base["arms"][arm]))
    given: set[str] = set()
    named = dict(changes).get("train.method")
    for key, value in _brought(named).items():
        set_dotted(merged, key, value, where=f"{where}: arms")
    for key, value in changes:
        if key.split(".")[0] in {"arms", "name", "run_dir", "budget"}:
            raise InputError(f"{where}: arms: {key!r} belongs to the run and cannot differ between arms")
        if key in given:
            raise InputError(f"{where}: arms: {arm}: the key {key!r} occurs twice; remove one")
        given.add(key)
        set_dotted(merged, key, value, where=f"{where}: arms")
    profile = merged.get("profile", "paper")
    if not isinstance(profile, str) or profile not in PROFILES:
        raise InputError(f"{where}: profile: {shown(profile)} is unknown; one of {', '.join(PROFILES)}")
    weak = _copy(PROFILES[profile])
    train = merged.get("train")
    for key, value in _brought(train.get("method") if isinstance(train, dict) and named is None else None).items():
        set_dotted(weak, key, value, where=f"{where}: train.method")
    return _merge(weak, merged)


def _brought(method: Any) -> Mapping[str, Any]:
    """The keys that a training method brings; none of a name that is none, which validation will say."""
    try:
        return getattr(method_class(method), "defaults", {}) if isinstance(method, str) else {}
    except InputError:
        return {}


def _leaves(changes: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of each change; a section that is given as a mapping counts as the keys in it."""
    for name, value in changes.items():
        key = f"{above}{name}"
        if isinstance(value, dict) and value and is_section(annotation_at(key.split("."))):
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value


def _apply(tree: Raw, key: str, value: Any, *, where: str) -> None:
    for inner, leaf in _leaves({key: value}):
        set_dotted(tree, inner, leaf, where=where)


def parse_override(text: str) -> tuple[str, Any]:
    """Split `a.b=value`. For a key that takes text the value is that text, unless it is null or in quotes; for any
    other it is read as YAML. Raises: InputError."""
    key, sep, value = text.partition("=")
    key = key.strip()
    if not sep or not key:
        raise InputError(f"{text!r}: an override is written key=value, for example sampling.n=4")
    annotation = annotation_at(key.split("."))
    if value.strip() in _NULL:
        return key, None
    if takes_text(annotation) and not _is_quoted(value) and not _opens_structure(value, annotation):
        return key, value
    try:
        return key, settle(read_plain(value), key.split("."))
    except YamlFaultError as e:
        if takes_text(annotation):
            return key, value
        raise InputError(f"{text!r}: the value is not YAML ({e})") from e


def _is_quoted(value: str) -> bool:
    bare = value.strip()
    return len(bare) > 1 and bare[0] == bare[-1] and bare[0] in "'\""


def _opens_structure(value: str, annotation: Any) -> bool:
    return value.lstrip()[:1] in {"[", "{"} and takes_structure(annotation)


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


def validated(raw: Raw, where: str, arm: str) -> Config:
    """The config of a tree of plain values. Raises: InputError for its first fault."""
    try:
        return Config.model_validate(raw)
    except ValidationError as e:
        of_arm = "" if arm == "main" else f" (arm {arm})"
        train = raw.get("train")
        root = config_of(train.get("method", DEFAULT_METHOD)) if isinstance(train, dict) else Config
        raise InputError(f"{where}{of_arm}: {explain(e, root)}") from e
