"""What each command does, between the command line and the stages.

Comes in: arm configs and paths. Goes out: JSON-like results (DESIGN, «Command line»). Never: argument parsing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import replace
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

from spa_ray.config import Config, arm_configs, load_config
from spa_ray.config.load import Override
from spa_ray.config.models import named_plugs
from spa_ray.data.left_out import FILE as LEFT_OUT
from spa_ray.data.left_out import write_list
from spa_ray.data.schemas import is_imported
from spa_ray.engine.cpu_dtype import with_dtype
from spa_ray.errors import InputError
from spa_ray.pipeline.cards import Trained, model_card, pairs_card, write_card
from spa_ray.pipeline.cluster import connected
from spa_ray.pipeline.first_day import FILE as FIRST_DAY
from spa_ray.pipeline.first_day import first_day, record_first_day
from spa_ray.pipeline.models import fetch_model, shared_model
from spa_ray.pipeline.own_pairs import are_own, own_pairs_stage
from spa_ray.pipeline.preflight_cluster import check_cluster, live_nodes
from spa_ray.pipeline.preflight_memory import check_training_memory
from spa_ray.pipeline.progress import Progress
from spa_ray.pipeline.recipe import VANILLA, extra_models, has_evaluation
from spa_ray.pipeline.result_print import (
    print_benchmarks,
    print_funnel,
    print_metrics,
    print_result,
    print_rv,
    print_win_rates,
)
from spa_ray.pipeline.run import RV, Pipeline
from spa_ray.pipeline.stage_keys import Known
from spa_ray.pipeline.stages import STAGES, UNTIL
from spa_ray.pipeline.work import Context, Work, meter_of
from spa_ray.rollout.settings import ChatSettings
from spa_ray.rollout.template import template_text
from spa_ray.storage.claimed import claimed
from spa_ray.storage.files import AnyPath, as_path, children, copy_file, is_file, is_local, kind, read_json, write_json
from spa_ray.storage.folder import CLAIM, MARKER, StageFolder, open_run
from spa_ray.storage.hashing import file_hash, model_hash, parquet_hash
from spa_ray.storage.lock import RunLock
from spa_ray.storage.model_folder import check_model_folder
from spa_ray.storage.node_cache import local_folder
from spa_ray.storage.shared_folder import check_shared


def run_config(arms: dict[str, Config], *, until: str, verbose: bool) -> dict[str, Any]:
    """`spa run`: the whole pipeline. Prints where the run lies and, once evaluated, its table."""
    progress = Progress()
    pipeline = Pipeline(arms, progress=progress, until=until, verbose=verbose)
    pipeline.check()
    configs = [c for config in arms.values() for c in (config, *extra_models(config).values())]
    plugs = [name for config in configs for name in named_plugs(config)]
    try:
        with pipeline.lock(), connected(verbose=verbose, plugs=plugs):
            result = pipeline.run()
    finally:
        progress.close()
    print_result(result)
    metrics = pipeline.folder.path / "metrics.json"
    if until == UNTIL[-1] and is_file(metrics):
        print_metrics(read_json(metrics))
    print_win_rates({arm: found["pairwise"] for arm, found in result["arms"].items() if "pairwise" in found})
    curves = pipeline.folder.path / RV
    print_rv(read_json(curves) if pipeline.config.evaluation.rv and is_file(curves) else [])
    evaluated = {VANILLA: result.get(VANILLA, {}), **result["arms"]}
    print_benchmarks({arm: found["benchmarks"] for arm, found in evaluated.items() if "benchmarks" in found})
    return result


def clean_run(run_dir: AnyPath) -> dict[str, Any]:
    """`spa clean`: delete the stages that no arm refers to."""
    run = open_run(run_dir)
    with RunLock(run.path):
        deleted = [str(path) for path in run.clean()]
    for path in deleted:
        print(f"deleted {path}")
    return {"deleted": deleted}


def _context(config: Config, folder: AnyPath, progress: Progress, day: date, *, verbose: bool) -> Context:
    chat, meter = ChatSettings.of(config.model, day=day), meter_of(config, folder)
    return Context(progress, verbose, day, chat, folder, meter, folder)


def _do(
    name: str, work: Work, context: Context, *, one_node: bool = False, before: Callable[[], None] | None = None
) -> None:
    """Run one stage in the folder that the user named, on Ray. `before` is called once Ray is there."""
    with connected(verbose=context.verbose, plugs=named_plugs(work.config)):
        check_shared(work.stage.folder)
        if name != "build":
            stage = "evaluate" if name in ("benchmark", "score") else name
            check_cluster(work.config, stages=[stage], say=context.progress.say, one_node=one_node)
        if before:
            before()
        STAGES[name].work([work], context)


def generate_stage(config: Config, *, out: AnyPath, verbose: bool) -> dict[str, Any]:
    """`spa generate`: prompts to `out/episodes/`."""
    from spa_ray.data.prompts import write_prompts
    from spa_ray.pipeline.preflight import Lengths, check_asked_of, check_settings

    config = with_dtype(config)
    model = fetch_model(config.model)
    check_settings(config, model)
    progress = Progress()
    with closing(progress), tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch) / "prompts.parquet"
        lengths = Lengths(config, model)
        against = config.decontaminated_by
        counts = write_prompts(config.prompts, fresh, check=lengths.check([config]), against=against)
        check_asked_of(model, config, fresh)
        for line in [*lengths.warnings(config), *counts.notes(), *lengths.of_prompts(fresh, config)]:
            progress.say(f"warning: {line}")
        context = _context(config, as_path(out), progress, first_day(as_path(out)), verbose=verbose)
        hashes = {"prompts": file_hash(fresh), "model": model_hash(model)}
        known = Known(chat=context.chat.key(template_text(model)))
        with claimed(out, "generate", STAGES["generate"].key(config, hashes, known)) as stage:
            for line in write_list({"prompts": counts.dropped}, stage.folder / LEFT_OUT):
                progress.say(f"warning: {line}")
            if not stage.done:
                record_first_day(stage.folder, context.day)
                copy_file(fresh, stage.folder / "prompts.parquet")
                inputs = {"prompts": stage.folder / "prompts.parquet", "model": shared_model(config.model, model)}
                _do("generate", Work(stage, config, inputs, known), context)
            progress.say_errors("generate", stage.facts(), stage.folder / "episodes")
    return {"episodes": str(stage.folder / "episodes"), **stage.facts()}


def import_stage(config: Config, *, out: AnyPath) -> dict[str, Any]:
    """`spa import`: answers with scores to `out/episodes/`. The source is read and checked in any case."""
    from spa_ray.data.given import write_episodes

    progress = Progress()
    with closing(progress), tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch) / "episodes.parquet"
        counts = write_episodes(config.episodes, fresh)
        for line in counts.notes("episodes"):
            progress.say(f"warning: {line}")
        with claimed(out, "import", STAGES["import"].key(config, {"contents": file_hash(fresh)})) as stage:
            for line in write_list({"episodes": counts.dropped}, stage.folder / LEFT_OUT):
                progress.say(f"warning: {line}")
            if not stage.done:
                context = _context(config, as_path(out), progress, first_day(as_path(out)), verbose=False)
                work = Work(stage, config, {"contents": fresh}, facts=counts.to_dict())
                STAGES["import"].run([work], context)
    print(f"{counts.rows:,} prompts, {counts.answers:,} answers; scores: {', '.join(counts.attributes)}")
    return {"episodes": str(stage.folder / "episodes"), **stage.facts()}


def build_stage(
    episodes: AnyPath, out: AnyPath, config: Path | None, overrides: Iterable[Override], *, verbose: bool
) -> dict[str, Any]:
    """`spa build`: episodes to `out/pairs/` and `out/funnel.json`.

    Without a config the objectives are read off the episodes' own metadata.
    """
    from spa_ray.pipeline.build import open_episodes

    folder = inside(episodes, "episodes")
    data = open_episodes(folder)
    if is_imported(data.schema):
        overrides = [*overrides, ("episodes.source", str(folder))]
    arms = load_config(config, overrides) if config else _bare_config(data.schema, overrides)
    arm = next(iter(arms.values()))
    check_objectives(data.schema, arm)
    progress = Progress()
    with (
        closing(progress),
        claimed(out, "build", STAGES["build"].key(arm, {"episodes": parquet_hash(folder)})) as stage,
    ):
        if not stage.done:
            day = first_day(as_path(episodes))
            if is_file(as_path(episodes) / FIRST_DAY):  # for `spa train`, which renders the prompts again
                record_first_day(stage.folder, day)
            context = _context(arm, stage.folder, progress, day, verbose=verbose)
            _do("build", Work(stage, arm, {"episodes": folder}), context)
    funnel = stage.facts()["funnel"]
    write_card(stage.folder, pairs_card(arm, f"{arm.name}-pairs", funnel))
    print_funnel(funnel, str(episodes))
    return {"pairs": str(stage.folder / "pairs"), "funnel": funnel}


def check_objectives(schema: Any, config: Config) -> None:
    """Raises: InputError when the episodes were scored on other objectives than the config's."""
    from spa_ray.data.schemas import objectives_of

    if b"objectives" in (schema.metadata or {}) and objectives_of(schema) != list(config.objectives):
        raise InputError(f"objectives: the episodes hold {objectives_of(schema)}, the config {list(config.objectives)}")


