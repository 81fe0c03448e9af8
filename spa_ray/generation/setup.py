"""From a config to what one engine's episodes need: chat, templates, judge, recipe. Also what is checked up front.

Comes in: a config and a model folder. Goes out: `Episodes`. Never: Ray.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, Literal

from spa_ray.config.benchmark import BenchmarkConfig
from spa_ray.config.models import Config
from spa_ray.config.pairwise import Pairwise
from spa_ray.config.plugs import JUDGES, PAIRWISE, load_dotted
from spa_ray.config.section import JudgeSection
from spa_ray.engine.checked import CheckedEngine
from spa_ray.engine.protocol import Engine
from spa_ray.errors import InputError
from spa_ray.generation.benchmark import QUALITY, Plays, make_benchmark
from spa_ray.generation.endpoint_judge import Ask
from spa_ray.generation.episode import Draw, Episodes, Recipe
from spa_ray.generation.judging import Parts, Scorer, compile_pattern, judge_labels
from spa_ray.generation.pairwise import Comparisons, section_of
from spa_ray.generation.ranking import Ranker
from spa_ray.generation.templates import PairTemplate, Templates
from spa_ray.objectives import load_objectives
from spa_ray.rollout.chat import Chat, open_chat
from spa_ray.rollout.settings import ChatSettings

SCALE = (1, 10)  # of a benchmark's judge that gives numbers


@dataclass(frozen=True)
class Task:
    """What a pass does with a row: a whole SPA episode; one answer to a held-out prompt; scores for given answers; a
    comparison of two given answers by the judge of `evaluation.pairwise`, which `scoring.judge` names here too; or the
    play of a prompt of the benchmark that `benchmark` names in `evaluation.benchmarks`.

    `scored`: whether answers get scores, by the judge that `scoring.judge` names.
    `given`: of `score`, whether a data set brought the answers, on which the run is to train.
    `day`: what chat templates see as today where `model.date` is null; null: today.
    """

    kind: Literal["episode", "answer", "score", "compare", "play"] = "episode"
    iteration: int = 1
    scored: bool = True
    given: bool = False
    day: date | None = None
    benchmark: str = ""

    @property
    def stage(self) -> str:
        """Which stage a line on stderr names."""
        if self.given:
            return "label"
        return "generate" if self.kind == "episode" else "evaluate"


def make_episodes(
    config: Config, task: Task, engine: Engine, model: Path, ask: Ask | None = None
) -> Episodes | Plays | Comparisons:
    """Everything that runs on one engine. `ask` reaches the judge's endpoint, where it has one.

    Raises: InputError for templates, scales and judges that do not fit.
    """
    checked = engine if isinstance(engine, CheckedEngine) else CheckedEngine(engine)
    objectives = load_objectives(config)
    chat = engine_chat(config, task, engine, model)
    templates = Templates(config, objectives)
    if task.kind == "play":
        section = config.evaluation.benchmarks[task.benchmark]
        judge = benchmark_judge(section, Parts(config, checked, chat, templates, ask))
        return Plays(section, checked, chat, config.seed, ask, judge)
    if task.kind == "compare":
        return make_comparisons(config, Parts(config, checked, chat, templates, ask))
    judge = make_judge(config, task, checked, chat, templates, ask)
    ranker = make_ranker(config, task, Parts(config, checked, chat, templates, ask))
    refine_chat = chat.with_kwargs(config.refine.chat_template_kwargs)
    return Episodes(checked, chat, templates, judge, recipe(config, task), refine_chat=refine_chat, ranker=ranker)


def engine_chat(config: Config, task: Task, engine: Engine, model: Path) -> Chat:
    """The chat of the model that an engine serves, by the same tokenizer as training's.

    Raises: InputError where vLLM reads text by another tokenizer than the model folder's.
    """
    if config.model.own_engine:
        settings = ChatSettings.of(config.model, day=task.day)
        return Chat(engine.tokenizer, model=str(model), settings=settings)
    chat = open_chat(config.model, model, day=task.day)
    if not chat.encodes_as(engine.tokenizer):
        raise InputError(
            f"model {model}: vLLM's tokenizer ({type(engine.tokenizer).__name__}) makes other ids of a text than the "
            "folder's; remove tokenizer settings from model.engine_kwargs"
        )
    return chat


def asked_judge(config: Config, task: Task) -> JudgeSection | None:
    """The judge that a pass asks; None where it asks none."""
    if task.kind == "play":
        return config.evaluation.benchmarks[task.benchmark].judged_by
    return config.scoring.judged_by if task.scored else None


def make_judge(
    config: Config, task: Task, engine: Engine, chat: Chat, templates: Templates, ask: Ask | None = None
) -> Scorer | None:
    """The judge that `config.scoring` names; None where answers stay without scores."""
    if not task.scored:
        return None
    section = config.scoring.judged_by
    found: Scorer = load_dotted(JUDGES[section.kind], where="judge").of(
        section, Parts(config, engine, chat, templates, ask)
    )
    return found


def make_ranker(config: Config, task: Task, parts: Parts) -> Ranker | None:
    """What scores an episode's answers by comparing them; None where they are scored one by one."""
    compare, judge = config.scoring.compare, config.scoring.judged_by
    if compare is None or task.kind != "episode":
        return None
    pairwise = Pairwise.model_validate({**compare.model_dump(), "judge": config.scoring.judge or "self"})
    evaluation = config.evaluation.model_copy(update={"pairwise": pairwise})  # where pairwise judges look for it
    asked = replace(parts, config=config.model_copy(update={"evaluation": evaluation}))
    comparer = load_dotted(PAIRWISE[judge.kind], where="scoring.judge").of(judge, asked)
    return Ranker(comparer, parts.templates.objectives, config.scoring.scale)


