"""`spa demo`: the embedded world's config through the ordinary pipeline, and the tables that a newcomer sees.

Comes in: overrides, seeds. Goes out: the printed tables and the `--json` object. The only module that names the
microworld, as data in the package.
"""

from __future__ import annotations

import json
import time
from importlib import resources
from typing import TYPE_CHECKING, Any

import yaml

from spa_ray.cli.report import last_report
from spa_ray.config import Config, arm_configs
from spa_ray.config.study import Study
from spa_ray.config.training import DEFAULT_METHOD
from spa_ray.errors import InputError
from spa_ray.evaluation.prompts import MAIN_FAMILY
from spa_ray.pipeline.result_print import print_funnel, print_metrics
from spa_ray.pipeline.study import write_study
from spa_ray.storage.files import as_path, read_json

if TYPE_CHECKING:
    from spa_ray.pipeline.run import Pipeline

WORLD = "spa_ray.microworld"


def run_demo(overrides: list[str], *, full: bool, seeds: int, verbose: bool) -> dict[str, Any]:
    """Run the demo, once a seed. Returns: the object that `spa demo --json` ends with."""
    from spa_ray.pipeline.cluster import connected
    from spa_ray.pipeline.progress import Progress
    from spa_ray.pipeline.run import Pipeline

    started = time.time()
    raw = demo_config(full=full)
    name = f"{raw['name']}-full" if full else raw["name"]
    arms = arm_configs({**raw, "name": name}, overrides, where="spa demo", stem=name)
    progress = Progress()
    runs = [of_seed(arms, seed) for seed in range(seeds)] if seeds > 1 else [arms]
    pipelines = [Pipeline(run, progress=progress, verbose=verbose) for run in runs]
    try:
        for pipeline in pipelines:
            pipeline.check()
        with connected(verbose=verbose):
            results = [run_locked(pipeline) for pipeline in pipelines]
    finally:
        progress.close()
    for result in results:
        show(result)
    study = {}
    if full or seeds > 1:
        base = as_path(next(iter(arms.values())).run_dir)
        path = write_study(
            [as_path(r["run_dir"]) for r in results], base.with_name(f"{base.name}-study.md"), demo_study()
        )
        print(f"study: {path}")
        study = {"study": str(path)}
    return {**summary(results), **study, "seconds": round(time.time() - started, 1)}


def run_locked(pipeline: Pipeline) -> dict[str, Any]:
    with pipeline.lock():
        return pipeline.run()


def of_seed(arms: dict[str, Config], number: int) -> dict[str, Config]:
    """The configs of the study's seed `number`: counted from the config's own seed, in a run folder of their own."""
    return {
        arm: config.model_copy(
            update={
                "name": f"{config.name}-seed{config.seed + number}",
                "run_dir": f"{config.run_dir}-seed{config.seed + number}",
                "seed": config.seed + number,
            }
        )
        for arm, config in arms.items()
    }


def demo_config(*, full: bool) -> dict[str, Any]:
    """The embedded demo config, with the full study's arms and families where asked."""
    config = _read("demo.yaml")
    if full:
        more = _read("full.yaml")
        config["arms"] = more["arms"]
        config["evaluation"] = {**config["evaluation"], **more["evaluation"]}
    return config


def demo_study() -> Study:
    """The tables of a study of the demo's arms."""
    return Study.model_validate(_read("study.yaml"))


def _read(name: str) -> dict[str, Any]:
    try:
        return yaml.safe_load(resources.files(WORLD).joinpath(name).read_text(encoding="utf-8"))
    except (ModuleNotFoundError, OSError) as e:
        raise InputError(f"{WORLD}/{name}: not in this installation; install spa_ray with its package data") from e


def show(result: dict[str, Any]) -> None:
    """Funnels, metric tables, examples, the path of the report, which this writes."""
    run_dir = as_path(result["run_dir"])
    funnels = {json.dumps(arm["iterations"][0]["funnel"]): name for name, arm in reversed(result["arms"].items())}
    for text, name in reversed(funnels.items()):
        print_funnel(json.loads(text), name)
    print_metrics(read_json(run_dir / "metrics.json"))
    print(f"run folder: {run_dir}")
    last_report(run_dir, examples=True)


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds by arm: every measure of the main family, as plain numbers. Further: the funnel of `spa` (of
    the first arm where there is none) at the first seed, and the run folders."""
    first = results[0]
    out: dict[str, Any] = {}
    for name in ["vanilla", *first["arms"]]:
        runs = [r["vanilla"] if name == "vanilla" else r["arms"][name] for r in results]
        means = [run["metrics"][MAIN_FAMILY]["means"] for run in runs]
        out[name] = {key: sum(m[key]["mean"] for m in means) / len(means) for key in means[0]}
    funnel_arm = DEFAULT_METHOD if DEFAULT_METHOD in first["arms"] else next(iter(first["arms"]))
    out["funnel"] = first["arms"][funnel_arm]["iterations"][0]["funnel"]
    out["run_dirs"] = [r["run_dir"] for r in results]
    return out
