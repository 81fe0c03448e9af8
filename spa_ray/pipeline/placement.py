"""Whether a cluster can hold what a run asks for: pure arithmetic over its nodes and the node types that it may add.

Comes in: nodes, node types, demands (so many equal bundles, each on one node). Goes out: what is missing, and whether
it may still come. Never: Ray. All bundles of a demand are equal, so counting what fits node by node is exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from spa_ray.config.models import Config
from spa_ray.engine.placement import engine_cpus
from spa_ray.errors import InputError

Bundle = Mapping[str, float]
ENGINES = "the engines"
DATA_CPUS = 3  # beside the engines: a reader, a writer, and what filters the rows of an earlier start
EPSILON = 1e-6


@dataclass(frozen=True)
class Node:
    """A node that is there: its id, address, resources in all, and the name of its type where it has one."""

    node_id: str
    address: str
    resources: Bundle
    type: str | None = None


@dataclass(frozen=True)
class NodeType:
    """A kind of node that an autoscaler may add, up to `limit` at once. `resources` None: not known."""

    name: str
    resources: Bundle | None
    limit: float = math.inf


@dataclass(frozen=True)
class Cluster:
    """`types` None: nobody adds nodes. `most` is the number of nodes that may be added in all."""

    nodes: Sequence[Node]
    types: Sequence[NodeType] | None = None
    most: float = math.inf


@dataclass(frozen=True)
class Demand:
    """`count` bundles, each whole on one node. `spare`: further CPUs, without which the work would wait for ever."""

    what: str
    keys: str  # of the config, that ask for it
    bundle: Bundle
    count: int
    spare: int = 0
    comfortable: int = 0  # further CPUs below which it may wait
    why: str = ""  # it is asked for in this way


@dataclass(frozen=True)
class Verdict:
    """`fits`: held now. `may_come`: not held now, and an autoscaler may bring it. `never`: refused. `text` says why."""

    kind: Literal["fits", "may_come", "never"]
    text: str = ""


def demands(
    config: Config, *, engine_gpus: float, worker_gpus: float, stages: Iterable[str], one_node: bool = False
) -> list[Demand]:
    """What the stages ask for, in the order in which they run. Engines and training never run at the same time.

    `one_node`: all ranks of a training share a node, as they do for a run on an object store.
    """
    resources, wanted = config.resources, set(stages)
    found = []
    if wanted & {"generate", "evaluate"}:
        found.append(
            Demand(
                ENGINES,
                "resources.engines.min, gpus_per_engine, cpus_per_engine",
                _bundle(engine_cpus(resources), engine_gpus),
                resources.engines.min,
                spare=1,
                comfortable=DATA_CPUS,
            )
        )
    if "train" in wanted:
        ranks = resources.train_workers
        together = ranks if one_node else 1
        shared = "all ranks on one node, since the run is on an object store; a run_dir on a shared disk needs no such"
        found.append(
            Demand(
                "the training workers",
                "resources.train_workers, gpus_per_worker, cpus_per_worker",
                _bundle(together * resources.cpus_per_worker, together * worker_gpus),
                ranks // together,
                why=f" ({shared})" if together > 1 else "",
            )
        )
    return found


def _bundle(cpus: float, gpus: float) -> dict[str, float]:
    return {key: value for key, value in (("GPU", gpus), ("CPU", cpus)) if value}


def holds(resources: Bundle, bundle: Bundle) -> float:
    """How many of the bundle fit into these resources at once; infinite for an empty one."""
    return min(
        (math.floor(resources.get(key, 0.0) / size + EPSILON) for key, size in bundle.items()),
        default=math.inf,
    )


def held(nodes: Iterable[Node], demand: Demand) -> bool:
    """Whether the nodes hold the demand and its spare CPUs."""
    nodes = list(nodes)
    cpus = sum(node.resources.get("CPU", 0.0) for node in nodes)
    needed = demand.count * demand.bundle.get("CPU", 0.0) + demand.spare
    return sum(holds(node.resources, demand.bundle) for node in nodes) >= demand.count and cpus + EPSILON >= needed


def judge(cluster: Cluster, demand: Demand) -> Verdict:
    """Whether the demand is met, may be met, or never can be."""
    if held(cluster.nodes, demand):
        return Verdict("fits")
    text = _missing(cluster, demand)
    if cluster.types is None:
        return Verdict("never", f"{text}; change {demand.keys}, or give Ray more nodes")
    if any(kind.resources is None and kind.limit > 0 for kind in cluster.types) or not cluster.types:
        return Verdict("may_come", text)
    if held(_at_most(cluster, demand), demand):
        return Verdict("may_come", text)
    largest = ", ".join(f"{kind.limit:g} × {kind.name} of {show(kind.resources or {})}" for kind in cluster.types)
    return Verdict("never", f"{text}, and the autoscaler may add no more than {largest}; change {demand.keys}")


def _at_most(cluster: Cluster, demand: Demand) -> list[Node]:
    """The nodes if the autoscaler brought all that it may, those first that hold most of the demand's bundles.

    Nodes of a known type are among those that the type's limit counts.
    """
    types = [kind for kind in cluster.types or () if kind.resources is not None]
    names = {kind.name for kind in types}
    nodes = [node for node in cluster.nodes if node.type not in names]
    left = cluster.most
    for kind in sorted(types, key=lambda kind: -holds(kind.resources or {}, demand.bundle)):
        each = holds(kind.resources or {}, demand.bundle)
        wanted = demand.count if each else demand.spare  # nodes that hold none can still lend their CPUs
        count = int(min(kind.limit, left, wanted + demand.spare))
        nodes += [Node(f"{kind.name}-{i}", "", kind.resources or {}, kind.name) for i in range(count)]
        left -= count
    return nodes


def cramped(cluster: Cluster, demand: Demand) -> str | None:
    """A line where the demand is met but few CPUs are left beside it, None otherwise."""
    cpus = sum(node.resources.get("CPU", 0.0) for node in cluster.nodes)
    needed = demand.count * demand.bundle.get("CPU", 0.0) + demand.comfortable
    if not held(cluster.nodes, demand) or cpus + EPSILON >= needed:
        return None
    asked = f"{demand.what} ({demand.count} × {show(demand.bundle)})"
    return (
        f"{cpus:g} CPUs for {asked} and for reading, writing and filtering rows beside them: with fewer than "
        f"{needed:g} a pass may wait for itself; lower {demand.keys.split(', ')[0]}"
    )


def _missing(cluster: Cluster, demand: Demand) -> str:
    fit = sum(holds(node.resources, demand.bundle) for node in cluster.nodes)
    there = ", ".join(sorted({show(node.resources) for node in cluster.nodes})) or "no node"
    beside = f" and {demand.spare} CPU beside them" if demand.spare else ""
    nodes = f"{len(cluster.nodes)} node{'s' * (len(cluster.nodes) != 1)}: {there}"
    needed = f"{demand.count} × {show(demand.bundle)}{beside}, each on one node"
    needed += demand.why
    return f"{demand.what} need {needed}; {min(fit, demand.count):g} fit now ({nodes})"


def show(resources: Bundle) -> str:
    """`{GPU: 4, CPU: 1}`: what is asked for, or what of it a node has."""
    kept = [f"{key}: {resources[key]:g}" for key in ("GPU", "CPU") if resources.get(key)]
    return "{" + ", ".join(kept) + "}"


def refuse(verdicts: Iterable[Verdict]) -> None:
    """Raises: InputError for the first demand that can never be met."""
    for verdict in verdicts:
        if verdict.kind == "never":
            raise InputError(f"cluster: {verdict.text}")