def _bare_config(schema: Any, overrides: Iterable[Override]) -> dict[str, Config]:
    from spa_ray.data.schemas import objectives_of

    try:
        objectives = objectives_of(schema)
    except KeyError as e:
        raise InputError("these episodes name no objectives in their metadata; give --config") from e
    n = max(5, len(objectives) + 1)
    raw = {"objectives": objectives, "model": {"path": "none"}, "sampling": {"n": n}}
    return arm_configs(raw, overrides, where="spa build", stem="build")


def train_stage(config: Config, *, pairs: AnyPath | str, out: AnyPath, verbose: bool) -> dict[str, Any]:
    """`spa train`: pairs to the model folder `out`; its log and checkpoints lie in `out.work/` until it stands.

    `pairs` is what `spa build` wrote, or a user's own in TRL's forms, which become a pairs table in `out.pairs/` first.
    """
    from spa_ray.training.job import RESULT
    from spa_ray.training.trackers import check_backends

    check_backends(config.tracking.backends)
    found = pairs if isinstance(pairs, str) else inside(pairs, "pairs")  # a text is a hub's address
    out, model = as_path(out), fetch_model(config.model)
    work_folder = out.with_name(f"{out.name}.work")
    above = () if isinstance(found, str) else (found, *found.parents)
    day = first_day(work_folder, *islice(above, 5))  # the pairs' own run, where they are in one
    progress = Progress()
    context = _context(config, work_folder, progress, day, verbose=verbose)
    if isinstance(found, str) or are_own(found):
        own = out.with_name(f"{out.name}.pairs")
        folder = own_pairs_stage(config, found, out=own, model=model, chat=context.chat, say=progress.say)
    else:
        folder = found
    known = Known(chat=context.chat.key(template_text(model)))
    address = STAGES["train"].key(config, {"pairs": parquet_hash(folder), "model": model_hash(model)}, known)
    with closing(progress), claimed(work_folder, "train", address) as stage:
        # A model with a result beside it is the job's own, or the job says that it is not.
        if not stage.done and children(out) and not is_file(stage.folder / "job" / RESULT):
            raise InputError(f"{out}: stands already; give another --out or remove it")
        if not stage.done:
            inputs = {"pairs": folder, "model": shared_model(config.model, model)}
            record_first_day(stage.folder, day)

            def before() -> None:
                if isinstance(model, Path):
                    check_training_memory({config.name: config}, model, live_nodes())

            stored = not all(is_local(path) for path in (*inputs.values(), out))
            work = Work(stage, config, inputs, known, arms={out.name: config}, out=out)
            _do("train", work, context, one_node=stored, before=before)
    funnel = folder.parent / "funnel.json"  # where `spa build` wrote the pairs
    made_of = Trained(model, read_json(funnel) if is_file(funnel) else None)
    write_card(out, model_card(config, out.name, made_of))
    return {"model": str(out), **stage.facts()}


