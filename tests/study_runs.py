"""Small finished run folders, as the pipeline leaves them, for the tests of the study. An answer's text is its scores
(`8/3`), so that `judge`, which the config names, can read them off it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from spa_ray import Item, Judge, Judgement
from spa_ray.config import arm_configs
from spa_ray.data.schemas import EPISODES, PAIRS
from spa_ray.pipeline.manifest import write_run_config
from spa_ray.storage.folder import RunFolder, StageFolder, write_json

OBJECTIVES = ("harmless", "helpful")
CATEGORY = {"a": "harmful", "b": "benign", "c": "benign"}
Scores = Mapping[str, tuple[float, float] | None]  # prompt -> the answer's scores; None: the prompt failed


def judge(messages: Sequence[Mapping[str, str]], meta: str, response: str, objective: str) -> float:
    assert json.loads(meta)["known"]
    return float(response.split("/")[OBJECTIVES.index(objective)])


class Reader(Judge):
    """The same as a class that is awaited; what holds no scores has none."""

    async def score(self, item: Item) -> list[float | Judgement]:
        if "/" not in item.response:
            return [Judgement(None, "it holds no scores") for _ in item.objectives]
        return [judge(item.messages, item.meta, item.response, objective.name) for objective in item.objectives]


def write_run(
    folder: Path,
    answers: Mapping[str, Mapping[str, Scores]],
    *,
    seed: int = 0,
    pairs: Mapping[str, Sequence[tuple[str, str, str]]] | None = None,
    judged: Mapping[str, Mapping[str, Mapping[str, Scores]]] | None = None,
    **settings: Any,
) -> Path:
    """A run of the arms in `answers` (arm -> family -> scores), `vanilla` among them. pairs: arm -> (prompt, chosen,
    rejected). judged: a further judge -> as `answers`."""
    run = RunFolder(folder)
    arms: dict[str, Any] = {arm: {} for arm in answers if arm != "vanilla"}
    arms |= {"shuffled": {"train.shuffle_labels": True}} if "shuffled" in arms else {}
    raw = {
        "arms": arms,
        "seed": seed,
        "run_dir": str(folder),
        "model": {"path": "none"},
        "evaluation": {"judge": "tests.study_runs:judge", "prompts": {"source": "p.jsonl"}, "bootstrap": 200},
        **settings,
    }
    write_run_config(run, arm_configs(raw, [], where="test", stem="study"))
    stages = {"evalprompts": "evalprompts-0"}
    for arm, families in answers.items():
        stages[arm] = _stage(run, f"evaluate-{arm}", "episodes", _answered(families))
    for arm in arms:
        mine = [_pair(*pair) for pair in (pairs or {}).get(arm, [])]
        asked = [{"prompt_id": row["prompt_id"], "meta": json.dumps({"known": True})} for row in mine]
        made = {
            "generate": _stage(run, f"generate-{arm}", "episodes", pa.Table.from_pylist(asked, schema=EPISODES)),
            "build": _stage(run, f"build-{arm}", "pairs", pa.Table.from_pylist(mine, schema=PAIRS)),
        }
        write_json(run.arm_file(arm, 1), {"stages": made})
    further = {
        f"score:{judge}": {
            arm: _stage(run, f"score-{judge}{arm}", "episodes", _answered(families)) for arm, families in found.items()
        }
        for judge, found in (judged or {}).items()
    }
    write_json(folder / "evaluation.json", {"stages": stages, "judges": further})
    return folder


def _answered(families: Mapping[str, Scores]) -> pa.Table:
    rows = [episode(family, *answer) for family, scores in families.items() for answer in scores.items()]
    return pa.Table.from_pylist(rows, schema=EPISODES)


def episode(family: str, prompt: str, scores: tuple[float, float] | None) -> dict[str, Any]:
    """One answered held-out prompt; in the family `utility` the exact answer is `10/10`."""
    meta = {"family": family, "category": CATEGORY[prompt]}
    if family == "utility":
        meta = {"family": family, "answer": "10/10"}
    row = {"prompt_id": f"{family}/{prompt}", "meta": json.dumps(meta), "error": None if scores else "too long"}
    if scores is None:
        return row
    text = "/".join(f"{score:g}" for score in scores)
    return {**row, "responses": [{"text": text, "scores": list(scores), "token_ids": [1, 2]}]}


def _pair(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    def said(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    return {"prompt_id": prompt, "prompt": [], "chosen": said(chosen), "rejected": said(rejected)}


def _stage(run: RunFolder, name: str, inside: str, table: pa.Table) -> str:
    folder = run.path / "stages" / name
    (folder / inside).mkdir(parents=True)
    pq.write_table(table, folder / inside / "part.parquet")
    StageFolder(*name.split("-"), folder).finish(0.0)
    return name
