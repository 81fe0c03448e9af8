"""Does `train.order: prompts` cost quality? Orders on the embedded world, by two judges, over several seeds.

    python scripts/order_study.py                                     # both orders, batches of 64 and 128 pairs
    python scripts/order_study.py --seeds 2 --orders pairs prompts prompts_epoch      # the epoch's mean gap as well
    python scripts/order_study.py --batches 64 --orders pairs prompts prompts_twice   # twice the epochs as well

Each seed's arms, of `spa` and of `spa_robust`, train on the same pairs, and in the same number of steps unless their
order says otherwise. Two tables come out, in `OUT/study.md` and `study.json`: expected scores by the base model on
validation prompts, which may choose a default, and the oracle's on test prompts that no other study has used, which
may not. Stages are kept in `OUT`: a second call, also one with other options, trains what is new.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from spa_ray.cli.demo import demo_config, of_seed, run_locked
from spa_ray.config import Config, arm_configs
from spa_ray.config.prompts import Prompts
from spa_ray.evaluation.answers import read_answers
from spa_ray.evaluation.prompts import MAIN_FAMILY, write_eval_prompts
from spa_ray.evaluation.tables import Answers, arm_metrics, plain_means
from spa_ray.microworld.prompts import street
from spa_ray.pipeline.cluster import connected
from spa_ray.pipeline.evaluate import evaluate
from spa_ray.pipeline.first_day import first_day
from spa_ray.pipeline.preflight import judge_folder
from spa_ray.pipeline.progress import Progress
from spa_ray.pipeline.run import Pipeline
from spa_ray.pipeline.work import Context, Work
from spa_ray.rollout.settings import ChatSettings
from spa_ray.storage.files import AnyPath, read_json, write_json
from spa_ray.storage.folder import RunFolder

METHODS: dict[str, dict[str, Any]] = {"spa": {}, "spa_robust": {"profile": "robust"}}
ORDERS: dict[str, dict[str, Any]] = {
    "pairs": {"train.order": "pairs"},
    "prompts": {"train.order": "prompts"},
    "prompts_epoch": {"train.order": "prompts", "train.gap_mean": "epoch"},
    "prompts_twice": {"train.order": "prompts", "train.epochs": 4},
}
FRESH = (450, 900)  # of the test split: the first 450 are the demo's
VALIDATION = 400
MEASURES = ("harmless", "helpful", "hh_5")
OTHERS = ("length", "repetition")
RESAMPLES = 1000
TITLES = {
    "base": "Expected scores by the base model, validation prompts",
    "oracle": "Scores by the oracle, fresh test prompts",
}
LOGGED = ("rewards/accuracies", "grad_norm", "weights/ess_prompts", "logps/chosen_per_token")


def arm_name(method: str, batch: int, order: str) -> str:
    return f"{method}_{batch}_{order}"


def study_arms(out: Path, batches: list[int], orders: list[str], limit: int | None) -> dict[str, Config]:
    """All arms, judged by the oracle on fresh test prompts."""
    raw = demo_config(full=False)
    raw["arms"] = {
        arm_name(method, batch, order): {**settings, **ORDERS[order], "train.batch_size": batch}
        for method, settings in METHODS.items()
        for batch in batches
        for order in orders
    }
    raw["run_dir"] = str(out / "run")
    raw["evaluation"]["prompts"] = {"source": str(write_fresh(out))}
    overrides = [f"prompts.limit={limit}"] if limit else []
    return arm_configs(raw, overrides, where="order study", stem="order-study")


def write_fresh(out: Path) -> Path:
    """The test prompts that no other study has used, as a file."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "fresh_test.jsonl"
    rows = islice(street("test"), *FRESH)
    path.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    return path


def by_base(config: Config, models: dict[str, AnyPath], out: Path) -> dict[str, Answers]:
    """Every model's answers to validation prompts, with the scores that the base model expects."""
    prompts = Prompts(source="spa_ray.microworld.prompts:street", split="validation", limit=VALIDATION)
    evaluation = config.evaluation.model_copy(update={"judge": "base", "prompts": prompts})
    scoring = config.scoring.model_copy(update={"mode": "expected"})
    config = config.model_copy(update={"evaluation": evaluation, "scoring": scoring})
    out.mkdir(parents=True, exist_ok=True)
    rows = out / "prompts.parquet"
    write_eval_prompts(evaluation, rows)
    stages = {name: RunFolder(out).stage("evaluate", name) for name in models}
    base = models["vanilla"]
    inputs = {"prompts": rows, "base": base, "judge": judge_folder(config, base)}
    pending = [
        Work(stage, config, {**inputs, "model": models[name]}) for name, stage in stages.items() if not stage.done
    ]
    if pending:
        day = first_day(out)
        chat = ChatSettings.of(config.model, day=day)
        evaluate(pending, Context(Progress(quiet=True), False, day, chat, out, out))
    return {name: answers_of(stage.folder / "episodes") for name, stage in stages.items()}


def answers_of(episodes: AnyPath) -> Answers:
    return read_answers(episodes)[MAIN_FAMILY].answers


