"""The config as frozen pydantic models: every key, its type, its default and its meaning.

Takes plain dicts that `load.py` merged and gives a validated `Config`. Other sections: sampling, scoring and refinement
in `rollout`, training in `training`, sources in `prompts`, the evaluation in `evaluation`.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from spa_ray.config.budget import Budget
from spa_ray.config.evaluation import Evaluation
from spa_ray.config.merge import Merge
from spa_ray.config.plugs import ENGINES
from spa_ray.config.prompts import Episodes, Prompts
from spa_ray.config.rollout import Refine, Sampling, Scoring, TemplateKwargs
from spa_ray.config.section import Section
from spa_ray.config.steer import Steer
from spa_ray.config.training import Tracking, TrainSection, train_section

# vLLM's ways of loading weights that read safetensors, or nothing.
SAFE_LOAD_FORMATS = (
    "safetensors",
    "fastsafetensors",
    "instanttensor",
    "mistral",
    "runai_streamer",
    "runai_streamer_sharded",
    "sharded_state",
    "dummy",
)


class Model(Section):
    """The policy that samples, judges, refines and is trained."""

    path: str = Field(description="local folder or hub id of a Hugging Face causal LM")
    revision: str | None = Field(None, description="of a hub id")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="of the engine's weights; auto: the model's own; float32 on a processor without bfloat16",
    )
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs that share one engine's weights")
    max_model_len: int | None = Field(None, ge=8, description="context in tokens; null reads the model's own")
    trust_remote_code: bool = Field(False, description="run Python code that lies in the model folder")
    chat_template_kwargs: TemplateKwargs = Field(
        default_factory=dict, description="variables of the chat template, for example `{enable_thinking: false}`"
    )
    date: datetime.date | None = Field(
        None, description="what chat templates see as today, as YYYY-MM-DD; null: the day of the run's first start"
    )
    think: Literal["strip", "mask"] = Field(
        "strip",
        description="what becomes of the thinking before `</think>`: cut from the answer and kept in `think_text`; or"
        " kept in the answer as context that training gives no weight",
    )
    engine: str = Field("vllm", description="`vllm`, or the dotted path `module:factory` of another engine")
    engine_kwargs: dict[str, Any] = Field(default_factory=dict, description="passed to vLLM's EngineArgs as they are")

    @property
    def own_engine(self) -> bool:
        """Whether the engine is one of the user's own, which brings its tokenizer and reads `engine_kwargs` alone."""
        return self.engine not in ENGINES

    @field_validator("date", mode="before")
    @classmethod
    def _is_written_out(cls, given: Any) -> Any:
        if given is None or isinstance(given, datetime.date):
            return given
        try:
            return datetime.date.fromisoformat(given)
        except (TypeError, ValueError) as e:  # a bare 20261125 is a number, which would count as seconds since 1970
            raise ValueError(f"a date is written YYYY-MM-DD, got '{given}'") from e

    @field_validator("engine_kwargs")
    @classmethod
    def _reads_no_pickles(cls, given: dict[str, Any]) -> dict[str, Any]:
        for name in sorted({"chat_template_kwargs", "chat_template", "default_chat_template_kwargs"} & set(given)):
            raise ValueError(f"{name} does nothing here: prompts reach vLLM as ids; use model.chat_template_kwargs")
        if given.get("load_format", "safetensors") not in SAFE_LOAD_FORMATS:
            known = ", ".join(SAFE_LOAD_FORMATS)
            raise ValueError(f"load_format {given['load_format']!r} can read pickles, which run code; one of {known}")
        return given


ONLY = r"^only:.+$"  # `pairs.order` by one objective
ANY = 1e-6  # as `pairs.delta`: any difference


