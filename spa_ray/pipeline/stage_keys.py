"""The settings that each stage's key covers: what changes results, and nothing else.

`resources`, `tracking`, `generation` and the engine's neutral arguments never appear here; `attempt` records their
values, which a stage keeps in its `stage.json`. tests/test_stage_keys.py says of every config key which stages it
starts again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from spa_ray.config.benchmark import benchmark_class
from spa_ray.config.models import Config, evaluation_scoring
from spa_ray.config.pairwise import PROTOCOL, REFERENCE
from spa_ray.config.plugs import source_hash
from spa_ray.config.rollout import Scoring
from spa_ray.config.section import JudgeSection, Section
from spa_ray.config.training import TRAIN_BYSTANDERS
from spa_ray.objectives import load_objectives

# vLLM's arguments that leave the distribution of answers as it is, up to rounding: memory, batching, logs, and swapping
# and offloading under all of vLLM's names for them. Every other argument counts, those too that are probably neutral.
NEUTRAL_ENGINE_ARGUMENTS = frozenset(
    {
        "gpu_memory_utilization", "max_num_seqs", "max_num_batched_tokens", "enforce_eager", "disable_log_stats",
        "enable_prefix_caching", "block_size", "swap_space", "cpu_offload_gb", "cpu_offload_params",
        "offload_backend", "offload_group_size", "offload_num_in_group", "offload_prefetch_step", "offload_params",
        "kv_offloading_size", "kv_offloading_backend", "sleep_mode_offload_cudagraph",
    }
)  # fmt: skip

CHAT_KEYS = ("chat_template_kwargs", "date", "think")


@dataclass(frozen=True)
class Known:
    """What a key covers besides the config and its inputs. `chat` is `ChatSettings.key`; None: the config's own keys.
    `tau` is an earlier iteration's."""

    iteration: int = 1
    tau: float | None = None
    benchmark: str = ""  # its name in `evaluation.benchmarks`
    chat: Mapping[str, Any] | None = None
    names: tuple[str, ...] = ()  # a judge's place in `evaluation`, and of a comparison the names of `a` and `b`


def _plain(section: Section, *leave_out: str) -> dict[str, Any]:
    return section.model_dump(mode="json", exclude=set(leave_out))


def _objectives(config: Config, names: tuple[str, ...] | None = None) -> list[dict[str, Any]]:
    """The objectives with their wording: a changed rubric is another judge. Thresholds are read by `build` alone."""
    chosen = config if names is None else config.model_copy(update={"objectives": names})
    return [o.model_dump(mode="json", exclude={"threshold"}) for o in load_objectives(chosen)]


def _engine(config: Config) -> dict[str, Any]:
    """What of the model section changes answers (its path does not: the files' hash stands for it)."""
    engine = _plain(config.model, "path", "revision", "tensor_parallel_size", *CHAT_KEYS)
    if not config.model.own_engine:
        given = engine["engine_kwargs"]
        engine["engine_kwargs"] = {k: v for k, v in given.items() if k not in NEUTRAL_ENGINE_ARGUMENTS}
    else:
        engine["source"] = source_hash(config.model.engine)
    return engine


def _scoring(scoring: Scoring) -> dict[str, Any]:
    """The scoring section without the keys that its mode never reads, or that say what older versions did."""
    unread: set[str] = set() if scoring.mode == "regex" else {"pattern"}
    if scoring.prompt is not None or scoring.layout == "objective_first":
        unread |= {"layout"}
    if scoring.mode == "expected":  # one look at the labels' probabilities
        unread |= {"draws", "retries", "max_tokens"}
    elif scoring.temperature == 0:  # asked again, the judge says the same
        unread |= {"retries"}
    if not scoring.judged_by.reads_prompts:
        return {"scale": list(scoring.scale)}
    return _plain(scoring, *unread, "judge", "compare")


def _judged(scoring: Scoring) -> dict[str, Any]:
    """The scoring and what its judge adds."""
    judge = scoring.judged_by.key()
    compared = {} if scoring.compare is None else {"compare": [PROTOCOL, _plain(scoring.compare)]}
    return {**_scoring(scoring), **({} if judge is None else {"judge": judge}), **compared}


def attempt(config: Config) -> dict[str, Any]:
    """When a stage is worked on, and the values of the keys that do not change what comes out."""
    neutral = {k: v for k, v in config.model.engine_kwargs.items() if k in NEUTRAL_ENGINE_ARGUMENTS}
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": {"tensor_parallel_size": config.model.tensor_parallel_size, "engine_kwargs": neutral},
        "resources": _plain(config.resources),
        "generation": _plain(config.generation),
        "train": {key: getattr(config.train, key) for key in sorted(TRAIN_BYSTANDERS)},
    }


def _chat(config: Config, known: Known) -> dict[str, Any]:
    """How prompts are rendered."""
    return config.model.model_dump(mode="json", include=set(CHAT_KEYS)) if known.chat is None else dict(known.chat)


