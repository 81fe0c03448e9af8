"""`spa reproduce`: a paper's tables and figures, run or resumed, and laid beside its numbers.

Comes in: the paper's name, how many seeds; or a model, a judge and data, which take the embedded world's place. Goes
out: one run folder a seed and config, and the page. The configs are data in the package.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from spa_ray.cli.demo import WORLD, of_seed, run_locked
from spa_ray.cli.figures import figures
from spa_ray.config import Config, arm_configs
from spa_ray.config.plugs import SOURCES, load_plug
from spa_ray.config.study import Reproduction, Start, StudyRun
from spa_ray.data.named import HALVES
from spa_ray.errors import InputError
from spa_ray.storage.files import AnyPath, as_path, write_json, write_text

# What of a world's own config a real study keeps: the arms, and nothing that was chosen for a model of 491 words.
OF_THE_STUDY = ("arms", "objectives", "constitution")


def reproduce(
    paper: str,
    overrides: Sequence[str],
    *,
    seeds: int | None,
    extended: bool,
    real: dict[str, str],
    out: str,
    verbose: bool,
) -> dict[str, Any]:
    """Run or resume everything and write the page. `real`: model, judge and data, or nothing. Returns: the object that
    `--json` ends with."""
    from spa_ray.pipeline.cluster import connected
    from spa_ray.pipeline.progress import Progress
    from spa_ray.pipeline.run import Pipeline

    started, spec = time.time(), reproduction(paper)
    chosen = chosen_runs(spec, extended=extended, real=bool(real))
    progress = Progress()
    configs = {
        name: seed_configs(name, run, overrides, seeds=seeds or run.seeds, real=real, out=out)
        for name, run in chosen.items()
    }

    def pipelines(name: str) -> list[Pipeline]:
        found = [Pipeline(arms, progress=progress, verbose=verbose) for arms in configs[name]]
        for pipeline in found:
            pipeline.check()
        return found

    first = {name: pipelines(name) for name, run in chosen.items() if run.start is None}
    folders: dict[str, list[AnyPath]] = {}
    try:
        with connected(verbose=verbose):
            for name, run in chosen.items():
                if run.start is not None:  # its model is there by now
                    configs[name] = started_from(run.start, configs[name], folders)
                mine = first.get(name) or pipelines(name)
                folders[name] = [as_path(run_locked(pipeline)["run_dir"]) for pipeline in mine]
    finally:
        progress.close()
    options = [*(["--extended"] if extended else []), *([f"--seeds {seeds}"] if seeds else []), *overrides]
    command = " ".join(["spa reproduce --paper", paper, *options])
    page = write_page(spec, chosen, folders, as_path(out) / "RESULTS.md", command=command)
    print(f"results: {page}")
    runs = {name: list(map(str, paths)) for name, paths in folders.items()}
    return {"results": str(page), "runs": runs, "seconds": round(time.time() - started, 1)}


def write_configs(
    paper: str, overrides: Sequence[str], folder: Path, *, extended: bool, real: dict[str, str], out: str
) -> list[Path]:
    """One YAML file a config, for `spa plan` and `spa run`; nothing is run. Seeds are the first one's."""
    written = []
    for name, run in chosen_runs(reproduction(paper), extended=extended, real=bool(real)).items():
        if run.start is None:  # else its model is not there yet
            config = raw_config(name, run, real, out)
            arm_configs(config, overrides, where=name, stem=name)  # refused before anything is written
            written.append((folder / f"{name}.yaml", config))
    for path, config in written:
        write_text(path, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    return [path for path, _ in written]


def reproduction(paper: str) -> Reproduction:
    """The package's file for a paper. Raises: InputError for a paper that is not here."""
    file = resources.files(WORLD).joinpath(f"reproduce-{paper}.yaml")
    if not file.is_file():
        raise InputError(f"--paper {paper}: not here; spa, sga and beyond are")
    return Reproduction.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))


def chosen_runs(spec: Reproduction, *, extended: bool, real: bool) -> dict[str, StudyRun]:
    return {
        name: run
        for name, run in spec.runs.items()
        if (extended or not run.extended) and not (real and run.of_the_world)
    }


def needed(paper: str) -> tuple[str, ...]:
    """The options that a study on real models needs, all of them."""
    return ("model", reproduction(paper).judged_by, "data")


def seed_configs(
    name: str, run: StudyRun, overrides: Sequence[str], *, seeds: int, real: dict[str, str], out: str
) -> list[dict[str, Config]]:
    """The arms' configs of every seed, each with a run folder of its own below `out`."""
    arms = arm_configs(raw_config(name, run, real, out), list(overrides), where=f"spa reproduce: {name}", stem=name)
    return [of_seed(arms, seed) for seed in range(seeds)]


def started_from(
    start: Start, seeds: Sequence[dict[str, Config]], folders: Mapping[str, Sequence[AnyPath]]
) -> list[dict[str, Config]]:
    """The configs of every seed with the model that another run made of it."""
    from spa_ray.pipeline.study import arm_model

    found = []
    for arms, folder in zip(seeds, folders[start.run], strict=True):
        path = str(arm_model(folder, start.arm))
        model = {arm: config.model.model_copy(update={"path": path}) for arm, config in arms.items()}
        found.append({arm: config.model_copy(update={"model": model[arm]}) for arm, config in arms.items()})
    return found


