"""Objectives in strict order of priority: what each asks for, in words a judge can weigh.

Comes in: a config's `objectives` and `constitution`. Goes out: frozen `Objective`s, highest priority first.
Never: models, prompts, scores.
"""

from __future__ import annotations

import difflib
import os
from importlib import resources
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from spa_ray.config.load import parse_yaml
from spa_ray.config.models import Config
from spa_ray.errors import InputError

PACKAGE = "package://"  # a file that comes with a package, as `model.path` has it


class Objective(BaseModel):
    """One objective: its name, the principle that the judge weighs, the rubric of its scale."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    principle: str
    rubric: str = ""
    threshold: float | None = None


def load_objectives(config: Config) -> tuple[Objective, ...]:
    """The config's objectives, in its order, with `pairs.thresholds` filled in.

    Raises: InputError for a constitution that cannot be read and for an objective that it does not define.
    """
    where, entries = _constitution(config.constitution)
    found = []
    for name in config.objectives:
        if name not in entries:
            near = difflib.get_close_matches(name, entries, n=1, cutoff=0.5)
            mend = f"did you mean {near[0]}?" if near else f"it defines {', '.join(entries)}"
            raise InputError(f"objectives: {where} defines no {name!r}; {mend}")
        try:
            found.append(Objective(name=name, threshold=config.pairs.thresholds.get(name), **entries[name]))
        except (ValidationError, TypeError) as e:
            raise InputError(f"{where}: {name}: give it a `principle` and, if you like, a `rubric`, both text") from e
    return tuple(found)


def _constitution(name: str) -> tuple[str, dict[str, dict[str, str]]]:
    built_in = resources.files("spa_ray.objectives").joinpath("constitutions", f"{name}.yaml")
    if name.startswith(PACKAGE):
        package, _, inside = name.removeprefix(PACKAGE).partition("/")
        built_in = resources.files(package).joinpath(inside)
    try:
        source = built_in if built_in.is_file() else Path(os.path.expanduser(name))
        data = source.read_bytes()
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or e
        raise InputError(
            f"constitution: {name!r} is neither built in (hhh, attributes) nor a readable YAML file ({reason})"
        ) from e
    entries = parse_yaml(data, where=f"constitution: {name}", what="constitution", kind_of=lambda _: str)
    if not all(isinstance(entry, dict) for entry in entries.values()):
        raise InputError(f"constitution: {name}: a constitution maps each objective's name to its principle and rubric")
    return f"the constitution {name!r}", entries
