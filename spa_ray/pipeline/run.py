"""The pipeline: every level of a run's recipe in turn, each stage once, in the run folder.

A stage whose key has a finished folder is reused, so arms share what is equal and a second call resumes.
"""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from spa_ray.config.models import Config
from spa_ray.data.left_out import FILE as LEFT_OUT
from spa_ray.data.left_out import write_list
from spa_ray.engine.cpu_dtype import with_dtype
from spa_ray.errors import InputError
from spa_ray.evaluation.benchmarks import benchmark_measures
from spa_ray.logs import driver_log
from spa_ray.pipeline.first_day import first_day, record_first_day
from spa_ray.pipeline.manifest import write_manifest, write_run_config
from spa_ray.pipeline.merges import tuned
from spa_ray.pipeline.models import fetch_model, shared_model
from spa_ray.pipeline.plan import make_plan
from spa_ray.pipeline.plan_compare import PLAN, compare
from spa_ray.pipeline.preflight import check_run, judge_folder
from spa_ray.pipeline.preflight_cluster import check_cluster, live_nodes
from spa_ray.pipeline.preflight_files import disk_warning
from spa_ray.pipeline.preflight_memory import check_training_memory
from spa_ray.pipeline.progress import Progress
from spa_ray.pipeline.prompt_files import PromptFiles
from spa_ray.pipeline.recipe import BASE, JUDGE, VANILLA, Node, key, levels
from spa_ray.pipeline.stages import ORDER, STAGES, UNTIL, Draw
from spa_ray.pipeline.work import Context, Work, meter_of
from spa_ray.rollout.settings import ChatSettings
from spa_ray.rollout.template import template_text
from spa_ray.steering.asking import conditioning
from spa_ray.storage.files import AnyPath, as_path, is_local, write_json
from spa_ray.storage.folder import EVALUATION, RunFolder, StageFolder
from spa_ray.storage.hashing import file_hash, model_hash
from spa_ray.storage.lock import RunLock
from spa_ray.storage.shared_folder import check_shared

WIN_RATES = "win_rates.json"
RV = "rv.json"
LOG = Path("logs") / "driver.jsonl"