def raw_config(name: str, run: StudyRun, real: dict[str, str], out: str) -> dict[str, Any]:
    """One config as plain data: the base's, with what differs."""
    base = yaml.safe_load(resources.files(WORLD).joinpath(run.base).read_text(encoding="utf-8"))
    raw = _merged(base, run.config)
    if "reward" in real:
        raw = real_given(raw, real)
    elif real:
        kept = {key: raw[key] for key in OF_THE_STUDY if key in raw}
        held_out = {"source": real["data"], "split": "test", "limit": 400}
        asked = {key: raw["evaluation"][key] for key in ("pairwise", "rv") if key in raw["evaluation"]}
        if "pairwise" in asked:
            asked["pairwise"] = {**asked["pairwise"], "judge": real["judge"]}
        raw = {
            **kept,
            "model": {"path": real["model"]},
            "prompts": {"source": real["data"], "limit": 400, "decontaminate": "evaluation"},
            "evaluation": {"prompts": held_out, "judge": real["judge"], **asked},
        }
    return {**raw, "name": name, "run_dir": str(as_path(out) / name)}


OF_A_SIZE = ("train.lr", "train.head_lr", "train.epochs", "train.max_pairs")  # of an arm: chosen for a tiny model


def real_given(raw: Mapping[str, Any], real: Mapping[str, str]) -> dict[str, Any]:
    """A study of given answers on a public data set by name. The arms are without what was chosen for the world, those
    that ask for its columns left out. Raises: InputError for data whose scores have no known names."""
    found = load_plug(SOURCES, real["data"], where="--data") if real["data"] in SOURCES else None
    if found is None or not found.ranges:
        raise InputError(f"--data {real['data']}: give helpsteer2 or ultrafeedback; of others write a config")
    given = yaml.safe_load(real["reward"])
    judge = {"kind": "reward", **(given if isinstance(given, dict) else {"path": given})}
    train, *_, held_out = found.splits or HALVES
    against = {"against": "reference", "reference": found.reference, "judge": judge, "both_orders": False}
    asked = {"source": real["data"], "split": held_out, "limit": 1000}
    return {
        "arms": {name: kept for name, arm in raw["arms"].items() if (kept := _real_arm(arm, list(found.ranges)))},
        "objectives": list(found.ranges),
        "constitution": "attributes",
        "model": {"path": real["model"]},
        "episodes": {"source": real["data"], "split": train, "on_bad_row": "skip"},
        "pairs": {"order": "mean"},
        "evaluation": {"prompts": asked, "judge": judge, **({"pairwise": against} if found.reference else {})},
    }


def _real_arm(arm: Mapping[str, Any], objectives: Sequence[str]) -> dict[str, Any] | None:
    """None for an arm that asks for columns or several values of the world's; one value for all is one here too."""
    kept = {key: value for key, value in arm.items() if key not in OF_A_SIZE}
    if isinstance(steer := arm.get("steer"), Mapping):
        values = list(steer.values())
        if isinstance(values[0], str) or any(value != values[0] for value in values):
            return None
        kept["steer"] = dict.fromkeys(objectives, values[0])
    return kept


def write_page(
    spec: Reproduction,
    chosen: dict[str, StudyRun],
    folders: dict[str, list[AnyPath]],
    page: AnyPath,
    *,
    command: str,
) -> AnyPath:
    """RESULTS.md and, beside it, the same as JSON. `command` made the runs."""
    from spa_ray.evaluation.published import published
    from spa_ray.evaluation.reproduction import (
        as_data,
        compare,
        in_a_sentence,
        not_here,
        own_section,
        table_section,
    )
    from spa_ray.evaluation.study import build_study, together
    from spa_ray.pipeline.study import read_measured

    paper, parts, everything = published(spec.paper) if spec.paper else {}, [], []
    data: dict[str, Any] = {}
    for name, run in chosen.items():
        measured = read_measured(folders[name], run.study.judged, own_models=run.start is not None)
        if run.start is not None:
            measured = together(measured, read_measured(folders[run.start.beside]), run.start.arm)
        results = build_study(measured, run.study)
        for key, table in run.study.tables.items():
            if key not in results.tables:
                continue
            if table.paper is None:
                parts.append(own_section(results, key))
                continue
            theirs = paper[table.paper.table]
            found = compare(measured, table, theirs)
            everything += found
            parts.append(table_section(measured, results, key, table, theirs))
            data[f"{name}.{key}"] = as_data(found)
        for part, (text, found) in figures(run, folders[name], measured, page).items():
            parts.append(text)
            data[f"{name}.{part}"] = found
        data[name] = results.to_dict()
    head = [
        f"# {spec.title}",
        f"    {command}",
        spec.intro.strip(),
        *([in_a_sentence(everything)] if everything else []),
    ]
    tail = [not_here(spec.not_here)] if spec.not_here else []
    write_json(page.with_suffix(".json"), data)
    write_text(page, "\n\n".join([*head, *parts, *tail]) + "\n")
    return page


def _merged(base: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Sections are merged, key by key; arms and lists are replaced."""
    merged = copy.deepcopy(base)
    for key, value in more.items():
        together = key != "arms" and isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if together else value
    return merged
