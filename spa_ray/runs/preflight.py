"""What can be known to be wrong before anything starts or is written: settings, model, prompts, judge.

Comes in: arm configs, the base model's folder. Goes out: nothing, or `InputError`. Never: Ray, engines, the run folder.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from spa_ray.config.models import Config
from spa_ray.data.dotted import is_dotted, load_dotted
from spa_ray.data.prompts import write_prompts
from spa_ray.errors import InputError
from spa_ray.evaluation.prompts import write_eval_prompts
from spa_ray.generation.setup import check_generation
from spa_ray.objectives import load_objectives
from spa_ray.training.trackers import check_backends

SHARED = ("model", "evaluation", "resources")  # one engine and one worker group serve all arms


def check_run(arms: dict[str, Config], base: Path) -> None:
    """Check every arm of a run. `base` is the folder of the model it starts from. Raises: InputError."""
    first = next(iter(arms.values()))
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch) / "prompts.parquet"
        for arm, config in arms.items():
            for section in SHARED:
                if getattr(config, section) != getattr(first, section):
                    raise InputError(f"arms: {arm}: {section} cannot differ between the arms of a run")
            check_settings(config, base)
        for config in {_prompts_key(c): c for c in arms.values()}.values():
            check_prompts(config, fresh)
        if has_evaluation(first):
            check_evaluation(first, base)
            write_eval_prompts(first.evaluation, fresh)


def check_settings(config: Config, base: Path) -> None:
    """Templates, tokenizer, engine and lengths of one arm. Raises: InputError."""
    check_backends(config.tracking.backends)
    if config.model.engine != "vllm":
        load_dotted(config.model.engine, where="model.engine")
    context = config.model.max_model_len
    for key, tokens in (
        ("sampling.max_tokens", config.sampling.max_tokens),
        ("refine.max_tokens", config.refine.max_tokens),
        ("evaluation.sampling.max_tokens", config.evaluation.sampling.max_tokens if has_evaluation(config) else 0),
    ):
        if context is not None and tokens >= context:
            raise InputError(f"{key} is {tokens}, which leaves no room for a prompt in model.max_model_len {context}")
    check_generation(config, base)


def _prompts_key(config: Config) -> str:
    return config.prompts.model_dump_json() + config.iterations.model_dump_json()


def check_prompts(config: Config, scratch: Path) -> None:
    """Read the prompts of every iteration once. Raises: InputError for a bad row, and for too few."""
    rounds, limit = config.iterations.count, config.prompts.limit
    if rounds == 1 or config.iterations.prompts == "same":
        write_prompts(config.prompts, scratch)
        return
    if limit is None:
        raise InputError("iterations.prompts: diff needs prompts.limit, so that the next iteration can take the next")
    for iteration in range(1, rounds + 1):
        found = write_prompts(config.prompts, scratch, skip=(iteration - 1) * limit).rows
        if found < limit:
            raise InputError(
                f"prompts.source: {config.prompts.source}: iteration {iteration} would have {found} new prompts, not "
                f"prompts.limit {limit}; give more prompts, a smaller limit or iterations.prompts=same"
            )


def has_evaluation(config: Config) -> bool:
    return config.evaluation.prompts is not None or bool(config.evaluation.families)


def eval_config(config: Config) -> Config:
    """The config with the evaluation's own objectives."""
    objectives = config.evaluation.objectives
    return config.model_copy(update={"objectives": objectives}) if objectives else config


def check_evaluation(config: Config, base: Path) -> None:
    """The judge and the objectives of the evaluation. Raises: InputError."""
    judge_folder(config, base)
    if len(load_objectives(eval_config(config))) < 2:
        raise InputError("evaluation.objectives: one given, two or more are needed, highest priority first")


def judge_folder(config: Config, base: Path) -> Path | None:
    """The model folder that judges in a pass of its own; None where the judge answers within the first pass.

    Raises: InputError for a judge that is neither known, nor a dotted path, nor a model folder.
    """
    judge = config.evaluation.judge
    if is_dotted(judge) or judge == "self":
        return None
    folder = base if judge == "base" else Path(judge)
    if not (folder / "config.json").is_file():
        raise InputError(
            f"evaluation.judge: {judge!r} is not `base`, `self`, a dotted path module:function or a model folder"
        )
    return folder
