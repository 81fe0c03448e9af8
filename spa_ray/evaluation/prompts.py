"""Held-out prompts: the evaluation's own set and its further families, as one Parquet file that says which is which.

Comes in: the `evaluation` section. Goes out: rows of the PROMPTS schema whose id begins with the family's name and
whose meta holds `family`. Never: training prompts (an overlap with them is counted, not mended).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from spa_ray.config.evaluation import Evaluation
from spa_ray.data.left_out import LeftOut
from spa_ray.data.prompts import Check, Prompt, PromptCounts, read_prompts
from spa_ray.data.schemas import PROMPTS
from spa_ray.errors import InputError

MAIN_FAMILY = "test"


@dataclass
class EvalPromptCounts:
    """Prompts by family."""

    rows: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # one line for each file and column that was left out
    dropped: dict[str, LeftOut] = field(default_factory=dict)  # rows that were left out, by the source's key

    def to_dict(self) -> dict[str, Any]:
        """What a stage's record says of them."""
        return {"rows": self.rows, "notes": self.notes}


def write_eval_prompts(evaluation: Evaluation, out: Path, *, check: Check | None = None) -> EvalPromptCounts:
    """Write all families to one file, by rename. Raises: InputError as `read_prompts` does, or without any prompts."""
    counts = EvalPromptCounts()
    rows = list(_rows(evaluation, counts, check))
    if not rows:
        raise InputError(
            "evaluation.prompts.source: missing; name held-out prompts, or stop earlier with --until train"
        )
    fresh = out.with_name(f".{out.name}.{os.getpid()}.part")
    pq.write_table(pa.Table.from_pylist(rows, schema=PROMPTS), fresh)
    fresh.replace(out)
    return counts


def _rows(evaluation: Evaluation, counts: EvalPromptCounts, check: Check | None) -> Iterator[Prompt]:
    sets = {**({MAIN_FAMILY: evaluation.prompts} if evaluation.prompts else {}), **evaluation.families}
    for family, prompts in sets.items():
        where = "evaluation.prompts" if family == MAIN_FAMILY else f"evaluation.families.{family}"
        found = PromptCounts()
        for prompt in read_prompts(prompts, where=where, counts=found, check=check):
            meta = {**json.loads(prompt["meta"]), "family": family}
            yield {
                "prompt_id": f"{family}/{prompt['prompt_id']}",
                "messages": prompt["messages"],
                "meta": json.dumps(meta, ensure_ascii=False, sort_keys=True),
            }
        counts.notes += found.notes(where)
        counts.dropped[where] = found.dropped
        if not found.rows:
            raise InputError(f"{where}.source: {prompts.source}: no prompt in it")
        counts.rows[family] = found.rows
