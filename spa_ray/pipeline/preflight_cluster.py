"""What can be known to be wrong once Ray is there and before the first stage: GPUs, placement, CPUs, versions.

Comes in: the configs of a run, a connected Ray. Goes out: warnings, or `InputError` for what can never work, or
`RunError` for nodes that an autoscaler did not bring in time. Every wait has a deadline. Never: an engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from spa_ray.config.gpus import gpus_wanted
from spa_ray.config.models import Config
from spa_ray.engine.placement import engine_resources
from spa_ray.errors import InputError, RunError
from spa_ray.pipeline.manifest import versions
from spa_ray.pipeline.placement import (
    ENGINES,
    EPSILON,
    Cluster,
    Demand,
    Node,
    NodeType,
    Verdict,
    cramped,
    demands,
    held,
    holds,
    judge,
    refuse,
)
from spa_ray.pipeline.versions import NEEDED, compare, untested

ANSWER_SECONDS = 60.0  # for a node to say what is installed on it
POLL_SECONDS = 2.0
HEAD = "node:__internal_head__"
TYPE_LABEL = "ray.io/node-group"  # set by Ray on nodes that a launcher or an operator started
Say = Callable[[str], None]


def check_cluster(config: Config, *, stages: Iterable[str], say: Say, one_node: bool = False) -> None:
    """Everything here, in this order: can it ever fit, what is installed, is it there (waited for where it may come).

    `stages` are those that the run may come to; `one_node`: its training keeps all ranks on one node. Warnings go to
    `say`, a line each.
    Raises: InputError, RunError.
    """
    nodes = live_nodes()
    wanted = wanted_of(config, nodes, stages, one_node=one_node)
    cluster = Cluster(nodes)
    if not all(held(nodes, demand) for demand in wanted):
        cluster = Cluster(nodes, *autoscaler_types(nodes))
    verdicts = [judge(cluster, demand) for demand in wanted]
    refuse(verdicts)
    check_sensor(config, wanted, nodes)
    lines = check_versions(config, nodes, wanted)
    for line in [*lines, *filter(None, (cramped(cluster, demand) for demand in wanted))]:
        say(f"warning: {line}")
    # Only for what runs first: nodes that wait for their turn would cost money.
    if verdicts and verdicts[0].kind == "may_come":
        wait_for(wanted[0], verdicts[0], seconds=config.resources.node_wait_s, say=say)


def check_sensor(config: Config, wanted: Iterable[Demand], nodes: list[Node]) -> None:
    """Raises: InputError where the engines leave no GPU for what senses in front of them, and none may come."""
    share = config.resources.gpus_per_sensor
    taken = sum(demand.count * demand.bundle.get("GPU", 0.0) for demand in wanted if demand.what == ENGINES)
    total = sum(node.resources.get("GPU", 0.0) for node in nodes)
    if share and taken + share > total + EPSILON and autoscaler_types(nodes)[0] is None:
        raise InputError(
            f"resources.gpus_per_sensor is {share:g}, and the engines take {taken:g} of {total:g} GPUs; lower "
            "resources.gpus_per_engine (and model.engine_kwargs.gpu_memory_utilization), or engines.min"
        )


def wanted_of(config: Config, nodes: Iterable[Node], stages: Iterable[str], *, one_node: bool = False) -> list[Demand]:
    """The demands of the stages on these nodes, GPUs as the stages themselves would ask for them."""
    gpus = sum(node.resources.get("GPU", 0.0) for node in nodes)
    stages, engine, worker = set(stages), 0.0, 0.0
    if stages & {"generate", "evaluate"}:
        engine = engine_resources(config.model, config.resources, cluster_gpus=gpus).get("num_gpus", 0.0)
    if "train" in stages:
        worker = gpus_wanted(config.resources.gpus_per_worker, 1.0, cluster_gpus=gpus, key="resources.gpus_per_worker")
    return demands(config, engine_gpus=engine, worker_gpus=worker, stages=stages, one_node=one_node)


# --- what is there, and what may come ---------------------------------------------------------------------------------


def live_nodes() -> list[Node]:
    """The nodes that are alive."""
    import ray

    return [
        Node(raw["NodeID"], raw["NodeManagerAddress"], raw["Resources"], (raw.get("Labels") or {}).get(TYPE_LABEL))
        for raw in ray.nodes()
        if raw["Alive"]
    ]


def autoscaler_types(nodes: Iterable[Node]) -> tuple[list[NodeType] | None, float]:
    """Node types that may be added, and how many nodes in all; None where nobody adds any, no type where it is unknown.

    Looked for in this order: the cluster config in Ray's own store, which some platforms write; the config file that
    the autoscaler's process on the head was started with; the type label that launchers and operators put on nodes.
    """
    import ray

    nodes = list(nodes)
    stored = ray._private.state.state.get_cluster_config()
    if stored and stored.node_group_configs:
        head = {node.type for node in nodes if HEAD in node.resources}
        groups = [group for group in stored.node_group_configs if group.max_count and group.name not in head]
        limit = [float("inf") if group.max_count == -1 else float(group.max_count) for group in groups]
        types = [NodeType(g.name, dict(g.resources) or None, most) for g, most in zip(groups, limit, strict=True)]
        return types, float("inf")
    text = _ask_head(nodes)
    if text is not None:
        return types_of(yaml.safe_load(text))
    return ([] if any(node.type for node in nodes) else None), float("inf")


def types_of(config: Mapping[str, Any]) -> tuple[list[NodeType], float]:
    """The worker types of an autoscaler's config file. A type whose resources are left to the provider is unknown."""
    most = float(config.get("max_workers", 2))  # Ray's own default
    types = []
    for name, kind in config.get("available_node_types", {}).items():
        if name == config.get("head_node_type"):
            continue
        limit = float(kind.get("max_workers", most))
        if limit:
            types.append(NodeType(name, kind.get("resources") or None, min(limit, most)))
    return types, most