class Pipeline:
    """One run. Call `run` once; `until` ends it after that stage of the first iteration."""

    def __init__(self, arms: dict[str, Config], *, progress: Progress, until: str = UNTIL[-1], verbose: bool = False):
        if until not in UNTIL:
            raise InputError(f"--until {until}: no such stage; one of {', '.join(UNTIL)}")
        arms = {name: with_dtype(config) for name, config in arms.items()}
        self.arms, self.until, self.progress, self.verbose = arms, until, progress, verbose
        first = next(iter(arms.values()))
        self.config = first  # what all arms share is read here: model, evaluation, resources
        self.folder = RunFolder(as_path(first.run_dir))
        self.base = fetch_model(first.model)
        self.shared_base = shared_model(first.model, self.base)
        self.base_hash = model_hash(self.base)
        day = first_day(self.folder.path)
        chat = ChatSettings.of(first.model, day=day)
        self.chat_key = chat.key(template_text(self.base))
        root = self.folder.path
        meter = meter_of(first, root)
        self.context = Context(progress, verbose, day, chat, root, meter, root / "stages", root / "cache")
        self.used: dict[str, dict[str, Any]] = {}
        self.started = datetime.now(UTC)
        self.prompt_files = PromptFiles()
        self.stages: dict[Node, StageFolder] = {}
        self.records: dict[tuple[str, int], dict[str, Any]] = {}  # what arms/ARM/iter_K.json is to hold
        self._checked = False

    def run(self) -> dict[str, Any]:
        """Run or resume everything, on a Ray that is connected, under `lock()`.

        Returns: DESIGN's `spa run --json` object. Raises: InputError, RunError.
        """
        check_shared(self.folder.path)
        path = self.folder.path
        # An object store takes no appended lines: there the driver's log is what Ray's job log holds.
        log = driver_log(path / LOG, run=self.config.name, verbose=self.verbose) if isinstance(path, Path) else None
        with log or nullcontext():
            self.begin()
            for level in levels(self.arms, conditioned=conditioning(self.base) is not None):
                first, at = level[0].iteration == 1, ORDER.index(level[0].stage)
                if self.until != UNTIL[-1] and not (first and at <= ORDER.index(self.until)):
                    break
                self._level(level)
            return self._end()

    def lock(self) -> RunLock:
        """What `run` is to be called under: one driver a run folder."""
        return RunLock(self.folder.path, say=self.progress.say)

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

    def begin(self) -> None:
        """Write what a run says of itself before its first stage."""
        self.folder.keep_used()
        write_run_config(self.folder, self.arms)
        record_first_day(self.folder.path, self.context.day)
        write_json(self.folder.path / PLAN, self.plan)
        for line in write_list(self.prompt_files.dropped, self.folder.path / LEFT_OUT):
            self.progress.say_once(f"warning: {line}")

    def _end(self) -> dict[str, Any]:
        metrics = self._metrics()
        compared = compare(self.folder, self.plan)
        spent = self.context.meter.total()
        if self.until == UNTIL[-1]:
            self.folder.release()
        write_manifest(self.folder, started=self.started, stages=self.used, compared=compared, spent=asdict(spent))
        evaluated: dict[str, dict[str, Any]] = {arm: {"metrics": found} for arm, found in metrics.items()}
        for arm, measures in self._benchmarks().items():
            evaluated.setdefault(arm, {"metrics": {}})["benchmarks"] = measures
        for arm, rates in self._pairwise().items():
            evaluated[arm]["pairwise"] = rates
        self._rv()
        self._cards(evaluated)
        nothing: dict[str, Any] = {"metrics": {}}
        arms = {arm: {"iterations": self._iterations(arm), **evaluated.get(arm, nothing)} for arm in self.arms}
        vanilla = {VANILLA: evaluated[VANILLA]} if VANILLA in evaluated else {}
        return {"run_dir": str(self.folder.path), "arms": arms, **vanilla}

    def _cards(self, evaluated: dict[str, dict[str, Any]]) -> None:
        """README.md in every model folder and beside every `pairs/`."""
        from spa_ray.pipeline.cards import Trained, model_card, pairs_card, write_card

        cards: dict[AnyPath, str] = {}
        for node, stage in self.stages.items():
            output = STAGES[node.stage].output
            if output not in ("pairs", "model"):
                continue
            rounds = 1 if node.stage == "merge" else self.arms[node.arm].iterations.count
            last = node.user == node.arm and node.iteration == rounds
            name = f"{node.config.name}-{node.user.replace(':', '-')}" + ("" if last else f"-{node.iteration}")
            if output == "pairs":
                cards.setdefault(stage.folder, pairs_card(node.config, name, stage.facts()["funnel"]))
                continue
            funnel = self.stages[node.inputs["pairs"]].facts()["funnel"] if "pairs" in node.inputs else None
            found = Trained(self.base, funnel, *((evaluated.get(node.arm), evaluated.get(VANILLA)) if last else ()))
            cards.setdefault(stage.folder / output, model_card(node.config, name, found))
        for folder, text in cards.items():
            write_card(folder, text)

    def _iterations(self, arm: str) -> list[dict[str, Any]]:
        return [
            {key: value for key, value in record.items() if key != "stages"}
            for (name, iteration), record in self.records.items()
            if name == arm and iteration
        ]

    def _level(self, nodes: list[Node]) -> None:
        """One stage of one iteration, for all arms: what several of them share is worked on once."""
        stage, works = STAGES[nodes[0].stage], self.works(nodes)
        self._record(nodes)
        if stage.check:
            for node in nodes:
                stage.check(replace(works[self.stages[node].folder.name], arms={node.user: node.config}))
        todo = [work for work in works.values() if not self._done(work.stage)]
        if todo:
            if stage.draw is None:
                self._check_cluster()
            stage.work(todo, self.context)
            self.used |= {work.stage.folder.name: work.stage.facts() for work in todo}
        for node in nodes:
            if stage.rows:
                found = self.stages[node]
                self.progress.say_errors(f"{stage.name} {node.arm}", found.facts(), found.folder / stage.rows)
        self._record(nodes, finished=True)

    def works(self, nodes: list[Node]) -> dict[str, Work]:
        """The works of one level by the names of their folders, shared ones once, with all arms that use them."""
        works: dict[str, Work] = {}
        for node in nodes:
            work = self._work(node)
            self.stages[node] = work.stage
            works.setdefault(work.stage.folder.name, work).arms[node.user] = node.config
        return works

    def _work(self, node: Node) -> Work:
        stage = STAGES[node.stage]
        if stage.draw:
            return self._drawn(node, stage.draw)
        tau = self.stages[node.tau].facts()["funnel"]["tau"] if node.tau else None
        known = replace(node.known, tau=tau, chat=self.chat_key)
        folder = self.folder.stage(stage.name, key(node, known, self._hash))
        inputs = {"base": self.shared_base, **{role: self._path(given) for role, given in node.inputs.items()}}
        return Work(folder, node.config, inputs, known)

    def _drawn(self, node: Node, draw: Draw) -> Work:
        """Each command draws its prompts again (a bad row must show at once); their contents are the address."""
        fresh = Path(self._scratch.name) / f"{node.label}-{node.arm}-{node.iteration}.parquet"
        counts = draw(self.prompt_files, node.config, node.known, fresh)
        address = STAGES[node.stage].key(node.config, {"contents": file_hash(fresh)})
        return Work(self.folder.stage(node.stage, address), node.config, {"contents": fresh}, facts=counts.to_dict())

    @cached_property
    def _scratch(self) -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory(prefix="spa-drawn-")

    @cached_property
    def _judges(self) -> dict[str, tuple[AnyPath | None, str]]:
        """By their place in `evaluation`: the model folder that judges in a pass of its own, and its hash."""
        found = {
            place: judge_folder(self.config, self.shared_base, place) for place in self.config.evaluation.all_judges
        }
        hashes = {at: self.base_hash if at == self.shared_base else model_hash(at) for at in found.values() if at}
        return {place: (at, hashes[at] if at else "") for place, at in found.items()}

    def _path(self, node: Node) -> AnyPath | None:
        if node.stage == BASE:
            return self.shared_base
        return (
            self._judges[node.judge][0] if node.stage == JUDGE else self.stages[node].folder / STAGES[node.stage].output
        )

    def _hash(self, node: Node) -> str:
        if node.stage == BASE:
            return self.base_hash
        return self._judges[node.judge][1] if node.stage == JUDGE else STAGES[node.stage].output_hash(self.stages[node])

    def _check_cluster(self) -> None:
        """Once, before the first stage that is not done yet: what Ray has against what the run asks for."""
        if not self._checked:
            stored = not (is_local(self.folder.path) and is_local(self.shared_base))
            stages = set(UNTIL[: UNTIL.index(self.until) + 1])
            if all(c.episodes.source and not c.labels_given for c in tuned(self.arms).values()):
                stages.discard("generate")
            check_cluster(self.config, stages=stages, say=self.progress.say, one_node=stored)
            if "train" in stages:
                check_training_memory(tuned(self.arms), self.base, live_nodes())
            self._checked = True

    def _done(self, stage: StageFolder) -> bool:
        """Whether the stage is there already; if so it counts as used."""
        if stage.done:
            self.used[stage.folder.name] = stage.facts()
            self.progress.reused(stage.name, stage.folder)
        return stage.done

    def _record(self, nodes: list[Node], *, finished: bool = False) -> None:
        """Write which stages the arms use, before they begin, so that `clean` spares them; and what came of them."""
        for node in nodes:
            record = self.records.setdefault((node.arm, node.iteration), {"stages": {}})
            stage, found = STAGES[node.stage], self.stages[node]
            record["stages"][node.label] = found.folder.name
            if finished and stage.recorded and node.user == node.arm:
                record[stage.output] = str(found.folder / stage.output)
                record |= {name: found.facts()[name] for name in stage.told}
            if node.iteration:
                write_json(self.folder.arm_file(node.arm, node.iteration), record)
        if not nodes[0].iteration:
            self._record_evaluation()

    def _record_evaluation(self) -> None:
        """`evaluation.json`: the answers of every model, and which stages they and the benchmarks are."""
        labels: dict[str, dict[str, str]] = {}  # label -> arm -> the stage's folder
        for (arm, iteration), record in self.records.items():
            for label, folder in record["stages"].items() if not iteration else ():
                labels.setdefault(label, {})[arm] = folder
        prompts, names = labels.pop("evalprompts", {}), labels.pop("evaluate", {})
        judged = {
            label: arms for label, arms in labels.items() if label.partition(":")[0] in ("score", "pairwise", "rv")
        }
        record = {
            "answers": {arm: str(self.folder.path / "stages" / name / "episodes") for arm, name in names.items()},
            "stages": {"evalprompts": prompts[VANILLA], **names} if prompts else {},
            "benchmarks": {label: arms for label, arms in labels.items() if label not in judged},
            "judges": judged,
        }
        write_json(self.folder.path / EVALUATION, record)

    def _benchmarks(self) -> dict[str, dict[str, Any]]:
        """The measures of every benchmark: arm -> name -> measures; and `benchmarks/NAME.json` of each."""
        found: dict[str, dict[str, Any]] = {}
        for name, section in self.config.evaluation.benchmarks.items():
            played = {n.arm: at for n, at in self.stages.items() if (n.stage, n.part) == ("benchmark", name)}
            where = f"evaluation.benchmarks.{name}"
            for arm, stage in played.items():
                measured = benchmark_measures(section, stage.folder / "episodes", where=where)
                found.setdefault(arm, {})[name] = measured
            if played:
                arms = {arm: found[arm][name] for arm in played}
                write_json(self.folder.path / "benchmarks" / f"{name}.json", {"benchmark": name, "arms": arms})
        return found

    def _metrics(self) -> dict[str, Any]:
        """Metrics of the base model, `vanilla`, and of every arm's last model: arm -> family -> metrics."""
        from spa_ray.pipeline.evaluate import run_metrics
        from spa_ray.pipeline.judged import add_judges

        stages = self._of_arms("evaluate")
        if not stages:
            return {}
        metrics = run_metrics(self.config, stages)
        further = {name: self._of_arms("score", f"judges.{name}") for name in self.config.evaluation.judges}
        agreed = add_judges(self.config, metrics, stages, further)
        write_json(self.folder.path / "agreement.json", agreed)
        write_json(self.folder.path / "metrics.json", metrics)
        return {name: {family: arms[name] for family, arms in metrics.items()} for name in stages}

    def _of_arms(self, stage: str, judge: str = "") -> dict[str, StageFolder]:
        return {node.arm: at for node, at in self.stages.items() if (node.stage, node.judge) == (stage, judge)}

    def _rv(self) -> None:
        """`rv.json`: a curve for each pass over prompts that arms share."""
        from spa_ray.pipeline.judged import candidates_rv

        found: dict[str, dict[str, Any]] = {}
        for node in [node for node in self.stages if node.stage == "rv"]:
            weak, strong = (self.stages[at].folder for at in (node.inputs["answers"], node))
            if strong.name not in found:
                curve = candidates_rv(self.config, weak / "episodes", strong / "episodes")
                found[strong.name] = {"arms": [], **curve}
            found[strong.name]["arms"].append(node.arm)
        if found:
            write_json(self.folder.path / RV, list(found.values()))

    def _pairwise(self) -> dict[str, dict[str, Any]]:
        """The win rates of every arm; and `win_rates.json` of each comparison, and of all."""
        from spa_ray.pipeline.judged import pairwise_rates

        found: dict[str, dict[str, Any]] = {}
        for arm, stage in self._of_arms("pairwise", "pairwise.judge").items():
            found[arm] = pairwise_rates(self.config, stage)
            write_json(stage.folder / WIN_RATES, found[arm])
        if found:
            write_json(self.folder.path / WIN_RATES, found)
        return found
