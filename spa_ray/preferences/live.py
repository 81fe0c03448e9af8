"""The live funnel: what a finished episode's filters say while the pass still runs, before τ can be known.

Comes in: rows of EPISODES as dicts, and one arm's Config. Goes out: the reason for which `denoise` would drop each, or
None. It is `denoise` itself on the rows' narrow parts, so the two cannot disagree. Never: a reason that needs other
rows (`duplicate`, `high_det`, `no_pair`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from spa_ray.config.models import Config
from spa_ray.data.schemas import SCORES
from spa_ray.preferences.denoising import denoise

PASSED = "passed"  # no reason so far: of these, `build` still drops those above τ
LIVE_REASONS = ("error", "too_few_scores", "inconsistent", "zero_det")
LIVE_CLASSES = (PASSED, *LIVE_REASONS)

_NARROW = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("responses", pa.list_(pa.struct([("kind", pa.string())]))),
        ("scores", pa.list_(SCORES)),
        ("error", pa.string()),
        ("attempt", pa.int32()),
    ]
)


def live_reason(row: Mapping[str, Any], config: Config) -> str | None:
    """One of LIVE_REASONS, or None for a prompt that passes everything that its own row decides. See `live_reasons`."""
    return live_reasons([row], config)[0]


def live_reasons(rows: Sequence[Mapping[str, Any]], config: Config) -> list[str | None]:
    """`live_reason` of several rows at once, each judged alone: a block of 32 costs little more than one row.

    What passes is an upper bound of what `build` keeps: τ, the upper bound of det Σ, is a quantile over all prompts and
    is known at the end. Arms that share their episodes may filter them differently; the config's own rules count here.
    Raises: InputError for a row whose parts do not fit together, as `denoise` does.
    """
    narrow = [
        {
            "prompt_id": str(position),  # each row stands for itself, also where two are of one prompt
            "responses": [{"kind": response["kind"]} for response in row["responses"]],
            "scores": row["scores"],
            "error": row["error"],
            "attempt": 0,
        }
        for position, row in enumerate(rows)
    ]
    table = denoise(pa.Table.from_pylist(narrow, _NARROW), config, tau=None)
    reasons: list[str | None] = table["drop_reason"].to_pylist()
    return reasons