def make_comparisons(config: Config, parts: Parts) -> Comparisons:
    """The pairwise judge of `evaluation.pairwise`, whose place in this pass `scoring.judge` holds."""
    section = config.scoring.judged_by
    judge = load_dotted(PAIRWISE[section.kind], where="judge").of(section, parts)
    both = section_of(config).both_orders
    return Comparisons(judge, parts.templates.objectives, both_orders=both, seed=config.seed)


def benchmark_judge(section: BenchmarkConfig, parts: Parts) -> Any:
    """The `Scorer` or `Comparer` of a benchmark whose judge writes no text, on a scale from 1 to 10; else None."""
    judge = section.judged_by
    if judge is None or judge.reads_prompts:
        return None
    scoring = parts.config.scoring.model_copy(update={"scale": SCALE})
    config = parts.config.model_copy(update={"scoring": scoring, "objectives": (QUALITY.name,)})
    return load_dotted(_registry(section)[judge.kind], where="judge").of(judge, replace(parts, config=config))


def _registry(section: BenchmarkConfig) -> dict[str, str]:
    return PAIRWISE if make_benchmark(section).judged == "compare" else JUDGES


def recipe(config: Config, task: Task) -> Recipe:
    objectives = load_objectives(config)
    if task.kind != "episode":
        return Recipe(
            objectives=objectives,
            n=1,
            sample=Draw(config.evaluation.sampling, "answer"),
            systems=(None,),
            refine=None,
            resample_duplicates=False,
            seed=config.seed,
            iteration=0,
        )
    sampling, refine = config.sampling, config.refine
    return Recipe(
        objectives=objectives,
        n=sampling.n,
        sample=Draw(sampling, "sample"),
        systems=sampling.system_prompts,
        refine=Draw(refine, "refine", refine.attempts),
        resample_duplicates=sampling.resample_duplicates,
        seed=config.seed,
        iteration=task.iteration,
    )


def check_generation(config: Config, model: Path) -> None:
    """What can be known before an engine starts: chat template, judge and refinement templates, labels, the judge.

    Raises: InputError.
    """
    Templates(config, load_objectives(config))
    compile_pattern(config.scoring.pattern)
    section = config.scoring.judged_by
    load_dotted(JUDGES[section.kind], where="scoring").check(section, "scoring.judge")
    if config.scoring.compare is not None:
        PairTemplate(config.scoring.compare, load_objectives(config), key="scoring.compare.prompt")
        load_dotted(PAIRWISE[section.kind], where="scoring").check(section, "scoring.judge")
    check_judges(config)
    if config.model.own_engine:
        return
    chat = open_chat(config.model, model)
    if config.scoring.judged_by.asks_engine:
        judge_labels(chat.with_kwargs(config.scoring.chat_template_kwargs), config.scoring)
    chat.with_kwargs(config.refine.chat_template_kwargs)


def check_judges(config: Config) -> None:
    """The evaluation's judges, and the prompt that compares two answers. Raises: InputError."""
    for place, section in config.evaluation.all_judges.items():
        registry, where = PAIRWISE if place.startswith("pairwise") else JUDGES, f"evaluation.{place}"
        load_dotted(registry[section.kind], where=where).check(section, where)
    for name, benchmark in config.evaluation.benchmarks.items():
        if (judge := benchmark.judged_by) is not None and not judge.reads_prompts:
            where = f"evaluation.benchmarks.{name}.judge"
            load_dotted(_registry(benchmark)[judge.kind], where=where).check(judge, where)
    if config.evaluation.pairwise is not None:
        PairTemplate(config.evaluation.pairwise, load_objectives(config))
