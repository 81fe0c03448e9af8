"""Which stages a run has, each once: arms share a stage exactly where the pipeline would, by the same addresses.

Comes in: arm configs. Goes out: `PlannedStage`s in the order of work. Addresses are symbolic: they stand for inputs
that do not exist yet, so nothing is hashed or read.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from spa_ray.config.models import Config
from spa_ray.runs import stages as address
from spa_ray.runs.hashing import digest
from spa_ray.runs.preflight import has_evaluation

VANILLA = "vanilla"


@dataclass
class PlannedStage:
    """One stage of a run. `arms`: who uses it; the first of them, with `iteration`, finds it in a run's records."""

    stage: str
    key: str
    config: Config
    iteration: int
    arms: list[str] = field(default_factory=list)


def planned_stages(arms: dict[str, Config]) -> list[PlannedStage]:
    """Every stage but the copying of prompts, iteration by iteration, shared ones once."""
    found: dict[str, PlannedStage] = {}

    def add(stage: str, key: str, arm: str, config: Config, iteration: int) -> None:
        found.setdefault(key, PlannedStage(stage, key, config, iteration)).arms.append(arm)

    models = dict.fromkeys(arms, VANILLA)
    episodes: dict[str, str] = {}
    for iteration in range(1, max(c.iterations.count for c in arms.values()) + 1):
        for arm, config in arms.items():
            if iteration > config.iterations.count:
                continue
            fresh = config.iterations.prompts == "diff"
            first = (iteration - 1) * (config.prompts.limit or 0) if fresh else 0
            prompts = digest([config.prompts.model_dump(mode="json"), first])
            earlier = episodes.get(arm) if config.iterations.reuse_refined else None
            key = address.generate_hash(
                config, iteration=iteration, prompts=prompts, model=models[arm], earlier=earlier
            )
            add("generate", key, arm, config, iteration)
            episodes[arm] = key
            # Which τ an iteration is held to follows from its episodes and settings: a stand-in tells as much.
            frozen = 0.0 if iteration > 1 else None
            build = address.build_hash(config, episodes=key, frozen_tau=frozen)
            add("build", build, arm, config, iteration)
            train = address.train_hash(config, pairs=build, model=models[arm])
            add("train", train, arm, config, iteration)
            models[arm] = train
    config = next(iter(arms.values()))
    if has_evaluation(config):
        for arm, model in {VANILLA: VANILLA, **models}.items():
            key = address.evaluate_hash(config, prompts="held-out", model=model, judge="judge")
            add("evaluate", key, arm, config, 0)
    return list(found.values())