def evaluate_stage(config: Config, *, model: AnyPath, out: AnyPath, verbose: bool) -> dict[str, Any]:
    """`spa eval`: a model's answers to the held-out prompts in `out/episodes/`, their metrics in `out/metrics.json`,
    and its benchmarks below `out/benchmarks/`; either may be absent from the config."""
    from spa_ray.pipeline.preflight import check_evaluation, check_opponent, check_settings

    config = with_dtype(config)
    source, model = as_path(model), local_folder(as_path(model))
    check_model_folder(model)
    check_settings(config, model)
    check_evaluation(config, model)
    check_opponent(config.arms, config)
    progress, subject, result = Progress(), {"model": source, "base": source}, {}
    with closing(progress):
        context = _context(config, as_path(out), progress, first_day(as_path(out)), verbose=verbose)
        known = Known(chat=context.chat.key(template_text(model)))
        if has_evaluation(config) or not config.evaluation.benchmarks:
            result = _held_out(config, model, subject, known, context)
        else:
            record_first_day(context.root, context.day)
        benchmarks = {
            name: _play(name, config, subject, model_hash(model), known, context)
            for name in config.evaluation.benchmarks
        }
    print_benchmarks({"model": benchmarks})
    return {"metrics": {}, **result, **({"benchmarks": benchmarks} if benchmarks else {})}


