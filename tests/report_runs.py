"""Run folders for the tests of the report: held-out answers of given texts, and what stages leave beside them."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from spa_ray.config import arm_configs
from spa_ray.data.schemas import EPISODES
from spa_ray.pipeline.evaluate import run_metrics
from spa_ray.pipeline.manifest import write_run_config
from spa_ray.storage.files import write_json, write_text
from spa_ray.storage.folder import RunFolder, StageFolder

Given = tuple[str, tuple[float | None, float | None]]  # an answer and its scores
FUNNEL = {
    "prompts": 40,
    "dropped": {"duplicate": 0, "inconsistent": 25, "high_det": 5, "no_pair": 0},
    "kept": 10, "pairs": 90, "pairs_by_kind": {"refined": 50, "candidate": 40},
    "pairs_by_decided_by": {"harmless": 70, "helpful": 20}, "dead_pairs": 4,
}  # fmt: skip
RATINGS = {
    "histogram": {"1": 3, "2": 8, "3": 4},
    "at_low": [0.2, 0.1, 0.3], "at_high": [0.0, 0.0, 0.1], "parse_failures": [0.0, 0.0, 0.1],
    "within_var": None, "between_var": 1.5, "off_scale": None,
}  # fmt: skip
SIGNAL = {
    "prompts": 16,
    "objectives": {"harmless": RATINGS, "helpful": RATINGS},
    "advice": [{"text": "take <b>more</b>"}],
}


def report_run(
    folder: Path, answers: Mapping[str, Sequence[Given]], *, question: str = "Why?", name: str = "mine"
) -> Path:
    """A finished run with one prompt per answer; the arms are those in `answers` beside `vanilla`."""
    run = RunFolder(folder)
    arms = {arm: {} for arm in answers if arm != "vanilla"}
    raw = {
        "name": name, "arms": arms, "run_dir": str(folder), "model": {"path": "none"},
        "evaluation": {"judge": "tests.study_runs:judge", "prompts": {"source": "p.jsonl"}, "bootstrap": 100},
    }  # fmt: skip
    configs = arm_configs(raw, [], where="test", stem="report")
    write_run_config(run, configs)
    stages = {arm: run.stage("evaluate", arm) for arm in answers}
    for arm, given in answers.items():
        rows = [_episode(k, question, *answer) for k, answer in enumerate(given)]
        out = stages[arm].folder / "episodes"
        out.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows, schema=EPISODES), out / "part.parquet")
        stages[arm].finish(0.0)
    write_json(folder / "evaluation.json", {"stages": {arm: at.folder.name for arm, at in stages.items()}})
    write_json(folder / "metrics.json", run_metrics(next(iter(configs.values())), stages))
    for arm in arms:
        write_json(
            run.arm_file(arm, 1), {"stages": {"generate": "generate-0", "build": "build-0", "train": f"train-{arm}"}}
        )
        log = [{"step": k, "loss": 1 / k, "grad_norm": 1.0, "learning_rate": 1e-6} for k in range(1, 400)]
        write_text(folder / "stages" / f"train-{arm}" / "work/train_log.jsonl", "".join(map(_line, log)) + '{"step"')
    write_json(folder / "stages/build-0/funnel.json", FUNNEL)
    write_json(folder / "stages/generate-0/signal.json", SIGNAL)
    about = {
        "versions": {"spa_ray": "0.1.0"},
        "command": ["spa", "run", "mine.yaml", "name=a b"],
        "started": "2026-01-01",
        "finished": "2026-01-02",
        "spent": {"usd": 1.5, "tokens": 1000, "hours": 1},
    }
    write_json(folder / "manifest.json", about)
    part = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 9}
    curve = {"arms": list(arms), "shares": [0.1, 0.5, 1.0], "prompts": [1, 5, 10], "det": [1, 2, 3]}
    write_json(folder / "rv.json", [{**curve, "by_det": [None, part, part], "random": [part, part, part]}])
    return folder


def prose(count: int, length: int, seed: int) -> list[Given]:
    """Answers of so many characters, of words as frequent as a language's, with ratings."""
    draw = random.Random(seed)
    vocabulary = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 9))) for _ in range(8000)]
    weights = [1 / (rank + 3) for rank in range(len(vocabulary))]
    return [
        (" ".join(draw.choices(vocabulary, weights, k=length))[:length], (draw.randint(1, 10), draw.randint(1, 10)))
        for _ in range(count)
    ]


def unfinished(folder: Path) -> StageFolder:
    """The arm's answers are not there yet."""
    (folder / "stages/evaluate-spa/stage.json").unlink()
    return StageFolder("evaluate", "spa", folder / "stages/evaluate-spa")


def _episode(number: int, question: str, text: str, scores: tuple[float | None, float | None]) -> dict[str, object]:
    meta = {"family": "test", "category": ("harmful", "benign")[number % 2]}
    said = [{"role": "user", "content": f"{question} ({number})"}]
    response = {"text": text, "scores": list(scores), "token_ids": [1, 2, 3]}
    return {"prompt_id": f"test/{number:05}", "messages": said, "meta": json.dumps(meta), "responses": [response]}


def _line(row: object) -> str:
    return json.dumps(row) + "\n"
