"""The table of stages: what each one is called, what its key covers, what it reads and writes, and how it runs.

`spa run`, the single-stage commands, the plan and `spa preview` read this table; `recipe.py` says which stages an arm
consists of. A stage's runner gets all works that are to be done at a time, so that training starts its workers once
and the evaluation passes over all models together.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from spa_ray import evaluation, generation, preferences, training
from spa_ray.config.models import Config
from spa_ray.engine.placement import engine_resources
from spa_ray.errors import InputError, RunError
from spa_ray.pipeline import stage_keys as keys
from spa_ray.pipeline.merges import of
from spa_ray.pipeline.progress import train_counter
from spa_ray.pipeline.prompt_files import PromptFiles
from spa_ray.pipeline.work import Context, Work
from spa_ray.preferences import live_reasons
from spa_ray.storage.files import copy_file, read_json
from spa_ray.storage.folder import StageFolder
from spa_ray.storage.hashing import digest, model_hash, stage_hash

Draw = Callable[[PromptFiles, Config, keys.Known, Path], Any]  # writes prompts to a file, returns their counts


@dataclass(frozen=True)
class Stage:
    """A row of the table. `inputs` are the roles whose hashes the key covers, in this order; one that a work does not
    have is left out."""

    name: str
    version: int
    settings: Callable[[Config, keys.Known], Mapping[str, Any]]
    inputs: tuple[str, ...]
    output: str  # in the stage's folder
    run: Callable[[Sequence[Work], Context], None]
    told: tuple[str, ...] = ()  # facts that an arm's record repeats
    draw: Draw | None = None  # of a stage whose key is its contents
    check: Callable[[Work], None] | None = None  # of each work, before any of them begins
    rows: str | None = "episodes"  # the folder of rows that may hold errors
    gpus: Callable[[Work], float] = lambda work: 0.0  # that it holds while it runs

    def key(self, config: Config, hashes: Mapping[str, str], known: keys.Known | None = None) -> str:
        """The address of the stage's output. Roles beyond `inputs` (the models of a method's recipe) count by name."""
        settings = self.settings(config, known or keys.Known())
        more = [f"{role}:{hashes[role]}" for role in sorted({*hashes} - {*self.inputs})]
        return stage_hash(self.name, self.version, settings, [hashes[r] for r in self.inputs if r in hashes] + more)

    @property
    def recorded(self) -> bool:
        """Whether an arm's record and the plan name it: its output is a folder that users look into."""
        return self.draw is None or self.output == "episodes"

    def output_hash(self, stage: StageFolder) -> str:
        """What the keys of later stages cover of the output: a model's files, of all else its own key."""
        if self.output != "model":
            return stage.hash
        return stage.facts().get("model_hash") or model_hash(stage.folder / self.output)

    def work(self, works: Sequence[Work], context: Context) -> None:
        """Run it on the run's account. Raises: BudgetSpentError, and what `run` does."""
        config = works[0].config
        gpus = 0.0 if config.resources.price_per_gpu_hour is None else self.gpus(works[0])
        with context.meter.stage(self.name, gpus=gpus):
            self.run(works, context)


def first_prompt(config: Config, iteration: int) -> int:
    """How many of the source's prompts earlier iterations have used up."""
    return (iteration - 1) * (config.prompts.limit or 0) if config.iterations.prompts == "diff" else 0


def _draw_prompts(files: PromptFiles, config: Config, known: keys.Known, out: Path) -> Any:
    return files.write(config, out, skip=first_prompt(config, known.iteration))


def _draw_held_out(files: PromptFiles, config: Config, known: keys.Known, out: Path) -> Any:
    return files.write_held_out(config.evaluation, out)


def _draw_benchmark(files: PromptFiles, config: Config, known: keys.Known, out: Path) -> Any:
    return files.write_benchmark(config.evaluation, known.benchmark, out)


def _draw_episodes(files: PromptFiles, config: Config, known: keys.Known, out: Path) -> Any:
    return files.write_episodes(config, out)


def run_prompts(works: Sequence[Work], context: Context) -> None:
    """Each command draws its prompts anew, since a bad row must show at once; a file that is there stays."""
    for work in works:
        started = time.time()
        copy_file(work.input("contents"), work.stage.folder / "prompts.parquet")
        context.finish(work, started)


def run_import(works: Sequence[Work], context: Context) -> None:
    """Given answers as episodes: no engine takes part."""
    for work in works:
        started = time.time()
        copy_file(work.input("contents"), work.stage.folder / "episodes" / "episodes.parquet")
        context.finish(work, started)


