"""Whether every node of the cluster sees the folder that a command writes to: asked of each, before anything is spent.

Comes in: a folder, a Ray that is connected. Goes out: nothing, or `InputError`. Nodes that join later are not asked
here: what runs on them checks a `Token` itself. Never: a guess from the kind of filesystem.
"""

from __future__ import annotations

from typing import Any

from spa_ray.errors import InputError, RunError
from spa_ray.storage.files import AnyPath, make_folder
from spa_ray.storage.token import Token

ANSWER_SECONDS = 120.0  # a node that has to start a process first


def check_shared(folder: AnyPath, *, deadline: float = ANSWER_SECONDS) -> None:
    """Ask every node whether it sees a file that the driver leaves in the folder. A cluster of one node is not asked.

    Raises: InputError naming the first node that does not; RunError when one gives no answer within `deadline` seconds.
    """
    import ray

    if len(_alive()) < 2:
        return
    make_folder(folder)
    token = Token.leave(folder)
    try:
        asked = {_ask(token, node): name for node, name in _alive().items()}
        answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=deadline)
        for answer in answered:
            _hear(answer, asked[answer], folder)
        for answer in silent:
            ray.cancel(answer, force=True)
            if asked[answer] in _alive().values():
                raise RunError(f"{folder}: node {asked[answer]} gave no answer within {deadline:.0f} s; is it well?")
    finally:
        token.remove()


def _alive() -> dict[str, str]:
    """Node id -> its address."""
    import ray

    return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}


def _ask(token: Token, node: str) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(_look).options(num_cpus=0, max_retries=0, scheduling_strategy=there).remote(token)


def _look(token: Token) -> str | None:
    """What is wrong on this node, if anything."""
    try:
        token.check()
    except InputError as e:
        return str(e)
    return None


def _hear(answer: Any, name: str, folder: AnyPath) -> None:
    import ray

    try:
        wrong = ray.get(answer)
    except ray.exceptions.RayTaskError as e:
        lines = [line for line in str(e).splitlines() if line.strip()]
        raise InputError(f"{folder}: node {name} cannot reach it: {lines[-1].strip()}") from e
    except ray.exceptions.RayError:
        if name in _alive().values():
            raise
        return  # the node went while it was asked
    if wrong:
        raise InputError(wrong)
