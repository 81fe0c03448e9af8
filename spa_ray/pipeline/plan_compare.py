"""`spa plan --compare RUN`: what was planned beside what happened, stage by stage, also of a run that is not finished.

Comes in: a run folder. Goes out: a JSON-like comparison. A run holds its plan as `plan.json` from its beginning on; for
one that has none, made before there were plans, it is made now from `config.yaml`. Never: an engine, Ray.
"""

from __future__ import annotations

from typing import Any

from spa_ray.storage.files import AnyPath, arrow_filesystem, is_file, parquet_files, read_json
from spa_ray.storage.folder import EVALUATION, FURTHER, MARKER, RunFolder, open_run

Facts = dict[str, Any]
PLAN = "plan.json"
COMPARED = ("requests", "prompt_tokens", "generated_tokens", "seconds")
MEASURED = ("rows", "errors", "pairs", "steps", "engine_busy", "tokens_per_second")  # told where a stage recorded them
SIDES = ("planned", "actual")
EVALUATE = "evaluate"  # its stages stand in evaluation.json under the arms' names


def compare_run(path: str | AnyPath) -> Facts:
    """Planned and actual of every stage. Raises: InputError when the folder is no run."""
    run = open_run(path)
    notes: list[str] = []
    if is_file(run.path / PLAN):
        plan = read_json(run.path / PLAN)
    else:
        from spa_ray.pipeline.inspect import run_configs
        from spa_ray.pipeline.plan import make_plan

        plan = make_plan(run_configs(run))
        notes.append(
            f"no {PLAN}: the run is older than plans, this one was made now from config.yaml; the seconds of each of "
            "its evaluate stages are those of the whole pass over all models"
        )
    return compare(run, plan, notes)


def compare(run: RunFolder, plan: Facts, notes: list[str] | None = None) -> Facts:
    """The plan's stages beside what their folders hold; `total` is over the finished ones, number by number."""
    records = _records(run)
    stages = [_compared(run, stage, records) for stage in plan["stages"]]
    totals = {side: {key: _sum(stages, side, key) for key in COMPARED} for side in SIDES}
    return {
        "run_dir": str(run.path),
        "stages": stages,
        "total": {**totals, "ratio": ratios(totals["planned"], totals["actual"])},
        "notes": notes or [],
    }


def ratios(planned: Facts, actual: Facts) -> dict[str, float]:
    """actual / planned, for what is known of both."""
    return {
        key: round(actual[key] / planned[key], 3)
        for key in COMPARED
        if planned.get(key) and actual.get(key) is not None
    }


def _records(run: RunFolder) -> dict[tuple[str, int], dict[str, str]]:
    """(arm, iteration) -> stage -> its folder's name; iteration 0 is the evaluation."""
    found: dict[tuple[str, int], dict[str, str]] = {}
    for file in run.arm_files():
        found[file.parent.name, int(file.stem.removeprefix("iter_"))] = read_json(file)["stages"]
    evaluation = run.path / EVALUATION
    if is_file(evaluation):
        record = read_json(evaluation)
        further = {label: arms for part in FURTHER for label, arms in record.get(part, {}).items()}
        for label, arms in {EVALUATE: record["stages"], **further}.items():
            for arm, folder in arms.items():
                found.setdefault((arm, 0), {})[label] = folder
    return found


def _compared(run: RunFolder, stage: Facts, records: dict[tuple[str, int], dict[str, str]]) -> Facts:
    planned = {key: stage[key] for key in COMPARED} | {"gpu_hours": stage["gpu_hours"]}
    for key in ("prompt_tokens", "generated_tokens"):  # rows count what their judge read and wrote, whoever it is
        planned[key] += stage.get("judge", {}).get(key, 0)
    names = (records.get((arm, stage["iteration"]), {}).get(stage["stage"]) for arm in stage["arms"])
    name = next(filter(None, names), None)
    folder = None if name is None else run.path / "stages" / name
    status, actual = ("not begun", {}) if folder is None else _actual(folder)
    return {
        "stage": stage["stage"],
        "arms": stage["arms"],
        "iteration": stage["iteration"],
        "folder": name,
        "status": status,
        "planned": planned,
        "actual": actual,
        "ratio": ratios(planned, actual) if status == "done" else {},
    }


def _actual(folder: AnyPath) -> tuple[str, Facts]:
    """What a stage recorded; of one that is under way the rows and tokens that are written, for there is no more."""
    if is_file(folder / MARKER):
        facts = read_json(folder / MARKER)
        return "done", {key: facts[key] for key in (*COMPARED, *MEASURED) if facts.get(key) is not None}
    return "unfinished", _written(folder / "episodes")


def _written(episodes: AnyPath) -> Facts:
    """Rows and tokens of the Parquet files that are whole; a file that is being written is left out."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    filesystem = arrow_filesystem(episodes)[0]
    found: Facts = {}
    for file in parquet_files(episodes):
        try:
            table = pq.ParquetFile(file, filesystem=filesystem).read(["prompt_tokens", "generated_tokens"])
        except (pa.ArrowInvalid, OSError):
            continue
        found["rows"] = found.get("rows", 0) + table.num_rows
        for key in table.column_names:
            found[key] = found.get(key, 0) + (pc.sum(table[key]).as_py() or 0)
    return found


def _sum(stages: list[Facts], side: str, key: str) -> float | int | None:
    """Over the finished stages that recorded the number, so that both sides speak of the same ones."""
    known = [s[side][key] for s in stages if s["status"] == "done" and s["actual"].get(key) is not None]
    return round(sum(known), 2) if known else None
