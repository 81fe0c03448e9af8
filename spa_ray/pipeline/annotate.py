"""`spa annotate`: a run's held-out answers to blind sheets for people, and what people said against the judges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spa_ray.config.evaluation import MAIN_JUDGE
from spa_ray.config.models import Config
from spa_ray.data.episodes import EpisodeFolder
from spa_ray.errors import InputError
from spa_ray.evaluation.agreement import quadratic_kappa, sign_accuracy
from spa_ray.evaluation.annotation import as_csv, as_form, make_sheet, read_sheet
from spa_ray.evaluation.bootstrap import as_json, statistic_interval
from spa_ray.evaluation.win_rates import VALUES as VERDICTS
from spa_ray.evaluation.win_rates import compared, win_rate
from spa_ray.objectives import load_objectives
from spa_ray.pipeline.inspect import run_configs
from spa_ray.pipeline.preflight import eval_config
from spa_ray.storage.files import AnyPath, as_path, is_file, parquet_dataset, read_json, write_json
from spa_ray.storage.folder import EVALUATION, RunFolder, open_run

Floats = NDArray[np.float64]


def sheet_out(
    run_dir: AnyPath, *, out: Path, arm: str | None, against: str, limit: int | None, seed: int
) -> dict[str, Any]:
    """Write `out` (CSV), the same as a form (`.html`), and the key that tells who is who (`.key.json`).

    Raises: InputError for a run without an evaluation, an arm that it lacks, and a file that is there already.
    """
    run = open_run(run_dir)
    form, key_file = out.with_suffix(".html"), _key_file(out)
    for file in (out, form, key_file):
        if file.exists():
            raise InputError(f"{file}: is there already; give another --out")
    answers, config = _answers(run), _config(run)
    arm = arm or next(name for name in reversed(answers) if name != against)
    for name in (arm, against):
        if name not in answers:
            raise InputError(f"{run.path}: no answers of {name!r}; one of {', '.join(answers)}")
    ours, theirs = (_texts(as_path(answers[name])) for name in (arm, against))
    prompts = [
        {"prompt_id": i, "messages": messages, "a": text, "b": theirs[i][1]}
        for i, (messages, text) in ours.items()
        if i in theirs
    ]
    objectives = {o.name: o.principle for o in load_objectives(eval_config(config))}
    rows, key = make_sheet(prompts, list(objectives), limit=limit, seed=seed)
    about = {"run": str(run.path), "a": arm, "b": against, "objectives": list(objectives), "seed": seed, "rows": key}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(key_file, about)
    form.write_text(as_form(rows, objectives, out.name), encoding="utf-8")
    out.write_text(as_csv(rows), encoding="utf-8", newline="")
    print(f"{len(rows)} pairs: {out}, the same as a form: {form}; keep {key_file} from the annotators")
    return {"sheet": str(out), "form": str(form), "key": str(key_file), "pairs": len(rows)}


def sheet_in(sheet: Path, *, key_file: Path | None = None) -> dict[str, Any]:
    """Objective -> what people said (`people`, a win rate of `a`), and each judge's agreement with them.

    Raises: InputError for a sheet or a key that cannot be read, and a sheet with nothing in it.
    """
    key_file = key_file or _key_file(sheet)
    for file in (sheet, key_file):
        if not file.is_file():
            raise InputError(f"{file}: no such file" + ("; give --key" if file == key_file else ""))
    key = read_json(key_file)
    try:
        text = sheet.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise InputError(f"{sheet}: not UTF-8 text; save it as CSV in UTF-8") from e
    people = read_sheet(text, key["rows"], key["objectives"], where=str(sheet))
    if not any(np.isfinite(values).any() for values in people.values()):
        raise InputError(f"{sheet}: nothing is filled in; write 1, 2 or tie below {', '.join(key['objectives'])}")
    run = open_run(key["run"])
    config, ids = _config(run), [row["prompt_id"] for row in key["rows"]]
    draws = {"resamples": config.evaluation.bootstrap, "seed": config.seed}
    judges = _judges(run, key["a"], key["b"], ids, key["objectives"])
    found: dict[str, Any] = {}
    for k, (name, said) in enumerate(people.items()):
        agreed = {
            judge: {
                "accuracy": as_json(statistic_interval(sign_accuracy, signs[:, k], said, **draws)),
                "kappa": as_json(statistic_interval(quadratic_kappa, signs[:, k], said, **draws)),
            }
            for judge, signs in judges.items()
        }
        rates = win_rate(said[:, None], **draws)
        kept = ("wins", "ties", "losses", "n", "win_rate")
        found[name] = {"people": {part: rates[part] for part in kept}, "judges": agreed}
    _print(found, key["a"], key["b"])
    return {"a": key["a"], "b": key["b"], "objectives": found}


def _print(found: dict[str, Any], a: str, b: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from spa_ray.pipeline.result_print import cell

    table = Table("", *found, title=f"people: {a} against {b}, and how judges agree with them", title_justify="left")
    table.add_row("win rate", *(cell(of["people"]["win_rate"]) for of in found.values()))
    table.add_row("pairs", *(str(of["people"]["n"]) for of in found.values()))
    for judge in next(iter(found.values()))["judges"]:
        for measure in ("accuracy", "kappa"):
            table.add_row(f"{judge}: {measure}", *(cell(of["judges"][judge][measure]) for of in found.values()))
    Console().print(table)


def _judges(run: RunFolder, a: str, b: str, ids: list[str], objectives: list[str]) -> dict[str, Floats]:
    """Judge -> (prompts, objectives): which answer it prefers, 1 `a`, -1 `b`, 0 neither, NaN unknown."""
    record = read_json(run.path / EVALUATION)
    folders = {MAIN_JUDGE: {arm: as_path(path) for arm, path in record["answers"].items()}}
    stages = run.path / "stages"
    for label, arms in record.get("judges", {}).items():
        if label.startswith("score:"):
            folders[label.removeprefix("score:")] = {arm: stages / name / "episodes" for arm, name in arms.items()}
    found = {
        judge: np.sign(_scores(arms[a], ids, len(objectives)) - _scores(arms[b], ids, len(objectives)))
        for judge, arms in folders.items()
    }
    compared_with = record.get("judges", {}).get("pairwise", {})
    if a in compared_with:
        table = parquet_dataset(stages / compared_with[a] / "judgements").to_table().to_pylist()
        if table and table[0]["b"] == b:
            found["pairwise"] = _verdicts(table, ids, objectives)
    return found


def _scores(episodes: AnyPath, ids: list[str], width: int) -> Floats:
    rows = EpisodeFolder(episodes).table(["prompt_id", "scores"]).to_pylist()
    by_id = {row["prompt_id"]: row["scores"][0] for row in rows if row["scores"]}
    nothing = [None] * width
    return np.array([by_id.get(i, nothing) for i in ids], dtype=np.float64).reshape(len(ids), width)


def _verdicts(table: list[dict[str, Any]], ids: list[str], objectives: list[str]) -> Floats:
    orders = sorted({row["order"] for row in table})
    values = {(row["prompt_id"], row["objective"], row["order"]): VERDICTS[row["verdict"]] for row in table}
    columns = [
        compared(np.array([[values.get((i, name, order), np.nan) for order in orders] for i in ids]))
        for name in objectives
    ]
    return np.stack(columns, axis=1)


def _answers(run: RunFolder) -> dict[str, str]:
    if not is_file(run.path / EVALUATION):
        raise InputError(f"{run.path}: has no held-out answers (no {EVALUATION}); run it to its evaluation")
    answers: dict[str, str] = read_json(run.path / EVALUATION)["answers"]
    return answers


def _config(run: RunFolder) -> Config:
    return next(iter(run_configs(run).values()))


def _texts(episodes: AnyPath) -> dict[str, tuple[list[dict[str, str]], str]]:
    """Prompt -> its conversation and the answer's text."""
    rows = EpisodeFolder(episodes).table(["prompt_id", "messages", "responses", "error"]).to_pylist()
    return {r["prompt_id"]: (r["messages"], r["responses"][0]["text"]) for r in rows if r["error"] is None}


def _key_file(sheet: Path) -> Path:
    return sheet.with_suffix(".key.json")
