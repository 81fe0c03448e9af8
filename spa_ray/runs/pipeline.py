"""The pipeline: every arm through prompts, generate, build, train (iterated) and evaluate, each stage once.

Comes in: arm name -> config (one run). Goes out: the run folder, filled. A stage whose hash stands is reused, so arms
share what is equal and a second call resumes. Never: what a stage computes.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from spa_ray.config.models import Config
from spa_ray.data.files import AnyPath, as_path, copy_file, is_local, write_json
from spa_ray.data.left_out import FILE as LEFT_OUT
from spa_ray.data.left_out import write_list
from spa_ray.engine.cpu_dtype import with_dtype
from spa_ray.errors import InputError
from spa_ray.logs import driver_log
from spa_ray.preferences import live_reasons
from spa_ray.rollout.settings import ChatSettings
from spa_ray.rollout.template import template_text
from spa_ray.runs import stages as address
from spa_ray.runs.first_day import first_day, record_first_day
from spa_ray.runs.folder import RunFolder, Stage
from spa_ray.runs.hashing import digest, file_hash, model_hash, stage_hash
from spa_ray.runs.lock import RunLock
from spa_ray.runs.manifest import write_manifest, write_run_config
from spa_ray.runs.models import fetch_model, shared_model
from spa_ray.runs.plan import make_plan
from spa_ray.runs.plan_compare import PLAN, compare
from spa_ray.runs.preflight import check_run, has_evaluation, judge_folder
from spa_ray.runs.preflight_cluster import check_cluster, live_nodes
from spa_ray.runs.preflight_files import disk_warning
from spa_ray.runs.preflight_memory import check_training_memory
from spa_ray.runs.progress import Progress, train_counter
from spa_ray.runs.prompt_files import PromptFiles
from spa_ray.runs.shared_folder import check_shared
from spa_ray.runs.signal import SignalWatch

LOG = Path("logs") / "driver.jsonl"
STAGES = ("generate", "build", "train", "evaluate")


@dataclass
class ArmState:
    """Where an arm stands: its current policy and the stages of its iterations."""

    name: str
    config: Config
    model: AnyPath  # as every node of the cluster is told
    model_hash: str
    tau: float | None = None
    episodes: Stage | None = None
    iterations: list[dict[str, Any]] = field(default_factory=list)
    stages: dict[int, dict[str, str]] = field(default_factory=dict)


class Pipeline:
    """One run. Call `run` once; `until` ends it after that stage of the first iteration."""

    def __init__(self, arms: dict[str, Config], *, progress: Progress, until: str = "evaluate", verbose: bool = False):
        if until not in STAGES:
            raise InputError(f"--until {until}: no such stage; one of {', '.join(STAGES)}")
        arms = {name: with_dtype(config) for name, config in arms.items()}
        self.arms, self.until, self.progress, self.verbose = arms, until, progress, verbose
        first = next(iter(arms.values()))
        self.folder = RunFolder(as_path(first.run_dir))
        self.base = fetch_model(first.model)
        self.shared_base = shared_model(first.model, self.base)
        self.base_hash = model_hash(self.base)
        self.day = first_day(self.folder.path)
        self.chat = ChatSettings.of(first.model, day=self.day)
        self.chat_key = self.chat.key(template_text(self.base))
        self.used: dict[str, dict[str, Any]] = {}
        self.started = datetime.now(UTC)
        self.prompt_files = PromptFiles()
        self._checked = False

    def run(self) -> dict[str, Any]:
        """Run or resume everything, on a Ray that is connected, under `lock()`.

        Returns: DESIGN's `spa run --json` object. Raises: InputError, RunError.
        """
        check_shared(self.folder.path)
        path, name = self.folder.path, next(iter(self.arms.values())).name
        # An object store takes no appended lines: there the driver's log is what Ray's job log holds.
        with driver_log(path / LOG, run=name, verbose=self.verbose) if isinstance(path, Path) else nullcontext():
            return self._run()

    def _run(self) -> dict[str, Any]:
        states = self._begin()
        rounds = max(state.config.iterations.count for state in states.values())
        for iteration in range(1, rounds + 1):
            active = {name: s for name, s in states.items() if s.config.iterations.count >= iteration}
            self._iterate(active, iteration)
            if self.until != "evaluate":
                break
        metrics = self._evaluate(states) if self.until == "evaluate" else {}
        compared = compare(self.folder, self.plan)
        write_manifest(self.folder, started=self.started, stages=self.used, compared=compared)
        arms = {name: {"iterations": s.iterations, "metrics": metrics.get(name, {})} for name, s in states.items()}
        vanilla = {"vanilla": {"metrics": metrics["vanilla"]}} if metrics else {}
        return {"run_dir": str(self.folder.path), "arms": arms, **vanilla}

    def lock(self) -> RunLock:
        """What `run` is to be called under: one driver a run folder."""
        return RunLock(self.folder.path, say=self.progress.say)

    def _begin(self) -> dict[str, ArmState]:
        write_run_config(self.folder, self.arms)
        record_first_day(self.folder.path, self.day)
        write_json(self.folder.path / PLAN, self.plan)
        for line in write_list(self.prompt_files.dropped, self.folder.path / LEFT_OUT):
            self.progress.say_once(f"warning: {line}")
        return {name: ArmState(name, config, self.shared_base, self.base_hash) for name, config in self.arms.items()}

    @cached_property
    def plan(self) -> dict[str, Any]:
        """`spa plan`'s, made once."""
        return make_plan(self.arms, folder=self.base)

    def check(self) -> None:
        """What can be known before Ray starts or anything is written; warnings are said. Raises: InputError."""
        warnings = check_run(self.arms, self.base, self.prompt_files)
        if isinstance(self.folder.path, Path):
            sizes = self.plan["output_gib"]
            full = disk_warning(self.folder.path, models_gib=sizes["models"], rest_gib=sizes["rest"])
            warnings += [full] if full else []
        for line in warnings:
            self.progress.say(f"warning: {line}")

    def _check_cluster(self) -> None:
        """Once, before the first stage that is not done yet: what Ray has against what the run asks for."""
        if not self._checked:
            config = next(iter(self.arms.values()))
            stored = not (is_local(self.folder.path) and is_local(self.shared_base))
            stages = STAGES[: STAGES.index(self.until) + 1]
            check_cluster(config, stages=stages, say=self.progress.say, one_node=stored)
            if "train" in stages:
                check_training_memory(self.arms, self.base, live_nodes())
            self._checked = True

    def _eval_prompts(self, config: Config) -> Stage:
        return self._prompt_stage("evalprompts", lambda out: self.prompt_files.write_held_out(config.evaluation, out))

    def _iterate(self, states: dict[str, ArmState], iteration: int) -> None:
        for state in states.values():
            state.iterations.append({})
            state.episodes = self._generate(state, iteration, states)
            state.iterations[-1]["episodes"] = str(state.episodes.folder / "episodes")
        if self.until != "generate":
            builds = {name: self._build(state, iteration) for name, state in states.items()}
            for name, stage in builds.items():
                states[name].iterations[-1]["pairs"] = str(stage.folder / "pairs")
                states[name].iterations[-1]["funnel"] = stage.facts()["funnel"]
            if self.until != "build":
                for name, stage in self._train(states, builds).items():
                    states[name].iterations[-1]["model"] = str(stage.folder / "model")
        for state in states.values():
            self._record(state)

    def _record(self, state: ArmState, **stages: Stage) -> None:
        """Write the arm's record of this iteration; `stages` join it before they begin, so that `clean` spares them."""
        names = state.stages.setdefault(len(state.iterations), {})
        names.update({key: stage.folder.name for key, stage in stages.items()})
        record = {**state.iterations[-1], "stages": names}
        write_json(self.folder.arm_file(state.name, len(state.iterations)), record)

    def _done(self, stage: Stage) -> bool:
        """Whether the stage stands already; if so it counts as used."""
        if stage.done:
            self.used[stage.folder.name] = stage.facts()
            self.progress.reused(stage.name, stage.folder)
        return stage.done

    def _finish(self, stage: Stage, started: float, **facts: Any) -> None:
        self.progress.finished(stage.folder)
        self.used[stage.folder.name] = record = stage.finish(started, **facts)
        logging.getLogger(__name__).info("stage finished", extra={"stage": stage.name, "facts": record})

    # --- prompts and generate ---------------------------------------------------------------------------------------

    def _prompts(self, config: Config, skip: int) -> Stage:
        return self._prompt_stage("prompts", lambda out: self.prompt_files.write(config.prompts, out, skip=skip))

    def _prompt_stage(self, name: str, write: Callable[[Path], Any]) -> Stage:
        """Each command reads its prompts again (a bad row must show at once); their contents are the address."""
        started = time.time()
        with tempfile.TemporaryDirectory() as scratch:
            fresh = Path(scratch) / "prompts.parquet"
            counts = write(fresh)
            stage = self.folder.stage(name, stage_hash(name, 1, {}, [file_hash(fresh)]))
            if not self._done(stage):
                copy_file(fresh, stage.folder / "prompts.parquet")
                self._finish(stage, started, **counts.to_dict())
        return stage

    def _generate_stage(self, state: ArmState, iteration: int) -> tuple[Stage, Stage, Stage | None]:
        """The prompts, the stage, and the last iteration's episodes where their refined answers are used again."""
        config = state.config
        fresh = config.iterations.prompts == "diff"
        skip = (iteration - 1) * (config.prompts.limit or 0) if fresh else 0
        if fresh and iteration > 1 and not skip:
            raise InputError(
                "iterations.prompts: diff needs prompts.limit, so that the next iteration can take the next"
            )
        prompts = self._prompts(config, skip)
        earlier = state.episodes if config.iterations.reuse_refined and iteration > 1 else None
        digest = address.generate_hash(
            config,
            iteration=iteration,
            prompts=prompts.hash,
            model=state.model_hash,
            earlier=earlier.hash if earlier else None,
            chat=self.chat_key,
        )
        return prompts, self.folder.stage("generate", digest), earlier

    def _sharing(
        self, stage: Stage, states: Mapping[str, ArmState], first: ArmState, iteration: int
    ) -> dict[str, Config]:
        """The arms that use the episodes that `first` is about to generate; they come after it."""
        later = list(states.values())[list(states).index(first.name) :]
        return {s.name: s.config for s in later if self._generate_stage(s, iteration)[1].hash == stage.hash}

    def _generate(self, state: ArmState, iteration: int, states: Mapping[str, ArmState]) -> Stage:
        from spa_ray.generation.setup import Task
        from spa_ray.generation.stage import generate

        config = state.config
        prompts, stage, earlier = self._generate_stage(state, iteration)
        self._record(state, prompts=prompts, generate=stage)
        if not self._done(stage):
            self._check_cluster()
            started = time.time()
            stage.begin(address.attempt(config))
            watch = SignalWatch(
                config,
                stage.folder / "episodes",
                count=self.progress.counter("generate"),
                say=self.progress.say,
                arms=self._sharing(stage, states, state, iteration),
            )
            counts = generate(
                config,
                Task(iteration=iteration, day=self.day),
                prompts=prompts.folder / "prompts.parquet",
                out=stage.folder / "episodes",
                checkpoint=stage.folder / "checkpoint",
                model=state.model,
                earlier=earlier.folder / "episodes" if earlier else None,
                config_hash=stage.hash,
                on_progress=watch,
                observe=partial(live_reasons, config=config),
                verbose=self.verbose,
            )
            watch.finish(counts.rows)
            self._finish(stage, started, **counts.to_dict())
        self.progress.say_errors(f"generate {state.name}", stage.facts(), stage.folder / "episodes")
        return stage

    # --- build ------------------------------------------------------------------------------------------------------

    def _build(self, state: ArmState, iteration: int) -> Stage:
        from spa_ray.runs.build import build_into

        assert state.episodes is not None
        frozen = state.tau if iteration > 1 else None  # τ of the first iteration holds for the later ones
        digest = address.build_hash(state.config, episodes=state.episodes.hash, frozen_tau=frozen)
        stage = self.folder.stage("build", digest)
        self._record(state, build=stage)
        if not self._done(stage):
            with self.progress.step("build"):
                build_into(stage, state.episodes.folder / "episodes", state.config, frozen_tau=frozen)
            self.used[stage.folder.name] = stage.facts()
        state.tau = stage.facts()["funnel"]["tau"]
        return stage

    # --- train ------------------------------------------------------------------------------------------------------

    def _train(self, states: dict[str, ArmState], builds: dict[str, Stage]) -> dict[str, Stage]:
        """Train what is not trained yet, all in one worker group; then every arm's policy is its new model."""
        from spa_ray.runs.build import check_pairs
        from spa_ray.training.launch import Job, train_jobs
        from spa_ray.training.stored import train_job

        trained: dict[str, Stage] = {}
        jobs: dict[str, Job] = {}
        for name, state in states.items():
            pairs = builds[name]
            check_pairs(name, pairs.facts()["funnel"], pairs.folder)
            stage = self.folder.stage(
                "train",
                address.train_hash(state.config, pairs=pairs.hash, model=state.model_hash, chat=self.chat_key),
            )
            trained[name] = stage
            self._record(state, train=stage)
            if stage.folder.name not in jobs and not self._done(stage):
                jobs[stage.folder.name] = train_job(
                    name=name,
                    pairs=pairs.folder / "pairs",
                    model=state.model,
                    out=stage.folder / "model",
                    train=state.config.train,
                    seed=state.config.seed,
                    work=stage.folder / "work",
                    trust_remote_code=state.config.model.trust_remote_code,
                    tracking=state.config.tracking,
                    cache=self.folder.path / "cache",
                    chat=self.chat,
                    context=state.config.model.max_model_len,
                )
        if jobs:
            self._check_cluster()
            for name in {stage.folder.name: name for name, stage in trained.items()}.values():
                if trained[name].folder.name in jobs:
                    trained[name].begin(address.attempt(states[name].config))
            first = next(iter(states.values())).config
            results = train_jobs(
                list(jobs.values()),
                first.resources,
                storage=self.folder.path / "ray_train",
                name=f"train-{digest(sorted(jobs))}",
                verbose=self.verbose,
                on_progress=train_counter(self.progress),
            )
            for (folder_name, _), result in zip(jobs.items(), results, strict=True):
                stage = next(s for s in trained.values() if s.folder.name == folder_name)
                hashed = model_hash(stage.folder / "model")
                self._finish(stage, time.time() - result.seconds, **result.to_dict(), model_hash=hashed)
        for name, stage in trained.items():
            states[name].model = stage.folder / "model"
            states[name].model_hash = stage.facts().get("model_hash") or model_hash(states[name].model)
        return trained

    # --- evaluate ---------------------------------------------------------------------------------------------------

    def _evaluate(self, states: dict[str, ArmState]) -> dict[str, Any]:
        """Metrics of the base model, `vanilla`, and of every arm's last model: arm -> family -> metrics."""
        from spa_ray.runs.evaluate import Subject, evaluate, run_metrics

        first = next(iter(states.values()))
        config = first.config
        if not has_evaluation(config):
            return {}
        prompts = self._eval_prompts(config)
        judge = judge_folder(config, self.shared_base)
        models = {"vanilla": (self.shared_base, self.base_hash)}
        models |= {name: (state.model, state.model_hash) for name, state in states.items()}
        judge_hash = "" if judge is None else self.base_hash if judge == self.shared_base else model_hash(judge)
        stages: dict[str, Stage] = {}
        pending: dict[str, Subject] = {}
        for name, (model, hashed) in models.items():
            address_of = address.evaluate_hash(
                config, prompts=prompts.hash, model=hashed, judge=judge_hash, chat=self.chat_key
            )
            stages[name] = stage = self.folder.stage("evaluate", address_of)
            if stage.folder.name not in pending and not self._done(stage):
                pending[stage.folder.name] = Subject(model, stage)
        answers = {name: str(stage.folder / "episodes") for name, stage in stages.items()}
        names = {"evalprompts": prompts.folder.name} | {name: stage.folder.name for name, stage in stages.items()}
        write_json(self.folder.path / "evaluation.json", {"answers": answers, "stages": names})
        if pending:
            self._check_cluster()
            for subject in pending.values():
                subject.stage.begin(address.attempt(config))
            evaluate(
                config,
                list(pending.values()),
                base=self.shared_base,
                judge=judge,
                prompts=prompts.folder / "prompts.parquet",
                work=self.folder.path / "stages",
                on_progress=self.progress.counter("evaluate"),
                verbose=self.verbose,
                day=self.day,
            )
            self.used |= {name: subject.stage.facts() for name, subject in pending.items()}
        for name, stage in stages.items():
            self.progress.say_errors(f"evaluate {name}", stage.facts(), stage.folder / "episodes")
        metrics = run_metrics(config, stages)
        write_json(self.folder.path / "metrics.json", metrics)
        return {name: {family: arms[name] for family, arms in metrics.items()} for name in models}
