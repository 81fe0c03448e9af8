"""What can be known to be wrong before anything starts or is written: settings, model, prompts, judge, versions.

Comes in: arm configs, the base model's folder. Goes out: warnings of one line, or `InputError`. Never: Ray, engines,
the run folder. (Once Ray is there: `preflight_cluster`.)
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from spa_ray.config.models import Config, Model, evaluation_scoring
from spa_ray.config.pairwise import REFERENCE
from spa_ray.config.training import method_class
from spa_ray.data.prompts import Check
from spa_ray.engine import check_capabilities
from spa_ray.engine.placement import check_placement
from spa_ray.engine.vllm_start import check_engine
from spa_ray.errors import InputError
from spa_ray.generation.setup import check_generation, check_judges
from spa_ray.objectives import load_objectives
from spa_ray.pipeline.manifest import versions
from spa_ray.pipeline.merges import merge_rounds
from spa_ray.pipeline.models import fetch_model, is_hub_id
from spa_ray.pipeline.plan_model import context_of, text_settings
from spa_ray.pipeline.preflight_files import context_warning, find_too_long
from spa_ray.pipeline.prompt_files import PromptFiles
from spa_ray.pipeline.recipe import VANILLA, has_evaluation
from spa_ray.pipeline.stages import first_prompt
from spa_ray.pipeline.versions import untested
from spa_ray.rollout.chat import Chat, open_chat
from spa_ray.rollout.check import PromptCheck
from spa_ray.rollout.thinking import unsaid
from spa_ray.steering.asking import check_columns, check_names, check_prompts, check_steer, columns_of, conditioning
from spa_ray.storage.files import AnyPath, as_path, is_file
from spa_ray.storage.hashing import file_hash
from spa_ray.storage.model_folder import check_model_folder
from spa_ray.training.folder import check_weights
from spa_ray.training.trackers import check_backends
from spa_ray.training.trainable import check_trainable

SHARED = ("model", "evaluation", "resources")  # one engine and one worker group serve all arms


def check_run(arms: dict[str, Config], base: Path, files: PromptFiles | None = None) -> list[str]:
    """Check every arm of a run. `base` is the folder of the model it starts from; `files` keeps its prompts.

    Returns: warnings. Raises: InputError for what cannot work.
    """
    first, files = next(iter(arms.values())), files or PromptFiles()
    merge_rounds(arms)
    warnings = untested(versions(), where="this machine")
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch) / "prompts.parquet"
        for arm, config in arms.items():
            for section in SHARED:
                if getattr(config, section) != getattr(first, section):
                    raise InputError(f"arms: {arm}: {section} cannot differ between the arms of a run")
            check_settings(config, base)
            check_trained_names(config)
            warnings += check_trainable(base, config.train, trust_remote_code=config.model.trust_remote_code)
        lengths = Lengths(first, base)
        warnings += lengths.warnings(first)
        for config in arms.values():
            if config.episodes.source:
                warnings += files.write_episodes(config, fresh).notes("episodes")
        for config in {_prompts_key(c): c for c in arms.values() if not c.episodes.source}.values():
            for _ in each_prompts(config, fresh, warnings, files, lengths.check(arms.values())):
                warnings += lengths.of_prompts(fresh, config)
                check_asked_of(base, config, fresh)
        check_opponent(arms, first)
        if has_evaluation(first):
            check_evaluation(first, base)
            check_capabilities(first, several_models=True)
            warnings += files.write_held_out(first.evaluation, fresh, check=lengths.check()).notes
            check_held_out_columns(arms, fresh)
            warnings += lengths.of_held_out(fresh, first)
        for name in first.evaluation.benchmarks:
            files.write_benchmark(first.evaluation, name, fresh)
    return list(dict.fromkeys(warnings))


def context_length(config: Config, base: Path) -> int | None:
    """The context in tokens that vLLM will give the model; another engine's is `model.max_model_len`, or not known.

    Raises: InputError for whatever vLLM refuses of the model and its arguments.
    """
    if config.model.own_engine:
        return config.model.max_model_len
    return _asked(config.model.model_dump_json(), base, file_hash(base / "config.json"))


@functools.lru_cache(maxsize=64)
def _asked(model: str, base: Path, settings: str) -> int | None:
    """What vLLM says of a model section and a folder whose config.json has this hash: asked once."""
    section = Model.model_validate_json(model)
    try:
        return check_engine(section, base)
    except ModuleNotFoundError as e:  # a driver without engines: their nodes are asked for their versions
        if e.name != "vllm":
            raise
        return section.max_model_len or context_of(text_settings(base))


class Lengths:
    """Rendered prompts against the context; nothing is said of engines that bring a tokenizer of their own."""

    def __init__(self, config: Config, base: Path) -> None:
        self.context = context_length(config, base)
        self.chat = None if config.model.own_engine else open_chat(config.model, base)

    def warnings(self, config: Config) -> list[str]:
        """What the config leaves open that this model's template asks."""
        return thinking_warnings(self.chat, config)

    def check(self, configs: Iterable[Config] = ()) -> PromptCheck | None:
        """Whether the template renders the prompts of these configs; of none: the held-out ones."""
        return prompt_check(self.chat, configs)

    def of_prompts(self, prompts: Path, config: Config) -> list[str]:
        systems = list(dict.fromkeys(config.sampling.system_prompts[: config.sampling.n]))
        return self._check(prompts, systems, config.sampling.max_tokens, "prompts")

    def of_held_out(self, prompts: Path, config: Config) -> list[str]:
        return self._check(prompts, [None], config.evaluation.sampling.max_tokens, "evaluation.prompts")

    def _check(self, prompts: Path, systems: list[str | None], answer: int, where: str) -> list[str]:
        if self.chat is None or self.context is None:
            return []
        found = find_too_long(prompts, self.chat, systems, room=self.context - answer)
        warning = context_warning(found, context=self.context, answer=answer, where=where)
        return [warning] if warning else []


