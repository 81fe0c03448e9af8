"""The page's answers: the first ones as JSON, further ones deflated, and all of them as JSON lines beside the page."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from spa_ray.evaluation.tables import UNSAFE_BELOW
from spa_ray.logs import printable
from spa_ray.report.run_data import Asked, RunData

PLAIN = 400  # answers that are in the page as they are
LIMIT = 5_500_000  # bytes of deflated answers; a page holds no more

# In a script element only `<` could end it; the line separators are no JavaScript of old.
ESCAPES = {"<": "\\u003c", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def group_of(asked: Asked) -> str:
    return f"{asked.family}: {asked.category}" if asked.category else asked.family


def page_data(run: RunData) -> tuple[Markup, str, int]:
    """(the JSON of the answers that are in the page as they are, the deflated rest in base64, prompts in the page)."""
    rows = [_row(asked, run.models) for asked in run.asked]
    first = PLAIN // max(len(run.models), 1)
    told = {
        "models": run.models,
        "objectives": run.objectives,
        "fold": run.config["evaluation"].get("unsafe_below", UNSAFE_BELOW),
        "rows": rows[:first],
    }
    packed, kept = deflated(rows[first:])
    return Markup(script_json(told)), packed, min(len(rows), first) + kept


def deflated(rows: Sequence[dict[str, Any]], limit: int = LIMIT) -> tuple[str, int]:
    """As many of the rows as fit, as base64 of zlib's JSON list, and how many they are."""
    packer, out, kept = zlib.compressobj(9), b"", 0
    for kept, row in enumerate(rows, 1):
        text = ("[" if kept == 1 else ",") + json.dumps(row, ensure_ascii=False)
        out += packer.compress(text.encode())
        if len(out) > limit:
            break
    out += packer.compress(b"]" if kept else b"") + packer.flush()
    return (base64.b64encode(out).decode() if kept else ""), kept


def script_json(value: Any) -> str:
    """JSON that may stand in a script element, whatever texts it holds."""
    text = json.dumps(value, ensure_ascii=False)
    for character, escape in ESCAPES.items():
        text = text.replace(character, escape)
    return text


def _row(asked: Asked, models: Sequence[str]) -> dict[str, Any]:
    given = [asked.answers.get(model) for model in models]
    return {
        "id": asked.prompt_id,
        "group": group_of(asked),
        "said": [[turn["role"], printable(turn["content"])] for turn in asked.messages],
        "answers": [a and [printable(a.text), a.scores] for a in given],
    }


def json_lines(run: RunData) -> str:
    """Every held-out prompt with every model's answer, one JSON object a line, texts as the models gave them."""
    lines = []
    for asked in run.asked:
        answers = {arm: {"text": a.text, "scores": a.scores} for arm, a in asked.answers.items()}
        row = {"prompt_id": asked.prompt_id, "family": asked.family, "category": asked.category,
               "messages": asked.messages, "objectives": run.objectives, "answers": answers}  # fmt: skip
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    return "".join(lines)