class Denoise(Section):
    """The two denoising criteria (SPA, Eq. 1 and the consistency rule)."""

    consistency: Literal["strict", "primary_ge", "total", "off"] = Field(
        "strict",
        description="the refined answer must beat every candidate on every objective (>= on the first; in the sum of"
        " all; not at all)",
    )
    on_inconsistent: Literal["drop_prompt", "drop_refined"] = Field(
        "drop_prompt", description="drop_refined keeps the candidates of such a prompt"
    )
    informativeness: bool = Field(True, description="keep prompts with 0 < det Σ <= τ only")
    ddof: Literal[0, 1] = Field(1, description="of the covariance Σ over the candidates' scores")
    tau: float | None = Field(None, gt=0, description="upper bound of det; null reads tau_quantile off the data")
    tau_quantile: float | None = Field(0.32, gt=0, le=1, description="null: no upper bound")
    tau_over: Literal["positive", "all"] = Field("positive", description="which det Σ the quantile is taken of")

    @field_validator("consistency", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML 1.1 reads a bare `off` as false


class Pairs(Section):
    """Preference pairs (SPA, Eq. 2)."""

    delta: Literal["auto"] | Annotated[float, Field(gt=0)] = Field(
        2.0,
        description="least sum of absolute score differences (Eq. 2); `auto`: half a standard deviation of the score"
        " sums within prompts, over all episodes. With order mean 1e-6, any difference",
    )
    order: Literal["lex", "pareto", "composite", "mean"] | Annotated[str, Field(pattern=ONLY)] = Field(
        "lex",
        description="strict priority; dominance on every objective; the weighted mean of the objectives; the mean of"
        " their scores as parts of their ranges, highest against lowest, one pair per prompt (SGA); or `only:NAME`, one"
        " objective alone. delta of the last three counts in what they compare",
    )
    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict,
        description="order composite: objective -> its share, as 9 and 1; one left out has none; {}: all alike",
    )
    include: Literal["all", "refined_only", "candidates_only"] = Field(
        "all", description="what the chosen answer may be"
    )
    thresholds: dict[str, float] = Field(
        default_factory=dict, description="objective -> a*: compare min(score, a*) instead of the score"
    )
    score_grid: float | None = Field(None, gt=0, description="round real-valued scores to this grid first")
    keep_system: bool = Field(False, description="train under the system prompt that the chosen was sampled with")
    truncated: Literal["reject", "allow"] = Field(
        "reject",
        description="whether an answer that was cut by its max_tokens may be the chosen one; it may be rejected",
    )

    @model_validator(mode="before")
    @classmethod
    def _any_difference(cls, raw: Any) -> Any:
        return {"delta": ANY, **raw} if isinstance(raw, Mapping) and raw.get("order") == "mean" else raw


class Generation(Section):
    """How the generation stage treats rows."""

    max_attempts: int = Field(
        3, ge=1, description="passes over the prompts whose last row has an error that another try may not meet"
    )
    max_error_fraction: float = Field(0.1, ge=0, le=1, description="more failed prompts than this fail the stage")
    rows_per_block: int = Field(32, ge=1, description="rows committed together; also the grain of a resume")
    start_timeout_s: float = Field(
        1800, gt=0, description="for loading one engine, once its node has the model; then it is replaced"
    )
    stall_timeout_s: float = Field(300, gt=0, description="without a step of an engine that has work; then likewise")
    prompt_timeout_s: float = Field(3600, gt=0, description="for one prompt's whole episode; then it is an error row")
    judge_timeout_s: float = Field(
        300, gt=0, description="for one call of a judge function; then the prompt is an error row"
    )
    judge_concurrency: int = Field(
        32, ge=1, description="calls of a judge function at a time, per engine: plain functions run in so many threads"
    )


class Iterations(Section):
    count: int = Field(1, ge=1, description="rounds, each from the model that the last one trained")
    prompts: Literal["same", "diff"] = Field("same", description="the same prompts again, or the next `prompts.limit`")
    reuse_refined: bool = Field(False, description="add the last iteration's refined answer as a candidate")


class Engines(Section):
    min: int = Field(1, ge=1, description="engines that are always there")
    max: int = Field(1, ge=1, description="engines the pool may grow to")

    @model_validator(mode="after")
    def _ordered(self) -> Engines:
        if self.max < self.min:
            raise ValueError(f"engines.max {self.max} is below engines.min {self.min}")
        return self


class Resources(Section):
    """What may be used. Never part of a stage's hash."""

    engines: Engines = Engines()
    gpus_per_engine: float | None = Field(None, ge=0, description="null: tensor_parallel_size on a GPU cluster, else 0")
    cpus_per_engine: float | None = Field(
        None,
        ge=0,
        description="logical CPUs, and on a CPU host threads; null: 1, and an engine that is the only one of a run"
        " without GPUs computes with all cores of its machine",
    )
    concurrency: int = Field(128, ge=1, description="prompts in flight in one engine")
    train_workers: int = Field(1, ge=1, description="ranks")
    gpus_per_worker: float | None = Field(None, ge=0, description="null: 1 on a GPU cluster, else 0")
    cpus_per_worker: float = Field(1, gt=0, description="logical CPUs")
    node_wait_s: float = Field(
        900,
        gt=0,
        description="for an autoscaling cluster to bring the nodes that a run needs; also for training's start",
    )
    gpu_memory_gib: float | None = Field(None, gt=0, description="of one GPU, for plans; null: 80")
    host_memory_gib: float | None = Field(
        None,
        gt=0,
        description="of one machine that trains, for what `train.offload` keeps there; null: what Ray says of its"
        " nodes, and in plans this machine's where the run would be on it",
    )
    gpus_per_sensor: float = Field(
        0.0,
        ge=0,
        description="of what senses scores in front of the engines, for a model with a head that does; 0: it computes"
        " on the processor",
    )
    price_per_gpu_hour: float | None = Field(
        None, ge=0, description="in any currency for plans, in dollars for `budget.usd`; null: no prices"
    )