def _ask_head(nodes: list[Node]) -> str | None:
    """The autoscaler's config file as the head has it; None where no autoscaler runs there or the head is silent."""
    head = next((node for node in nodes if HEAD in node.resources), None)
    if head is None:
        return None
    answers, _ = _on_nodes(autoscaler_config, [head])
    return answers.get(head.node_id)


def autoscaler_config() -> str | None:
    """Run on the head: the text of the file that this Ray's autoscaler was started with, `{}` if it cannot be read."""
    import ray

    commands = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # a process that has ended meanwhile, or another user's
            commands.append(line.read_bytes().decode(errors="replace").split("\0"))
    file = monitor_file(commands, ray.get_runtime_context().gcs_address)
    if file is None:
        return None
    try:
        return Path(file).expanduser().read_text(encoding="utf-8")
    except OSError:
        return "{}"


def monitor_file(commands: Iterable[list[str]], gcs_address: str) -> str | None:
    """The `--autoscaling-config` of this Ray's monitor among all processes: other Rays may run on the same machine."""
    port = gcs_address.rpartition(":")[2]
    for words in commands:
        options = dict(word.split("=", 1) for word in words if word.startswith("--") and "=" in word)
        mine = options.get("--gcs-address", "").rpartition(":")[2] == port
        if mine and any(Path(word).name == "monitor.py" for word in words) and "--autoscaling-config" in options:
            return options["--autoscaling-config"]
    return None


def wait_for(demand: Demand, verdict: Verdict, *, seconds: float, say: Say) -> None:
    """Ask the autoscaler for the demand's bundles and wait until they fit. Raises: RunError after `seconds`."""
    from ray.autoscaler.sdk import request_resources

    say(f"waiting for nodes, up to {seconds:g} s: {verdict.text}")
    spare = [{"CPU": 1.0}] * demand.spare
    request_resources(bundles=[dict(demand.bundle)] * demand.count + spare)
    deadline = time.monotonic() + seconds
    try:
        while not held(live_nodes(), demand):
            if time.monotonic() > deadline:
                raise RunError(
                    f"cluster: {judge(Cluster(live_nodes(), []), demand).text}; the autoscaler brought no more in "
                    f"{seconds:g} s; see `ray status`, or raise resources.node_wait_s"
                )
            time.sleep(POLL_SECONDS)
    finally:
        request_resources(bundles=[])  # what runs asks for itself; a standing request would keep nodes for ever


# --- versions ---------------------------------------------------------------------------------------------------------


def check_versions(config: Config, nodes: Iterable[Node], wanted: Iterable[Demand]) -> list[str]:
    """Warnings about versions on the driver and the nodes. Raises: InputError (see `versions.compare`)."""
    nodes, wanted = list(nodes), list(wanted)
    driver = versions()
    answers, silent = _on_nodes(versions, nodes)
    names = {node.node_id: _name(node) for node in nodes}
    needs = {names[node.node_id]: _packages(config, node, wanted) for node in nodes}
    lines = untested(driver, where="driver")
    lines += compare(driver, {names[node_id]: found for node_id, found in answers.items()}, needs)
    for node_id, why in silent.items():
        lines.append(f"node {names[node_id]} did not say what is installed on it ({why})")
    return lines


def _packages(config: Config, node: Node, wanted: Iterable[Demand]) -> list[str]:
    """What the work imports that Ray may place on the node."""
    able = {demand.what for demand in wanted if holds(node.resources, demand.bundle)}
    engine = NEEDED["engine"] if "the engines" in able and not config.model.own_engine else ()
    return [*engine, *(NEEDED["train"] if "the training workers" in able else ())]


def _on_nodes(function: Callable[[], Any], nodes: list[Node]) -> tuple[dict[str, Any], dict[str, str]]:
    """What a short function answers on each node, and why the others did not: node_id -> answer, node_id -> reason.

    On the driver's own node it is called here; elsewhere a task of no CPU runs it.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    answers = {node.node_id: function() for node in nodes if node.node_id == here}
    asked = {}
    for node in nodes:
        if node.node_id != here:
            there = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
            task = ray.remote(function).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
            asked[task.remote()] = node
    ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_SECONDS) if asked else ([], [])
    silent = {asked[ref].node_id: f"no answer in {ANSWER_SECONDS:g} s" for ref in late}
    for ref in ready:
        try:
            answers[asked[ref].node_id] = ray.get(ref)
        except ray.exceptions.RayTaskError as e:
            raise InputError(
                f"node {_name(asked[ref])}: a task of spa_ray fails there ({_last(e)}); install the same on every node"
            ) from e
        except ray.exceptions.RayError as e:  # it went away meanwhile
            silent[asked[ref].node_id] = type(e).__name__
    for ref in late:
        ray.cancel(ref)
    return answers, silent


def _name(node: Node) -> str:
    """Address and the id's beginning: several nodes can share an address."""
    return f"{node.address} ({node.node_id[:8]})"


def _last(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
