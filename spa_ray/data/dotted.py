"""Objects that a config names by dotted path, `package.module:name`.

Comes in: the text of a config key. Goes out: the object. Never: a guess at what the object is for.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

from spa_ray.errors import InputError

_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_dotted(text: str) -> bool:
    """Whether the text has the form `package.module:name`."""
    return _DOTTED.fullmatch(text) is not None


def source_of(text: str) -> Path | None:
    """The file of the module that a dotted path names; None where there is no such module, or no file of it."""
    _search_here()
    try:
        found = importlib.util.find_spec(text.partition(":")[0])
    except ModuleNotFoundError:
        return None
    return Path(found.origin) if found is not None and found.has_location and found.origin else None


def _search_here() -> None:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)


def load_dotted(text: str, *, where: str) -> Any:
    """The object at `package.module:name`; the working folder is searched last, for users' own modules.

    Raises: InputError when there is no such module, or no such name in it.
    """
    module_name, _, name = text.partition(":")
    _search_here()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as e:
        if e.name is None or not f"{module_name}.".startswith(f"{e.name}."):
            raise InputError(f"{where}: {text!r}: {module_name} needs the module {e.name}; install it") from e
        raise InputError(
            f"{where}: {text!r}: there is no module {e.name}; give it as package.module:name, "
            "importable or in the working folder"
        ) from e
    if not hasattr(module, name):
        raise InputError(f"{where}: {text!r}: the module {module_name} has no {name!r}")
    return getattr(module, name)