class Config(Section):
    """One arm's whole config. `name`, `seed` and `run_dir` belong to the run."""

    name: str = Field(description="the run's name; the file's stem unless given")
    run_dir: str = Field(description="a path or a URI (`s3://…`); runs/NAME unless given")
    seed: int = 0
    profile: Literal["paper", "robust"] = Field(
        "paper", description="named defaults, see below; single keys override it"
    )
    arms: dict[str, dict[str, Any]] = Field(
        {"main": {}}, min_length=1, description="name -> {dotted key: value}; equal stages are shared"
    )
    objectives: tuple[str, ...] = Field(("harmless", "helpful"), description="highest priority first, two or more")
    constitution: str = Field("hhh", description="built-in name or YAML file")
    model: Model
    prompts: Prompts = Prompts()
    episodes: Episodes = Episodes()
    sampling: Sampling = Sampling()
    scoring: Scoring = Scoring()
    refine: Refine = Refine()
    denoise: Denoise = Denoise()
    pairs: Pairs = Pairs()
    train: TrainSection = Field(default_factory=lambda: train_section({}))
    generation: Generation = Generation()
    iterations: Iterations = Iterations()
    resources: Resources = Resources()
    tracking: Tracking = Tracking()
    evaluation: Evaluation = Evaluation()
    steer: Steer = Steer()
    merge: Merge | None = Field(
        None, description="of an arm: its model is other arms' mean, and nothing is generated or trained for it"
    )
    budget: Budget | None = Field(None, description="null: no bound")

    @model_validator(mode="before")
    @classmethod
    def _given_answers(cls, raw: Any) -> Any:
        """The defaults that `episodes.source` brings."""
        given = raw.get("episodes") if isinstance(raw, Mapping) else None
        if not (isinstance(given, Mapping) and given.get("source")):
            return raw
        names = given.get("attributes") or raw.get("objectives")
        same = (
            {"episodes": {**given, "attributes": names}, "objectives": raw.get("objectives") or names} if names else {}
        )
        off = {section: {**keys, **(raw.get(section) or {})} for section, keys in GIVEN_ANSWERS.items()}
        if off["pairs"].get("order") == "mean" and "delta" not in (raw.get("pairs") or {}):
            del off["pairs"]["delta"]  # which has its own
        return {**raw, **same, **off}

    @property
    def labels_given(self) -> bool:
        """Whether given answers (`episodes.source`) get their scores from `scoring.judge`."""
        return self.episodes.source is not None and self.scoring.judge is not None

    @property
    def decontaminated_by(self) -> list[Prompts]:
        """Whose prompts may share no 13 words in a row with those to train on."""
        return self.evaluation.held_out if self.prompts.decontaminate else []

    def _check_given(self) -> None:
        names = self.episodes.attributes
        if names is not None and names != self.objectives:
            raise ValueError(f"episodes.attributes: {list(names)} are not the objectives {list(self.objectives)}")
        for key, off in GIVEN_ANSWERS["denoise"].items():
            if getattr(self.denoise, key) != off:
                raise ValueError(f"denoise.{key}: given answers (episodes.source) are not denoised; remove the key")
        if self.labels_given and self.scoring.compare is not None:
            raise ValueError("scoring.compare: given answers (episodes.source) are scored one by one; remove the key")
        if self.iterations.count > 1:
            raise ValueError("iterations.count: given answers (episodes.source) serve one iteration; remove the key")

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        k = len(self.objectives)
        if self.episodes.source:
            self._check_given()
        elif k < 2:
            raise ValueError(f"objectives: {k} given, two or more are needed, highest priority first")
        if len(set(self.objectives)) != k:
            raise ValueError("objectives: a name stands twice")
        if self.sampling.n < k + 1 and not self.episodes.source:
            raise ValueError(
                f"sampling.n is {self.sampling.n}, at least {k + 1} (objectives + 1) are needed: "
                f"{k} points are always perfectly correlated and no prompt would be kept"
            )
        if self.prompts.decontaminate and not self.evaluation.held_out:
            raise ValueError("prompts.decontaminate: evaluation has no prompts; name them, or remove the key")
        self._check_pairs()
        if self.train.uncertainty == "draws" and not self.scoring.repeated:
            raise ValueError("train.uncertainty: draws, and every score is drawn once; set scoring.draws to 2 or more")
        if self.budget and self.budget.usd:
            self._check_prices()
        return self

    def _check_pairs(self) -> None:
        """That what `pairs` names are objectives. Raises: ValueError."""
        pairs = self.pairs
        only = [pairs.order.removeprefix("only:")] if pairs.order.startswith("only:") else []
        for key, names in (("thresholds", pairs.thresholds), ("weights", pairs.weights), ("order", only)):
            if unknown := sorted(set(names) - set(self.objectives)):
                raise ValueError(f"pairs.{key}: {unknown[0]!r} is not one of the objectives {list(self.objectives)}")
        if pairs.order == "mean" and pairs.delta == "auto":
            raise ValueError("pairs.delta: auto is of score sums; order mean takes a number, or no delta")
        judged = not self.episodes.source or self.labels_given
        if pairs.order == "mean" and judged and self.scoring.ranges is None and not self.episodes.ranges:
            raise ValueError(
                "pairs.order: mean needs the scores' ranges, and this judge's are not known; set episodes.ranges"
            )
        ranges = {} if self.episodes.source else self.episodes.ranges or {}  # of given answers `attributes` are theirs
        if unknown := sorted(set(ranges) - set(self.objectives)):
            raise ValueError(f"episodes.ranges: {unknown[0]!r} is not one of the objectives {list(self.objectives)}")
        if pairs.weights and (pairs.order != "composite" or not any(pairs.weights.values())):
            why = "all are 0" if pairs.order == "composite" else f"order {pairs.order} has none; set order composite"
            raise ValueError(f"pairs.weights: {why}")

    def _check_prices(self) -> None:
        """That `budget.usd` bounds something. Raises: ValueError."""
        nothing = dict.fromkeys(("requests", "prompt_tokens", "generated_tokens"), 0.0)
        judges = {f"evaluation.{place}": judge for place, judge in self.evaluation.all_judges.items()}
        judges = {"scoring.judge": self.scoring.judged_by, **judges}
        for name, section in self.evaluation.benchmarks.items():
            judges |= {f"evaluation.benchmarks.{name}.judge": section.judged_by} if section.judged_by else {}
        bills = {name: judge.bill(nothing) for name, judge in judges.items()}
        for name, bill in bills.items():
            if bill and bill["usd"] is None:
                raise ValueError(f"budget.usd needs {name}.price; {{input: 0, output: 0}} costs nothing")
        if not any(bills.values()) and self.resources.price_per_gpu_hour is None:
            raise ValueError("budget.usd bounds nothing here: no judge has a price; set resources.price_per_gpu_hour")