def _steer(config: Config) -> dict[str, Any]:
    """What a model that is conditioned on scores is asked for, where it is not what it senses or its method wants."""
    return {} if config.steer.is_default else {"steer": _plain(config.steer)}


def prompts(config: Config, known: Known) -> dict[str, Any]:
    """Nothing: their contents are the input."""
    return {}


def label(config: Config, known: Known) -> dict[str, Any]:
    """Scores of given answers by the judge of `scoring`."""
    return {**_judging(config, known, config.scoring.judged_by, None), "scoring": _judged(config.scoring)}


def generate(config: Config, known: Known) -> dict[str, Any]:
    return {
        "chat": _chat(config, known),
        "seed": config.seed,
        "iteration": known.iteration,
        "objectives": _objectives(config),
        "engine": _engine(config),
        "scoring": _judged(config.scoring),
        "sampling": _plain(config.sampling),
        "refine": _plain(config.refine, *(["attempts"] if config.refine.attempts == 1 else [])),  # as before the key
        **_steer(config),
    }


def build(config: Config, known: Known) -> dict[str, Any]:
    return {
        "objectives": list(config.objectives),
        "denoise": _plain(config.denoise),
        "pairs": _plain(config.pairs, *([] if config.pairs.weights else ["weights"])),  # as before the key
        "frozen_tau": known.tau,
        **({"ranges": config.episodes.ranges} if config.episodes.ranges else {}),
        **({"reliability": 1} if config.scoring.repeated else {}),
    }


def train(config: Config, known: Known) -> dict[str, Any]:
    section = config.train.identity().model_dump(mode="json", include=config.train.identified_by())
    source = source_hash(config.train.method)
    own = {} if source is None else {"method": source}
    return {"seed": config.seed, "train": section, "chat": _chat(config, known), **own}


def evaluate(config: Config, known: Known) -> dict[str, Any]:
    scoring = evaluation_scoring(config)
    # As it was written before generation could have such judges: beside the scoring, not in it.
    beside = None if scoring.judged_by.reads_prompts else scoring.judged_by.key()
    return {
        "chat": _chat(config, known),
        "seed": config.seed,
        "objectives": _objectives(config, config.evaluation.objectives),
        "engine": _engine(config),
        "scoring": _scoring(scoring) if beside else _judged(scoring),
        "sampling": _plain(config.evaluation.sampling),
        "judge": beside,
        **_steer(config),
    }


def score(config: Config, known: Known) -> dict[str, Any]:
    """Further scores of the answers that are an input."""
    scoring = evaluation_scoring(config, known.names[0])
    judging = _judging(config, known, scoring.judged_by, config.evaluation.objectives)
    return {**judging, "scoring": _judged(scoring)}


def rv(config: Config, known: Known) -> dict[str, Any]:
    """Scores of candidates by the evaluation's judge."""
    return {**score(config, known), "prompts": config.evaluation.rv}


def pairwise(config: Config, known: Known) -> dict[str, Any]:
    """Comparisons of the answers that are inputs."""
    section, (_, a, b) = config.evaluation.pairwise, known.names
    assert section is not None
    judge, scale = section.judged_by, list(config.scoring.scale)
    return {
        **_judging(config, known, judge, config.evaluation.objectives),
        "between": [a, b],
        "both_orders": section.both_orders,
        "asked": [PROTOCOL, _plain(section, "against", "reference", "judge", "both_orders")]
        if judge.reads_prompts
        else scale,
        **({} if section.reference == REFERENCE else {"reference": section.reference}),  # as before the key
        "judge": judge.key(),
    }


def merge(config: Config, known: Known) -> dict[str, Any]:
    """Shares and not weights: 9:1 and 18:2 are the same model."""
    assert config.merge is not None
    return {"shares": config.merge.shares, "what": config.merge.what}


def _judging(config: Config, known: Known, judge: JudgeSection, names: tuple[str, ...] | None) -> dict[str, Any]:
    """What judging given answers depends on, whoever judges: an engine counts where one is asked."""
    about = {"seed": config.seed, "objectives": _objectives(config, names)}
    kwargs = config.scoring.chat_template_kwargs
    engine = {"engine": _engine(config), "chat": _chat(config, known), "chat_template_kwargs": kwargs}
    return about | (engine if judge.asks_engine else {})


def benchmark(config: Config, known: Known) -> dict[str, Any]:
    section = config.evaluation.benchmarks[known.benchmark]
    return {
        "chat": _chat(config, known),
        "seed": config.seed,
        "engine": _engine(config),
        "benchmark": _plain(section, "judge", *section.sources),  # which prompts there are is an input
        **({} if section.judged_by is None else {"judge": [section.judged_by.kind, section.judged_by.key()]}),
        "protocol": [benchmark_class(section.benchmark).version, source_hash(section.benchmark)],
        **_steer(config),
    }
