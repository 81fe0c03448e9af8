"""Arms that are merges of other arms' models: which of them can be, and in which order they are made."""

from __future__ import annotations

from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter

from spa_ray.config.merge import Merge
from spa_ray.config.models import Config
from spa_ray.errors import InputError
from spa_ray.training.method import method_of


def of(arm: str) -> str:
    """The role of an arm's model among a merge's inputs."""
    return f"of:{arm}"


def tuned(arms: Mapping[str, Config]) -> dict[str, Config]:
    """The arms that are trained."""
    return {arm: config for arm, config in arms.items() if config.merge is None}


def merge_rounds(arms: Mapping[str, Config]) -> list[list[str]]:
    """The merges of a run, each round's after those that they are made of.

    Raises: InputError for an arm that is not there, a merge of itself, and models that have no mean.
    """
    merges = {arm: config.merge for arm, config in arms.items() if config.merge is not None}
    for arm, merge in merges.items():
        _check(arm, merge, arms)
    order = TopologicalSorter({arm: set(merge.of) & set(merges) for arm, merge in merges.items()})
    try:
        order.prepare()
    except CycleError as e:
        raise InputError(f"arms: {e.args[1][0]}: merge: made of itself ({' of '.join(e.args[1])})") from e
    rounds = []
    while order.is_active():
        ready = set(order.get_ready())
        rounds.append([arm for arm in merges if arm in ready])
        order.done(*ready)
    return rounds


def _check(arm: str, merge: Merge, arms: Mapping[str, Config]) -> None:
    where = f"arms: {arm}: merge"
    for name in merge.of:
        if name not in arms:
            raise InputError(f"{where}.of: there is no arm {name!r}; one of {', '.join(arms)}")
        if merge.what == "adapters" and not _has_adapter(arms[name]):
            raise InputError(
                f"{where}.what: adapters: {name} has no LoRA adapter of the run's model; set its train.lora and one "
                "iteration, or what: weights"
            )
        if arms[name].merge is None and method_of(arms[name].train).leaves_more_than_a_model():
            raise InputError(f"{where}.of: {name}: {arms[name].train.method} has more than a model, which has no mean")


def _has_adapter(config: Config) -> bool:
    if config.merge is not None:
        return config.merge.what == "adapters"
    return config.train.lora is not None and config.iterations.count == 1
