"""Which stages a run consists of: each arm's recipe over the table, level by level in the order of work.

The pipeline walks these levels with real files, the plan with symbolic hashes, so both share stages alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from spa_ray.config.load import set_dotted, validated
from spa_ray.config.models import Config
from spa_ray.config.pairwise import REFERENCE
from spa_ray.config.steer import Steer
from spa_ray.config.training import BY_METHOD, Train, method_class
from spa_ray.errors import InputError
from spa_ray.pipeline.merges import merge_rounds, of, tuned
from spa_ray.pipeline.stage_keys import Known
from spa_ray.pipeline.stages import STAGES, first_prompt
from spa_ray.storage.hashing import digest
from spa_ray.training.method import method_of

TAKEN = ("pairs", "model", "base")  # inputs of training that are no model of a recipe
READ = ("denoise", "pairs", "train")
VANILLA = "vanilla"  # the model before training
BASE, JUDGE = "base", "judge"  # what a run is given and makes in no stage: two model folders


@dataclass(frozen=True, eq=False)
class Node:
    """One arm's use of a stage, or of something given. `inputs` by the stage's roles; `tau` is the build whose τ holds
    here as well. An iteration of 0 is the evaluation. `part`: the benchmark, or the model of the method's `recipe`."""

    stage: str
    arm: str
    config: Config
    iteration: int = 0
    inputs: Mapping[str, Node] = field(default_factory=dict)
    tau: Node | None = None
    part: str = ""
    judge: str = ""  # its place in `evaluation`

    @property
    def label(self) -> str:
        """What the stage is called in records and plans."""
        name = self.part or ("" if self.stage in ("rv", "pairwise") else self.judge.removeprefix("judges."))
        return f"{self.stage}:{name}" if name else self.stage

    @property
    def user(self) -> str:
        """Who uses the stage: an arm, or `arm:part` for a model of its recipe."""
        return f"{self.arm}:{self.part}" if self.part and self.iteration else self.arm

    @property
    def known(self) -> Known:
        return Known(self.iteration or 1, benchmark="" if self.iteration else self.part, names=self.names)

    @property
    def names(self) -> tuple[str, ...]:
        """A judge's place in `evaluation`, and whom a comparison calls `a` and `b`."""
        section = self.config.evaluation.pairwise
        return (self.judge, self.arm, section.against) if self.stage == "pairwise" and section else (self.judge,)


def has_evaluation(config: Config) -> bool:
    return config.evaluation.prompts is not None or bool(config.evaluation.families)


def extra_models(config: Config) -> dict[str, Config]:
    """The models that an arm's method wants trained first (`Method.recipe`), as arms of their own on the same episodes:
    by name, the arm's config with other keys. What is left of `train` is what all methods know.

    Raises: InputError for keys that no config has or that such a model does not read, for a name that is taken, and for
    a recipe within a recipe.
    """
    found = {}
    for name, keys in method_of(config.train).recipe(config.objectives).items():
        where = f"{config.train.method}: recipe: {name}"
        if not name.isidentifier() or name in TAKEN:
            raise InputError(f"{where}: a name is letters, digits and _, and none of {', '.join(TAKEN)}")
        if other := [key for key in keys if key.partition(".")[0] not in READ]:
            raise InputError(f"{where}: {other[0]}: such a model differs in {', '.join(READ)} alone")
        raw = config.model_dump(mode="json")
        raw["train"] = {key: raw["train"][key] for key in Train.model_fields if key not in ("method", *BY_METHOD)}
        for key, value in keys.items():
            set_dotted(raw, key, value, where=where)
        found[name] = validated(raw, f"{config.train.method}: recipe", name)
        if method_of(found[name].train).recipe(config.objectives):
            raise InputError(f"{where}: {found[name].train.method} has a recipe itself; name a method without one")
    return found


def steered(config: Config, by: Config | None, *, columns: bool = True) -> Config:
    """The config under the `steer` of `by`; under none where the model that is asked knows of no scores. Without
    `columns`, of prompts that bring none of the user's, their scores are sensed, or what the method wants."""
    steer = Steer() if by is None else by.steer
    if steer.column is not None and not columns:
        steer = steer.model_copy(update={"column": None})
    return config if config.steer == steer else config.model_copy(update={"steer": steer})


