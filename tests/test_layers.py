"""The house's order: which room may import which, and what stays out of a room (docs: the rooms' table in DESIGN).

Imports are read from the source with `ast`, those inside functions included, so no module has to run.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "spa_ray"

# A room imports only from rooms that stand before it, and from itself.
ROOMS = (
    "errors",
    "logs",
    "config",
    "storage",
    "objectives",
    "data",
    "engine",
    "rollout",
    "generation",
    "preferences",
    "training",
    "methods",
    "steering",
    "evaluation",
    "microworld",
    "pipeline",
    "report",
    "api",
    "cli",
)
MODELS = {"torch", "transformers", "vllm", "deepspeed", "peft"}
BARRED = {  # room -> what never enters it although the order would allow it
    "errors": MODELS | {"ray"},
    "logs": MODELS,
    "config": MODELS | {"ray"},
    "objectives": MODELS | {"ray"},
    "storage": MODELS,
    "data": MODELS,
    "engine": {"spa_ray.objectives", "deepspeed", "peft"},
    "rollout": {"ray", "torch", "deepspeed", "peft", "spa_ray.engine", "spa_ray.objectives"},
    "preferences": MODELS | {"ray", "spa_ray.engine", "spa_ray.rollout", "spa_ray.generation"},
    "training": {"spa_ray.engine", "spa_ray.generation"},
    "evaluation": {"spa_ray.training", "deepspeed"},
}
ONLY_IN = {"vllm": "engine", "spa_ray.microworld": "microworld"}
HEAVY = {"torch", "ray", "vllm", "transformers", "deepspeed", "peft", "datasets", "trl", "matplotlib"}

MODULES = {
    ".".join(("spa_ray", *path.relative_to(PACKAGE).with_suffix("").parts)): path for path in PACKAGE.rglob("*.py")
}


def imports(source: str, module: str) -> set[str]:
    """Full names of all that a module's source imports; `from a import b` counts as both `a` and `a.b`."""
    package = module.removesuffix(".__init__").split(".") if module.endswith(".__init__") else module.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            found |= {origin, *(f"{origin}.{alias.name}" for alias in node.names)}
    return found


def room_of(module: str) -> str:
    """`spa_ray.data.readers` is in `data`; `spa_ray` itself in none, which is the empty string."""
    parts = module.removesuffix(".__init__").split(".")
    return parts[1] if len(parts) > 1 else ""


def violations(source: str, module: str) -> list[str]:
    """What a module imports and may not, one line each."""
    room = room_of(module)
    found = []
    for name in sorted(imports(source, module)):
        wall = [bar for bar in BARRED.get(room, ()) if under(name, [bar])]
        owner = [home for bar, home in ONLY_IN.items() if under(name, [bar]) and home != room]
        other = room_of(name) if under(name, ["spa_ray"]) else ""
        if room and other in ROOMS and room not in ROOMS[ROOMS.index(other) :]:  # the public API is of all rooms
            found.append(f"{module} imports {name}, which comes after the room {room!r}")
        elif wall or owner:
            found.append(f"{module} imports {name}, which never enters the room {room!r}")
    return found


def under(name: str, roots: Iterable[str]) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in roots)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_what_its_room_may(module: str) -> None:
    assert violations(MODULES[module].read_text(encoding="utf-8"), module) == []


def test_every_module_is_in_a_room_of_the_design() -> None:
    assert {room_of(module) for module in MODULES} - {""} <= set(ROOMS)


def test_prompts_of_the_microworld_do_not_know_the_oracle() -> None:
    """Training reads its prompts through these modules; the oracle's verdict may not leak into them."""
    for name in ("grammar", "prompts", "utility"):
        module = f"spa_ray.microworld.{name}"
        assert not any(under(i, ["spa_ray.microworld.oracle"]) for i in imports(MODULES[module].read_text(), module))


def test_only_the_command_line_names_the_microworld_by_dotted_path() -> None:
    dotted = re.compile(r"spa_ray\.microworld[\w.]*(:\w+)?")
    naming = {
        room_of(module)
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and dotted.fullmatch(node.value)
    }
    assert naming <= {"microworld", "cli"}


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("import spa_ray.training.losses", "spa_ray.generation.episode"),
        ("from spa_ray import data", "spa_ray.config.load"),
        ("from ..training import losses", "spa_ray.preferences.pairing"),
        ("from . import x\ndef f():\n    from vllm import LLM", "spa_ray.training.loop"),
        ("import torch.nn", "spa_ray.preferences.pairing"),
        ("import ray", "spa_ray.preferences"),
        ("from spa_ray.microworld import oracle", "spa_ray.pipeline.stages"),
        ("import spa_ray.microworld.oracle", "spa_ray.evaluation.judges"),
        ("from spa_ray.training import export", "spa_ray.evaluation.judges"),
        ("from spa_ray.cli.main import app", "spa_ray.errors"),
    ],
)
def test_a_forbidden_import_is_seen(source: str, module: str) -> None:
    assert violations(source, module)


def test_allowed_imports_are_let_through() -> None:
    source = "import os\nfrom spa_ray.errors import InputError\nfrom .scores import grid\nimport numpy"
    assert violations(source, "spa_ray.preferences.pairing") == []


def test_the_command_line_starts_without_heavy_libraries() -> None:
    code = "import sys, spa_ray.cli.main; print(*(m for m in sys.modules if '.' not in m))"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert HEAVY & set(done.stdout.split()) == set()