def run_label(works: Sequence[Work], context: Context) -> None:
    """Given answers to the judge's scores, one pass for each work."""
    from spa_ray.pipeline.judged import label

    for work in works:
        work.stage.begin(keys.attempt(work.config))
        label(work, context, on_progress=context.progress.counter("label"))


def run_generate(works: Sequence[Work], context: Context) -> None:
    """Prompts to episodes, one pass for each work."""
    from spa_ray.generation.setup import Task
    from spa_ray.generation.stage import generate
    from spa_ray.pipeline.signal import SignalWatch
    from spa_ray.steering.actor import upstream_of

    for work in works:
        started, episodes = time.time(), work.stage.folder / "episodes"
        uses = [(work.input("model"), work.config.steer)]
        upstream = upstream_of(work.config, uses, prompts=work.input("prompts"), day=context.day)
        work.stage.begin(keys.attempt(work.config))
        count = context.progress.counter("generate")
        watch = SignalWatch(work.config, episodes, count=count, say=context.progress.say, arms=work.arms)
        counts = generate(
            work.config,
            Task(iteration=work.known.iteration, day=context.day),
            prompts=work.input("prompts"),
            out=episodes,
            checkpoint=work.stage.folder / "checkpoint",
            model=work.input("model"),
            earlier=work.inputs.get("earlier"),
            upstream=upstream,
            config_hash=work.stage.hash,
            on_progress=watch,
            observe=partial(live_reasons, config=work.config),
            meter=context.meter,
            verbose=context.verbose,
        )
        watch.finish(counts.rows)
        context.finish(work, started, **counts.to_dict())


def run_build(works: Sequence[Work], context: Context) -> None:
    """Episodes to pairs and a funnel."""
    from spa_ray.pipeline.build import build_into

    for work in works:
        started = time.time()
        with context.progress.step("build"):
            funnel = build_into(work.stage.folder, work.input("episodes"), work.config, frozen_tau=work.known.tau)
        context.finish(work, started, funnel=funnel)


def run_train(works: Sequence[Work], context: Context) -> None:
    """Pairs to models, all in one worker group."""
    from spa_ray.training.launch import train_jobs
    from spa_ray.training.stored import train_job

    jobs = []
    for work in works:
        config = work.config
        models = {role: work.input(role) for role in work.inputs if role not in ("pairs", "model", "base")}
        job = train_job(
            name=work.name,
            pairs=work.input("pairs"),
            model=work.input("model"),
            out=work.out or work.stage.folder / "model",
            train=config.train,
            seed=config.seed,
            work=work.stage.folder / ("job" if work.out else "work"),
            trust_remote_code=config.model.trust_remote_code,
            tracking=config.tracking,
            cache=context.cache,
            chat=context.chat,
            context=config.model.max_model_len,
            models=models,
        )
        jobs.append(job)
    for work in works:
        work.stage.begin(keys.attempt(work.config))
    results = train_jobs(
        jobs,
        works[0].config.resources,
        storage=context.root / "ray_train",
        name=f"train-{digest(sorted(work.stage.folder.name for work in works))}",
        verbose=context.verbose,
        on_progress=train_counter(context.progress),
    )
    for work, job, result in zip(works, jobs, results, strict=True):
        hashed = model_hash(job.out)
        context.finish(work, time.time() - result.seconds, **result.to_dict(), model_hash=hashed)


def run_merge(works: Sequence[Work], context: Context) -> None:
    """Models to their weighted mean, by a task of Ray."""
    import ray

    from spa_ray.training.merge import merge_stored

    task = ray.remote(merge_stored).options(num_cpus=1)
    for work in works:
        started, merge, out = time.time(), work.config.merge, work.stage.folder / "model"
        assert merge is not None
        work.stage.begin(keys.attempt(work.config))
        models: dict[str, float] = defaultdict(float)  # arms may share a model
        for arm, share in merge.shares.items():
            models[str(work.input(of(arm)))] += share
        with context.progress.step("merge"):
            try:
                ray.get(task.remote(dict(models), str(work.input("base")), str(out), merge.what,
                                    work.config.model.trust_remote_code))  # fmt: skip
            except ray.exceptions.RayTaskError as e:
                if isinstance(e.cause, InputError):
                    raise e.cause from e
                raise RunError(f"merge: {work.name}: {e.cause}; --verbose shows Ray's log") from e
        context.finish(work, started, model_hash=model_hash(out))