def levels(arms: Mapping[str, Config], *, conditioned: bool = False) -> Iterator[list[Node]]:
    """The nodes of one stage and iteration at a time, an arm each; every node comes after its inputs. `conditioned`:
    whether the prompts of the model before training say scores."""
    first, merges = next(iter(arms.values())), merge_rounds(arms)
    base = Node(BASE, VANILLA, first)
    arms = tuned(every := arms)
    models = dict.fromkeys(arms, base)
    episodes: dict[str, Node] = {}
    candidates: dict[str, Node] = {}
    tau: dict[tuple[str, str], Node] = {}
    for iteration in range(1, max(config.iterations.count for config in arms.values()) + 1):
        active = {arm: config for arm, config in arms.items() if config.iterations.count >= iteration}
        given = {arm: Node("import", arm, c, iteration) for arm, c in active.items() if c.episodes.source}
        asked = {arm: config for arm, config in active.items() if arm not in given}
        prompts = {arm: Node("prompts", arm, config, iteration) for arm, config in asked.items()}
        for arm, config in asked.items():
            inputs = {"prompts": prompts[arm], "model": models[arm]}
            asks = conditioned if iteration == 1 else method_class(config.train.method).conditioned
            config = steered(config, config if asks else None)
            if config.iterations.reuse_refined and iteration > 1:
                inputs["earlier"] = episodes[arm]
            episodes[arm] = Node("generate", arm, config, iteration, inputs)
        labelled = {arm: _labelled(node, models[arm]) for arm, node in given.items() if active[arm].labels_given}
        episodes |= given | labelled
        candidates = candidates or dict(episodes)
        answers = [*given.values()], [*labelled.values()]
        yield from filter(None, (*answers, [*prompts.values()], [episodes[arm] for arm in asked]))
        parts = {(arm, ""): config for arm, config in active.items()}
        parts |= {(arm, part): c for arm, config in active.items() for part, c in extra_models(config).items()}
        builds = {
            (arm, part): Node("build", arm, c, iteration, {"episodes": episodes[arm]}, tau.get((arm, part)), part)
            for (arm, part), c in parts.items()
        }
        yield list(builds.values())
        tau = {**builds, **tau}  # the first iteration's
        extra: dict[str, dict[str, Node]] = {arm: {} for arm in active}
        for (arm, part), c in parts.items():
            inputs = {"pairs": builds[arm, part], "model": models[arm]}
            if part:
                extra[arm][part] = Node("train", arm, c, iteration, inputs, part=part)
        yield from filter(None, [[node for nodes in extra.values() for node in nodes.values()]])
        for arm, config in active.items():
            inputs = {"pairs": builds[arm, ""], "model": models[arm], **extra[arm]}
            models[arm] = Node("train", arm, config, iteration, inputs)
        yield [models[arm] for arm in active]
    for arms_of_round in merges:
        models |= {arm: _merge(arm, every[arm], base, models) for arm in arms_of_round}
        yield [models[arm] for arm in arms_of_round]
    models = {VANILLA: base, **{arm: models[arm] for arm in every}}
    asking = {arm: config for arm, config in arms.items() if method_class(config.train.method).conditioned}
    asking |= {VANILLA: first.model_copy(update={"steer": Steer()})} if conditioned else {}
    if has_evaluation(first):
        yield from _evaluation(first, models, candidates, asking)
    for name in first.evaluation.benchmarks:
        prompts_of = Node("benchprompts", VANILLA, first, part=name)
        yield [prompts_of]
        yield [
            Node("benchmark", arm, steered(first, asking.get(arm), columns=False), 0,
                 {"prompts": prompts_of, "model": model}, part=name)
            for arm, model in models.items()
        ]  # fmt: skip


def _labelled(given: Node, model: Node) -> Node:
    """Given answers and the judge's scores of them."""
    asked = {"model": model} if given.config.scoring.judged_by.asks_engine else {}
    return Node("label", given.arm, given.config, given.iteration, {"answers": given, **asked})


