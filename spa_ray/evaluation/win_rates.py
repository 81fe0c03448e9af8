"""Win rates: from the verdicts of a pairwise judge to wins, ties and losses (FastChat's rule) with intervals.

Takes verdicts as arrays (prompts, orders): 1 the first answer, -1 the other, 0 a tie, NaN where the judge failed. Both
orders are asked: the same winner twice is a win, all else a tie; one failed order makes the comparison failed, and no
failed comparison is part of N.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from spa_ray.data.schemas import JUDGEMENTS
from spa_ray.evaluation.agreement import swap_consistency
from spa_ray.evaluation.bootstrap import as_json, mean_interval, statistic_interval

Floats = NDArray[np.float64]
VALUES = {"a": 1.0, "tie": 0.0, "b": -1.0, "failed": np.nan}
WORDS = {value: word for word, value in VALUES.items() if word != "failed"}


def compared(verdicts: Floats) -> Floats:
    """(prompts,): 1 a win, 0 a tie, -1 a loss of the first answer; NaN a failed comparison. verdicts (prompts, orders),
    one order or two."""
    first, last = verdicts[:, 0], verdicts[:, -1]
    same = np.where(first == last, first, 0.0)
    return np.where(np.isnan(verdicts).any(axis=1), np.nan, same)


def win_rate(verdicts: Floats, *, resamples: int, seed: int) -> dict[str, Any]:
    """`wins`, `ties`, `losses`, `failed`, `n` (without the failed), the `win_rate` (W + T/2) / N; and of the judge:
    `consistency`, the share of equal verdicts in both orders, and `first_wins`, the share of its decided verdicts that
    went to the answer it saw first. Intervals are null where nothing can be counted."""
    outcome = compared(verdicts)
    known = outcome[np.isfinite(outcome)]
    interval = partial(statistic_interval, resamples=resamples, seed=seed)
    both = verdicts.shape[1] == 2
    rate = as_json(mean_interval((known + 1) / 2, resamples=resamples, seed=seed)) if len(known) else None
    return {
        "wins": int((known == 1).sum()),
        "ties": int((known == 0).sum()),
        "losses": int((known == -1).sum()),
        "failed": len(outcome) - len(known),
        "n": len(known),
        "win_rate": rate,
        "consistency": as_json(interval(swap_consistency, verdicts[:, 0], verdicts[:, 1])) if both else None,
        "first_wins": as_json(interval(first_wins, verdicts)),
    }


def first_wins(verdicts: Floats) -> float:
    """Of the verdicts that name a winner, the share that name the answer shown first; 0.5 is no bias of position once
    both orders are asked."""
    seen = verdicts * np.array([1.0, -1.0])[: verdicts.shape[1]]  # in the order "ba" the other answer is shown first
    decided = np.abs(seen) == 1
    return float((seen[decided] == 1).mean()) if decided.any() else float("nan")


def win_rates(judgements: pa.Table, families: Sequence[str], *, resamples: int, seed: int) -> dict[str, Any]:
    """Family -> objective -> `win_rate`, of one table of JUDGEMENTS. A prompt_id begins with its family's name."""
    found: dict[str, Any] = {}
    table = judgements.sort_by([("prompt_id", "ascending"), ("order", "ascending")])
    rows = list(zip(*(table[name].to_pylist() for name in ("prompt_id", "objective", "order", "verdict")), strict=True))
    orders, objectives = sorted({row[2] for row in rows}), list(dict.fromkeys(judgements["objective"].to_pylist()))
    for family in families:
        mine = [row for row in rows if row[0].startswith(f"{family}/")]
        by_objective = {
            name: np.array([VALUES[row[3]] for row in mine if row[1] == name], dtype=np.float64) for name in objectives
        }
        if mine:
            found[family] = {
                name: win_rate(values.reshape(-1, len(orders)), resamples=resamples, seed=seed)
                for name, values in by_objective.items()
            }
    return found


def judgements(episodes: pa.Table, objectives: Sequence[str], orders: Sequence[str], *, a: str, b: str) -> pa.Table:
    """JUDGEMENTS of the rows that `generation.pairwise` wrote. A row with an error is a failed verdict throughout."""
    rows = []
    for row in episodes.to_pylist():
        for place, order in enumerate(orders):
            answer = row["responses"][place] if row["error"] is None else None
            for k, objective in enumerate(objectives):
                value = answer["scores"][k] if answer else None
                told = {
                    "verdict": "failed" if value is None else WORDS[value],
                    "judge_text": answer["judge_texts"][k] if answer else "",
                    "status": answer["score_status"][k] if answer else row["error"],
                }
                names = {"prompt_id": row["prompt_id"], "a": a, "b": b, "objective": objective, "order": order}
                rows.append({**names, **told, "attempt": row["attempt"]})
    return pa.Table.from_pylist(rows, schema=JUDGEMENTS)