def _check_pairs(work: Work) -> None:
    from spa_ray.pipeline.build import check_pairs

    folder = work.input("pairs").parent
    check_pairs(work.name, read_json(folder / "funnel.json"), folder)


def run_evaluate(works: Sequence[Work], context: Context) -> None:
    """Held-out prompts to scored answers, or a benchmark's prompts to its plays, all models in one pass."""
    from spa_ray.pipeline.evaluate import evaluate

    for work in works:
        work.stage.begin(keys.attempt(work.config))
    counter = context.progress.counter(" ".join(filter(None, [works[0].stage.name, works[0].known.benchmark])))
    evaluate(works, context, on_progress=counter)


def run_score(works: Sequence[Work], context: Context) -> None:
    """Held-out answers to a further judge's scores, all models in one pass; or candidates to the judge's."""
    from spa_ray.pipeline.judged import score_again

    score_again(works, context, on_progress=_judged_counter(works, context))


def run_pairwise(works: Sequence[Work], context: Context) -> None:
    """Held-out answers to verdicts on pairs of them."""
    from spa_ray.pipeline.judged import compare

    compare(works, context, on_progress=_judged_counter(works, context))


def _judged_counter(works: Sequence[Work], context: Context) -> Any:
    for work in works:
        work.stage.begin(keys.attempt(work.config))
    return context.progress.counter(" ".join([works[0].stage.name, works[0].known.names[0]]))


def _engines_gpus(work: Work) -> float:
    import ray

    config, names = work.config, work.known.names
    judge = config.evaluation.all_judges.get(names[0]) if names else None
    if work.stage.name == "label":
        judge = config.scoring.judged_by
    if judge is not None and not (judge.asks_engine or judge.on_gpu):
        return 0.0
    share = engine_resources(config.model, config.resources, cluster_gpus=ray.cluster_resources().get("GPU", 0))
    return config.resources.engines.max * share.get("num_gpus", 0.0)


def _workers_gpus(work: Work) -> float:
    from spa_ray.training.launch import gpus_per_worker

    config = work.config
    return config.resources.train_workers * gpus_per_worker(config.resources)


ROWS = (
    Stage("prompts", 1, keys.prompts, ("contents",), "prompts.parquet", run_prompts, draw=_draw_prompts, rows=None),
    Stage("import", 1, keys.prompts, ("contents",), "episodes", run_import, draw=_draw_episodes, rows=None),
    Stage("label", 1, keys.label, ("answers", "model"), "episodes", run_label, gpus=_engines_gpus),
    Stage("generate", generation.STAGE_VERSION, keys.generate, ("prompts", "model", "earlier"), "episodes",
          run_generate, gpus=_engines_gpus),
    Stage("build", preferences.STAGE_VERSION, keys.build, ("episodes",), "pairs", run_build, told=("funnel",),
          rows=None),
    Stage("train", training.STAGE_VERSION, keys.train, ("pairs", "model"), "model", run_train, check=_check_pairs,
          rows=None, gpus=_workers_gpus),
    Stage("merge", training.MERGE_VERSION, keys.merge, ("base",), "model", run_merge, rows=None),
    Stage("evalprompts", 1, keys.prompts, ("contents",), "prompts.parquet", run_prompts, draw=_draw_held_out,
          rows=None),
    Stage("evaluate", evaluation.STAGE_VERSION, keys.evaluate, ("prompts", "model", "judge"), "episodes",
          run_evaluate, gpus=_engines_gpus),
    Stage("score", evaluation.STAGE_VERSION, keys.score, ("answers", "judge"), "episodes", run_score,
          gpus=_engines_gpus),
    Stage("rv", evaluation.STAGE_VERSION, keys.rv, ("answers", "judge"), "episodes", run_score, gpus=_engines_gpus),
    Stage("pairwise", evaluation.STAGE_VERSION, keys.pairwise, ("answers", "against", "judge"), "judgements",
          run_pairwise, rows=None, gpus=_engines_gpus),
    Stage("benchprompts", 1, keys.prompts, ("contents",), "prompts.parquet", run_prompts, draw=_draw_benchmark,
          rows=None),
    Stage("benchmark", evaluation.STAGE_VERSION, keys.benchmark, ("prompts", "model"), "episodes", run_evaluate,
          gpus=_engines_gpus),
)  # fmt: skip
STAGES = {row.name: row for row in ROWS}
ORDER = tuple(STAGES)
UNTIL = ("generate", "build", "train", "evaluate")  # where `spa run` may end; benchmarks are part of the evaluation