def thinking_warnings(chat: Chat | None, config: Config) -> list[str]:
    """At most one line, where the template knows thinking and the config says nothing of it."""
    said = None if chat is None else unsaid(chat.source, config.model, opened=chat.opens_thinking)
    return [] if said is None else [said]


def prompt_check(chat: Chat | None, configs: Iterable[Config] = ()) -> PromptCheck | None:
    """What is called for each prompt that is read, before anything starts; null where the engine renders by itself."""
    if chat is None:
        return None
    return PromptCheck(chat, [s for c in configs for s in c.sampling.system_prompts[: c.sampling.n]])


def check_settings(config: Config, base: Path) -> None:
    """Templates, model files, tokenizer, engine and lengths of one arm. Raises: InputError."""
    check_model_folder(base)
    check_backends(config.tracking.backends)
    check_placement(config.model, config.resources)
    check_capabilities(config)
    if (method := conditioning(base)) is not None:
        check_steer(config.steer, method)
    context, generates = context_length(config, base), not config.episodes.source
    for key, tokens in (
        ("sampling.max_tokens", config.sampling.max_tokens if generates else 0),
        ("refine.max_tokens", config.refine.max_tokens if generates else 0),
        ("evaluation.sampling.max_tokens", config.evaluation.sampling.max_tokens if has_evaluation(config) else 0),
    ):
        if context is not None and tokens >= context:
            raise InputError(
                f"{key} is {tokens}, which leaves no room for a prompt in the context of {context}; lower it, or set "
                "model.max_model_len"
            )
    if generates or config.labels_given:
        check_generation(config, base)


def check_trained_names(config: Config) -> None:
    """Raises: InputError where an arm's `steer` names what its model will not know."""
    if config.merge is None and method_class(config.train.method).conditioned:
        check_names(config.steer, config.objectives)


def check_asked_of(model: Path, config: Config, prompts: Path) -> None:
    """What a model folder is asked for by the columns of prompts. Raises: InputError."""
    if (method := conditioning(model)) is not None:
        check_prompts(config.steer, method, prompts)