@dataclass(frozen=True)
class SeedResult:
    """One seed's arms: their answers by judge, and what their training logs say."""

    answers: dict[str, dict[str, Answers]]
    logs: dict[str, dict[str, float]]


def run_seed(arms: dict[str, Config], out: Path) -> SeedResult:
    progress = Progress()
    pipeline = Pipeline(arms, progress=progress)
    try:
        pipeline.check()
        result = run_locked(pipeline)
    finally:
        progress.close()
    run = Path(result["run_dir"])
    models: dict[str, AnyPath] = {"vanilla": pipeline.shared_base}
    models |= {arm: Path(found["iterations"][-1]["model"]) for arm, found in result["arms"].items()}
    folders = read_json(run / "evaluation.json")["answers"]
    oracle = {name: answers_of(Path(folder)) for name, folder in folders.items()}
    base = by_base(next(iter(arms.values())), models, out / f"validation-{run.name}")
    logs = {arm: logged(Path(models[arm]).parent, config) for arm, config in arms.items()}
    return SeedResult({"base": base, "oracle": oracle}, logs)


def logged(stage: Path, config: Config) -> dict[str, float]:
    """A training's number of steps and the seconds in them, and means over the last tenth of its steps."""
    (log,) = stage.glob("**/train_log.jsonl")
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    last = rows[-max(1, len(rows) // 10) :]
    seconds = sum(config.train.batch_size / row["pairs/s"] for row in rows)
    return {
        "steps": len(rows),
        "seconds": seconds,
        **{name: float(np.mean([r[name] for r in last])) for name in LOGGED},
    }


def judged(results: list[SeedResult], judge: str, batches: list[int], orders: list[str]) -> dict[str, dict[str, Any]]:
    """By arm: means over seeds, the paired difference from the first order, and HH_5 seed by seed."""
    out: dict[str, dict[str, Any]] = {}
    for method in METHODS:
        for batch in batches:
            names = [arm_name(method, batch, order) for order in orders]
            arms = {name: [r.answers[judge][name] for r in results] for name in names}
            metrics = arm_metrics(arms, objectives=MEASURES[:2], baseline=names[0], resamples=RESAMPLES, seed=0)
            for name in names:
                means, change = metrics[name].means, metrics[name].differences
                by_seed = [plain_means(answers, objectives=MEASURES[:2])["hh_5"] for answers in arms[name]]
                out[name] = {
                    "means": {m: asdict(means[m]) for m in (*MEASURES, *OTHERS)},
                    "differences": {m: asdict(change[m]) for m in (*MEASURES, *OTHERS) if change},
                    "hh_5_by_seed": by_seed,
                }
    return out


def markdown(study: dict[str, Any]) -> str:
    lines = [
        f"{len(study['seeds'])} seeds; cells: mean over seeds; differences from the first order, paired, 95 % intervals"
    ]
    for judge, title in TITLES.items():
        lines += ["", f"## {title}", "", "| arm | harmless | helpful | HH_5 | difference of HH_5 | by seed | length |"]
        lines += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
        for name, row in study[judge].items():
            means = [f"{row['means'][m]['mean']:.2f}" for m in MEASURES]
            change = row["differences"].get("hh_5")
            cell = f"{change['mean']:+.2f} [{change['low']:+.2f}, {change['high']:+.2f}]" if change else ""
            by_seed = " ".join(f"{value:.2f}" for value in row["hh_5_by_seed"])
            lines.append(
                f"| {name} | {' | '.join(means)} | {cell} | {by_seed} | {row['means']['length']['mean']:.1f} |"
            )
    names = ["steps", "seconds", *LOGGED]
    lines += ["", "## train_log, last tenth of the steps", "", f"| arm | {' | '.join(names)} |"]
    lines += ["| --- |" + " ---: |" * len(names)]
    for arm, row in study["logs"].items():
        lines.append(f"| {arm} | {' | '.join(f'{row[name]:.3g}' for name in names)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seeds", type=int, default=5)
    options.add_argument("--batches", type=int, nargs="+", default=[64, 128], help="pairs in a step")
    options.add_argument("--orders", nargs="+", choices=list(ORDERS), default=["pairs", "prompts"])
    options.add_argument("--out", type=Path, default=Path("runs/order-study"))
    options.add_argument("--limit", type=int, help="of the training prompts; for a trial")
    given = options.parse_args()
    out = given.out.absolute()
    arms = study_arms(out, given.batches, given.orders, given.limit)
    results = []
    with connected(verbose=False):
        for seed in range(given.seeds):
            results.append(run_seed(of_seed(arms, seed), out))
            study: dict[str, Any] = {"seeds": list(range(seed + 1))}
            study |= {judge: judged(results, judge, given.batches, given.orders) for judge in TITLES}
            study["logs"] = {
                arm: {name: float(np.mean([r.logs[arm][name] for r in results])) for name in results[0].logs[arm]}
                for arm in arms
            }
            write_json(out / "study.json", study)
            (out / "study.md").write_text(markdown(study))
    print((out / "study.md").read_text())


if __name__ == "__main__":
    main()