def _held_out(
    config: Config, model: Path, subject: dict[str, AnyPath], known: Known, context: Context
) -> dict[str, Any]:
    """Answers to the held-out prompts in the user's folder, scored by all judges. `model` is the subject on this
    machine's disk."""
    from spa_ray.evaluation.prompts import write_eval_prompts
    from spa_ray.pipeline.evaluate import run_metrics
    from spa_ray.pipeline.judged import add_judges
    from spa_ray.pipeline.preflight import Lengths, check_asked_of, judge_folder

    own, say = config.evaluation.judged_by, context.progress.say
    base = fetch_model(config.model) if own.own_pass and own.folder is None else model
    judge = judge_folder(config, base)
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch) / "prompts.parquet"
        lengths = Lengths(config, model)
        counts = write_eval_prompts(config.evaluation, fresh, check=lengths.check())
        check_asked_of(model, config, fresh)
        for line in [*lengths.warnings(config), *counts.notes, *lengths.of_held_out(fresh, config)]:
            say(f"warning: {line}")
        judge_hash = model_hash(judge) if judge else ""
        hashes = {"prompts": file_hash(fresh), "model": model_hash(model), "judge": judge_hash}
        with claimed(context.root, "eval", STAGES["evaluate"].key(config, hashes, known)) as stage:
            for line in write_list(counts.dropped, stage.folder / LEFT_OUT):
                say(f"warning: {line}")
            if not stage.done:
                record_first_day(stage.folder, context.day)
                shared_judge = shared_model(config.model, base) if judge == base else judge
                inputs = {**subject, "prompts": fresh, "judge": shared_judge}
                _do("evaluate", Work(stage, config, inputs, known), context)
            context.progress.say_errors("evaluate", stage.facts(), stage.folder / "episodes")
            metrics = run_metrics(config, {"model": stage}, baseline=None)
            answered = {**subject, "answers": stage.folder / "episodes"}
            further = {
                name: {"model": _judge(f"judges.{name}", config, answered, stage.hash, known, context)}
                for name in config.evaluation.judges
            }
            agreed = add_judges(config, metrics, {"model": stage}, further, baseline=None)
            write_json(stage.folder / "agreement.json", agreed)
            write_json(stage.folder / "metrics.json", metrics)
    print_metrics(metrics)
    return {"episodes": str(stage.folder / "episodes"), "metrics": {f: arms["model"] for f, arms in metrics.items()}}


def _play(
    name: str, config: Config, inputs: dict[str, AnyPath], model: str, known: Known, context: Context
) -> dict[str, Any]:
    """One benchmark of `spa eval`, in a folder of its own below the user's. Returns: its measures."""
    from spa_ray.evaluation.benchmarks import benchmark_measures
    from spa_ray.pipeline.prompt_files import PromptFiles

    known, out = replace(known, benchmark=name), context.root / "benchmarks" / name
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch) / "prompts.parquet"
        PromptFiles().write_benchmark(config.evaluation, name, fresh)
        address = STAGES["benchmark"].key(config, {"prompts": file_hash(fresh), "model": model}, known)
        with claimed(out, "eval", address) as stage:
            if not stage.done:
                work = Work(StageFolder("benchmark", stage.hash, out), config, {**inputs, "prompts": fresh}, known)
                _do("benchmark", work, replace(context, passes=out))
            measured = benchmark_measures(
                config.evaluation.benchmarks[name], out / "episodes", where=f"evaluation.benchmarks.{name}"
            )
            write_json(out.with_name(f"{name}.json"), {"benchmark": name, "arms": {"model": measured}})
    return measured


def _judge(
    place: str, config: Config, inputs: dict[str, AnyPath], answers: str, known: Known, context: Context
) -> StageFolder:
    """One further judge of `spa eval`, in a folder of its own below the user's."""
    from spa_ray.pipeline.preflight import judge_folder

    known, out = replace(known, names=(place,)), context.root / "judges" / place.removeprefix("judges.")
    section = config.evaluation.all_judges[place]
    base = fetch_model(config.model) if section.own_pass and section.folder is None else inputs["base"]
    judge = judge_folder(config, base, place)
    hashes = {"answers": answers, "judge": model_hash(judge) if judge else ""}
    with claimed(out, "eval", STAGES["score"].key(config, hashes, known)) as stage:
        found = StageFolder("score", stage.hash, out)
        if not stage.done:
            _do("score", Work(found, config, {**inputs, "judge": judge}, known), replace(context, passes=out))
    return found


def inside(path: AnyPath, name: str) -> AnyPath:
    """The folder `name` inside `path` where there is one, else `path` itself. Raises: InputError without any."""
    path = as_path(path)
    if kind(path) is None:
        raise InputError(f"{path}: no such folder")
    if is_file(path / CLAIM) and not is_file(path / MARKER):
        raise InputError(f"{path}: unfinished (no {MARKER}); run the command that made it again")
    return path / name if kind(path / name) == "directory" else path