def check_held_out_columns(arms: dict[str, Config], prompts: Path) -> None:
    """Raises: InputError for a held-out prompt without the scores of `steer.column`."""
    for config in arms.values():
        if config.merge is None and method_class(config.train.method).conditioned:
            check_columns(config.steer, config.objectives, columns_of(prompts))


def _prompts_key(config: Config) -> str:
    """Arms alike in this are checked once."""
    return config.model_dump_json(include={"prompts", "iterations", "sampling"})


def each_prompts(
    config: Config, scratch: Path, notes: list[str], files: PromptFiles, check: Check | None = None
) -> Iterator[int]:
    """Write each iteration's prompts to `scratch`, one after the other, and yield their number. `notes` is told what
    of the source is left out.

    Raises: InputError for a bad row, and for too few.
    """
    rounds, limit = config.iterations.count, config.prompts.limit
    if rounds == 1 or config.iterations.prompts == "same":
        counts = files.write(config, scratch, check=check)
        notes += counts.notes()
        yield counts.rows
        return
    if limit is None:
        raise InputError("iterations.prompts: diff needs prompts.limit, so that the next iteration can take the next")
    for iteration in range(1, rounds + 1):
        counts = files.write(config, scratch, skip=first_prompt(config, iteration), check=check)
        notes += counts.notes()
        found = counts.rows
        if found < limit:
            raise InputError(
                f"prompts.source: {config.prompts.source}: iteration {iteration} would have {found} new prompts, not "
                f"prompts.limit {limit}; give more prompts, a smaller limit or iterations.prompts=same"
            )
        yield found


def eval_config(config: Config, place: str = "judge") -> Config:
    """The config with the evaluation's own objectives and one of its judges, by its place there."""
    changes: dict[str, Any] = {"scoring": evaluation_scoring(config, place)}
    if config.evaluation.objectives:
        changes["objectives"] = config.evaluation.objectives
    return config.model_copy(update=changes)


def check_evaluation(config: Config, base: Path) -> None:
    """The judges and the objectives of the evaluation. Raises: InputError."""
    check_judges(config)
    for place in config.evaluation.all_judges:
        judge = judge_folder(config, base, place)
        if isinstance(judge, Path) and judge != base:
            check_model_folder(judge)
            check_weights(judge, trust_remote_code=config.model.trust_remote_code, served_only=True)
            if not config.model.own_engine:
                open_chat(config.model, judge)
    if len(load_objectives(eval_config(config))) < 2:
        raise InputError("evaluation.objectives: one given, two or more are needed, highest priority first")


def check_opponent(arms: Iterable[str], config: Config) -> None:
    """Raises: InputError where judges have no answers to judge, or `evaluation.pairwise.against` names no model of the
    run."""
    section, known = config.evaluation.pairwise, [VANILLA, *arms, REFERENCE]
    if not has_evaluation(config) and (section is not None or config.evaluation.judges):
        place = "judges" if section is None else "pairwise"
        raise InputError(f"evaluation.{place}: there are no held-out prompts; give evaluation.prompts")
    if section is not None and section.against not in known:
        raise InputError(f"evaluation.pairwise.against: {section.against!r} is not one of {', '.join(known)}")


def judge_folder(config: Config, base: AnyPath, place: str = "judge") -> AnyPath | None:
    """The model folder of a judge that has a pass of its own, by its place in `evaluation`; None where it has none.

    Raises: InputError for a judge that is neither known, nor a dotted path, nor a model folder, nor on the hub.
    """
    judge = config.evaluation.all_judges[place]
    if not judge.own_pass:
        return None
    folder = base if judge.folder is None else as_path(judge.folder)
    if judge.folder and not is_file(folder / "config.json") and is_hub_id(judge.folder):
        try:
            return fetch_model(Model(path=judge.folder))
        except InputError as e:
            raise InputError(str(e).replace("model.path", f"evaluation.{place}", 1)) from e
    if not is_file(folder / "config.json"):
        raise InputError(
            f"evaluation.{place}: {str(folder)!r} is not `base`, `self`, a dotted path module:judge, a model folder or "
            "a hub id (owner/name)"
        )
    return folder
