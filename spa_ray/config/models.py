"""The config as frozen pydantic models: every key, its type, its default and its meaning.

Comes in: plain dicts that `load.py` merged. Goes out: a validated `Config`. Never: files, Ray, torch, vLLM.
Defaults that depend on another key (train.beta by method, prompts by scoring mode) are None here and are
resolved in one place each (`Train.resolved`, `objectives`). The sections of training are in `training`.
"""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from spa_ray.config.endpoint import Endpoint
from spa_ray.config.section import Section
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


# What renders a conversation, and is no variable of a chat template's.
RENDERER_ARGUMENTS = frozenset(
    {"messages", "conversation", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize"}
    | {"padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"}
    | {"tokenizer_kwargs", "strftime_now", "raise_exception"}
)


def _template_variables(given: Any) -> Any:
    """Raises: ValueError for a name that belongs to the renderer."""
    for name in sorted(RENDERER_ARGUMENTS & set(given)) if isinstance(given, dict) else ():
        instead = "; give model.date" if name == "strftime_now" else ""
        raise ValueError(f"{name} is set by the renderer, not by a config{instead}")
    return given


TemplateKwargs = Annotated[dict[str, Any], BeforeValidator(_template_variables)]


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


class Prompts(Section):
    """Where prompts come from."""

    source: str | None = Field(None, description="file, folder, dotted path `module:reader`, or a named data set")
    split: str | None = Field(None, description="handed to a reader or a named data set")
    limit: int | None = Field(None, ge=1, description="take the first N prompts")
    columns: dict[Literal["prompt", "messages", "prompt_id"], str] = Field(
        default_factory=dict, description="names of the user's columns, by ours; `a.b` is `b` inside `a`"
    )
    on_bad_row: Literal["error", "skip"] = Field("error", description="skip leaves such rows out and counts them")
    last_answer: Literal["error", "drop"] = Field(
        "error",
        description="of conversations that end with the assistant's turn (SFT data): refuse the row, or drop it",
    )


DEFAULT_SYSTEM_PROMPTS: tuple[str | None, ...] = (
    None,
    "You are a careful assistant. Think about who could be hurt before you answer, then help as far as that allows.",
    "You are a practical assistant. Give concrete, correct steps that the person can act on.",
    "You are a candid assistant. Say plainly what you do not know and what should not be done.",
    "You are a warm assistant. Acknowledge the person, then answer the need behind the question.",
)


MAX_TEMPERATURE = 2.0  # vLLM and the OpenAI protocol refuse more


class Decoding(Section):
    """How one kind of answer is sampled. The defaults leave the model's distribution as it is."""

    temperature: float = Field(1.0, ge=0, le=MAX_TEMPERATURE, description="0 takes the most probable token")
    top_p: float = Field(1.0, gt=0, le=1, description="smallest set of tokens with this probability; 1: all")
    min_p: float = Field(0.0, ge=0, le=1, description="least probability, as a share of the best token's; 0: none")
    top_k: int | None = Field(None, ge=1, description="the k most probable tokens; null: all")
    repetition_penalty: float = Field(
        1.0, gt=0, description="divides the score of tokens of the prompt and the answer so far; 1: none"
    )
    max_tokens: int = Field(1024, ge=1, description="of one answer")
    stop: tuple[str, ...] = Field(
        (), description="strings that end an answer; the answer ends before them, and no end token is added"
    )

    @field_validator("stop", mode="before")
    @classmethod
    def _one_string_or_many(cls, given: Any) -> Any:
        return (given,) if isinstance(given, str) else given

    @field_validator("stop")
    @classmethod
    def _no_empty_stop(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        if "" in given:
            raise ValueError("stop holds an empty text, which would end every answer at once; remove it")
        return given


class Sampling(Decoding):
    """Diverse sampling of n candidates a prompt (SPA, step 1)."""

    n: int = Field(5, ge=1, description="candidates a prompt; at least objectives + 1")
    temperature: float = Field(1.2, ge=0, le=MAX_TEMPERATURE, description="0 takes the most probable token")
    system_prompts: tuple[str | None, ...] = Field(
        DEFAULT_SYSTEM_PROMPTS,
        min_length=1,
        description="candidate i is sampled under entry i modulo the length; [] is [null]",
    )
    resample_duplicates: bool = Field(True, description="sample an exact repetition of a candidate once more")

    @field_validator("system_prompts", mode="before")
    @classmethod
    def _none_is_a_choice(cls, given: Any) -> Any:
        return (None,) if given is None or given in ([], ()) else given


class Scoring(Section):
    """Self-scoring: one call a response and objective (SPA, step 2)."""

    scale: tuple[int, int] = Field((1, 10), description="worst and best whole number")
    mode: Literal["choice", "regex", "expected"] = Field(
        "choice",
        description="constrained to the scale; free text read by `pattern`; mean over the labels' probabilities",
    )
    draws: int = Field(1, ge=1, description="scores drawn per response and objective; the score is their mean")
    temperature: float = Field(1.0, ge=0, le=MAX_TEMPERATURE, description="scores are drawn, not read at the mode")
    retries: int = Field(2, ge=0, description="further tries after a judgement that cannot be read")
    max_tokens: int = Field(8, ge=1, description="of one judgement")
    layout: Literal["objective_first", "answer_first"] = Field(
        "objective_first",
        description="of the built-in prompt: requests share what comes first, and it is computed once; `spa plan` says "
        "where the other one computes less",
    )
    prompt: str | None = Field(None, description="Jinja2; null takes the built-in one of the mode and layout")
    system: str | None = None
    pattern: str = Field(r"\[\[(\d+)\]\]", description="mode regex: its first group is the score")
    chat_template_kwargs: TemplateKwargs | None = Field(None, description="of the judge's prompts; null: the model's")
    judge: Endpoint | None = Field(None, description="null: the policy itself")

    @field_validator("scale")
    @classmethod
    def _ascending(cls, scale: tuple[int, int]) -> tuple[int, int]:
        if scale[0] >= scale[1]:
            raise ValueError(f"scale must ascend, got {list(scale)}; write for example [1, 10]")
        return scale

    @model_validator(mode="after")
    def _an_endpoint_writes_free_text(self) -> Scoring:
        if self.judge is not None and self.mode != "regex":
            raise ValueError(f"an endpoint judges by mode regex, not {self.mode}; set scoring.mode=regex")
        return self


class Refine(Decoding):
    """One improved answer a prompt, written over all scored candidates (SPA, step 2)."""

    temperature: float = Field(0.7, ge=0, le=MAX_TEMPERATURE, description="0 takes the most probable token")
    prompt: str | None = Field(None, description="Jinja2; null takes the built-in one")
    system: str | None = None
    chat_template_kwargs: TemplateKwargs | None = Field(
        None, description="of the refinement's prompt; null: the model's"
    )


class Denoise(Section):
    """The two denoising criteria (SPA, Eq. 1 and the consistency rule)."""

    consistency: Literal["strict", "primary_ge", "off"] = Field(
        "strict",
        description="the refined answer must beat every candidate on every objective (>= on the first; not at all)",
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
        " sums within prompts, over all episodes",
    )
    order: Literal["lex", "pareto"] = Field("lex", description="strict priority, or dominance on every objective")
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
    price_per_gpu_hour: float | None = Field(None, ge=0, description="for plans, in any currency; null: no prices")


class EvalSampling(Decoding):
    """How held-out prompts are answered."""

    temperature: float = Field(0.0, ge=0, le=MAX_TEMPERATURE, description="0 takes the most probable token")


class Evaluation(Section):
    """Held-out prompts, answered once and scored by a judge that training never saw."""

    prompts: Prompts | None = Field(None, description="the main held-out set; null: no evaluation")
    families: dict[str, Prompts] = Field(default_factory=dict, description="further held-out sets, by name")
    judge: str = Field(
        "base", description="`base` (the model before training), `self`, a model folder, or `module:judge`"
    )
    objectives: tuple[str, ...] | None = Field(None, description="null: the run's objectives")
    sampling: EvalSampling = EvalSampling()
    bootstrap: int = Field(1000, ge=1, description="resamples of the 95% intervals")


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

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        k = len(self.objectives)
        if k < 2:
            raise ValueError(f"objectives: {k} given, two or more are needed, highest priority first")
        if len(set(self.objectives)) != k:
            raise ValueError("objectives: a name stands twice")
        if self.sampling.n < k + 1:
            raise ValueError(
                f"sampling.n is {self.sampling.n}, at least {k + 1} (objectives + 1) are needed: "
                f"{k} points are always perfectly correlated and no prompt would be kept"
            )
        stray = set(self.pairs.thresholds) - set(self.objectives)
        if stray:
            raise ValueError(
                f"pairs.thresholds: {sorted(stray)[0]!r} is not one of the objectives {list(self.objectives)}"
            )
        return self


def named_plugs(config: Config) -> list[str]:
    """What the config may name by dotted path and other machines import."""
    return [config.train.method, config.model.engine, config.evaluation.judge]


PROFILES: dict[str, dict[str, Any]] = {
    "paper": {},
    "robust": {"denoise": {"informativeness": False}, "train": {"gap": "l1"}},
}