def _merge(arm: str, config: Config, base: Node, models: Mapping[str, Node]) -> Node:
    assert config.merge is not None
    return Node("merge", arm, config, 1, {"base": base, **{of(name): models[name] for name in config.merge.of}})


def _evaluation(
    config: Config, models: Mapping[str, Node], candidates: Mapping[str, Node], asking: Mapping[str, Config]
) -> Iterator[list[Node]]:
    """Held-out answers of every model, with the scores of the judge, of further judges, and compared in pairs; and the
    judge's scores of the first iteration's candidates. `asking`: the arms whose models are asked for scores, and how.
    """
    held_out, judges = Node("evalprompts", VANILLA, config), {}
    for place in config.evaluation.all_judges:
        judges[place] = Node(JUDGE, VANILLA, config, judge=place)
    yield [held_out]
    answers = {
        arm: Node("evaluate", arm, steered(config, asking.get(arm)), 0,
                  {"prompts": held_out, "model": model, "judge": judges["judge"]})
        for arm, model in models.items()
    }  # fmt: skip
    yield list(answers.values())
    if config.evaluation.rv is not None:
        shared = {"model": models[VANILLA], "judge": judges["judge"]}
        yield [
            Node("rv", arm, config, 0, {"answers": node, **shared}, judge="judge") for arm, node in candidates.items()
        ]
    for place in (f"judges.{name}" for name in config.evaluation.judges):
        given = {arm: {"answers": answers[arm], "model": models[arm], "judge": judges[place]} for arm in models}
        yield [Node("score", arm, config, 0, inputs, judge=place) for arm, inputs in given.items()]
    if config.evaluation.pairwise is not None:
        place, against = "pairwise.judge", config.evaluation.pairwise.against
        other = {} if against == REFERENCE else {"against": answers[against]}
        yield [
            Node("pairwise", arm, config, 0,
                 {"answers": answers[arm], **other, "model": model, "judge": judges[place]}, judge=place)
            for arm, model in models.items()
            if arm != against
        ]  # fmt: skip


def key(node: Node, known: Known, hash_of: Callable[[Node], str]) -> str:
    """The node's address, from its inputs' hashes."""
    return STAGES[node.stage].key(node.config, {role: hash_of(given) for role, given in node.inputs.items()}, known)


@dataclass
class PlannedStage:
    """One stage of a run. `arms`: who uses it; the first of them, with `iteration`, finds it in a run's records."""

    stage: str
    key: str
    config: Config
    iteration: int
    arms: list[str] = field(default_factory=list)
    judge: str = ""  # of an evaluation's stage: its place there


def planned_stages(arms: Mapping[str, Config], *, conditioned: bool = False) -> list[PlannedStage]:
    """Every stage but the copying of prompts, shared ones once. Their keys are symbolic: they stand for inputs that do
    not exist yet, so nothing is hashed or read."""
    found: dict[str, PlannedStage] = {}
    keys: dict[Node, str] = {}

    def hash_of(node: Node) -> str:
        return keys.get(node, node.label)  # what is given is the same for all

    for level in levels(arms, conditioned=conditioned):
        for node in level:
            if STAGES[node.stage].draw:
                sources = node.config.model_dump(mode="json", include={"prompts", "episodes"})
                read = ["unscored"] if node.config.labels_given else []
                source = [sources, first_prompt(node.config, node.iteration), *read] if node.iteration else node.label
                keys[node] = at = digest(source)
            else:
                # Which τ an iteration is held to follows from its episodes and settings: a stand-in tells as much.
                known = replace(node.known, tau=0.0 if node.tau else None)
                keys[node] = at = key(node, known, hash_of)
            if STAGES[node.stage].recorded:
                judge = "judge" if node.stage == "evaluate" else node.judge
                planned = found.setdefault(at, PlannedStage(node.label, at, node.config, node.iteration, judge=judge))
                planned.arms += [node.arm] if node.arm not in planned.arms else []
    return list(found.values())