def named_plugs(config: Config) -> list[str]:
    """What the config may name by dotted path and other machines import."""
    benchmarks = [section.benchmark for section in config.evaluation.benchmarks.values()]
    of_benchmarks = [j for section in config.evaluation.benchmarks.values() if (j := section.judged_by) is not None]
    judges = [config.scoring.judged_by, *config.evaluation.all_judges.values(), *of_benchmarks]
    return [config.train.method, config.model.engine, *benchmarks, *(name for j in judges for name in j.plugs())]


def evaluation_scoring(config: Config, place: str = "judge") -> Scoring:
    """How a judge of the evaluation scores, by its place there: as in generation unless `evaluation.scoring` says
    otherwise, but by that judge. One with a pass of its own scores there as `self`."""
    judge = config.evaluation.all_judges[place]
    scoring = config.evaluation.scoring or config.scoring
    changes = {"judge": None if judge.own_pass else judge, "mode": judge.only_mode or scoring.mode, "compare": None}
    return scoring.model_copy(update=changes)


GIVEN_ANSWERS: dict[str, dict[str, Any]] = {
    "denoise": {"consistency": "off", "informativeness": False},
    "pairs": {"delta": "auto"},
}

PROFILES: dict[str, dict[str, Any]] = {
    "paper": {},
    "robust": {"denoise": {"informativeness": False}, "train": {"gap": "l1"}},
}
