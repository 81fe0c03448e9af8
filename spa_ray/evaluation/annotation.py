"""Sheets for human annotators: two answers to each prompt, blind and shuffled, as CSV and as a form in one HTML page.

`make_sheet` gives the sheet's rows and, apart from them, the key that says whose answer stands first. `read_sheet`
gives the filled rows as verdicts again. Nothing in a sheet names a model.
"""

from __future__ import annotations

import csv
import hashlib
import html
import io
import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spa_ray.errors import InputError

Row = dict[str, str]
CHOICES = ("1", "2", "tie")
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would run


def make_sheet(
    prompts: Sequence[Mapping[str, Any]], objectives: Sequence[str], *, limit: int | None, seed: int
) -> tuple[list[Row], list[dict[str, Any]]]:
    """Rows `id, conversation, answer_1, answer_2` with an empty cell for each objective, and the key: for each row the
    prompt and whether `a` stands first. prompts: `prompt_id`, `messages`, and the texts `a` and `b`.

    Which prompts, in which order, and the sides follow from the seed.
    """
    draw = random.Random(seed)
    chosen = draw.sample(sorted(prompts, key=lambda p: p["prompt_id"]), k=min(limit or len(prompts), len(prompts)))
    rows, key = [], []
    for number, prompt in enumerate(chosen, 1):
        first = draw.random() < 0.5
        answers = (prompt["a"], prompt["b"]) if first else (prompt["b"], prompt["a"])
        said = "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in prompt["messages"])
        row = {"id": str(number), "conversation": said, "answer_1": answers[0], "answer_2": answers[1]}
        rows.append({**row, **dict.fromkeys(objectives, "")})
        key.append({"id": str(number), "prompt_id": prompt["prompt_id"], "a_first": first})
    return rows, key


def as_csv(rows: Sequence[Row]) -> str:
    """The sheet for a spreadsheet, which takes no cell for a formula."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"'{v}" if v.startswith(FORMULA) else v for k, v in row.items()} for row in rows)
    return out.getvalue()


def read_sheet(
    text: str, key: Sequence[Mapping[str, Any]], objectives: Sequence[str], *, where: str
) -> dict[str, NDArray[np.float64]]:
    """Objective -> verdicts in the key's order: 1 `a`, -1 `b`, 0 a tie, NaN an empty cell.

    Raises: InputError for a sheet of another key, columns that lack, and cells that are neither 1, 2, tie nor empty.
    """
    delimiter = ";" if text.startswith(("id;", '"id";')) else ","  # as some languages' spreadsheets save it
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    lacking = [name for name in ("id", *objectives) if name not in (reader.fieldnames or [])]
    if lacking:
        raise InputError(f"{where}: there is no column {lacking[0]!r}; give the sheet that `spa annotate out` wrote")
    place = {entry["id"]: (k, entry["a_first"]) for k, entry in enumerate(key)}
    found = {name: np.full(len(key), np.nan) for name in objectives}
    try:
        rows = list(reader)
    except csv.Error as e:
        raise InputError(f"{where}: line {reader.line_num}: not CSV ({e})") from e
    for row in rows:
        if row["id"] not in place:
            raise InputError(f"{where}: id {row['id']!r}: the key has no such row; give the key that it was made with")
        at, a_first = place[row["id"]]
        for name in objectives:
            said = (row[name] or "").strip().lower()
            if said and said not in CHOICES:
                raise InputError(f"{where}: id {row['id']}: {name}: {said!r} is not one of {', '.join(CHOICES)}")
            if said:
                found[name][at] = 0.0 if said == "tie" else 1.0 if (said == "1") == a_first else -1.0
    return found


def as_form(rows: Sequence[Row], objectives: Mapping[str, str], name: str) -> str:
    """One HTML page that works without a network: it keeps what is chosen in the browser and saves it as the CSV
    `name`. objectives: name -> what it means."""
    cards = "\n".join(_card(row, objectives) for row in rows)
    meaning = "".join(f"<dt>{html.escape(o)}</dt><dd>{html.escape(text)}</dd>" for o, text in objectives.items())
    # «</script>» in a text cannot end the script: every < is written as an escape of JSON
    told = json.dumps(
        {
            "ids": [row["id"] for row in rows],
            "objectives": list(objectives),
            "name": name,
            "sheet": hashlib.sha256(as_csv(rows).encode()).hexdigest(),  # another one's choices are not this one's
        }
    )
    page = PAGE.replace("@MEANING@", meaning).replace("@TOLD@", told.replace("<", "\\u003c"))
    return page.replace("@CARDS@", cards)


def _card(row: Row, objectives: Mapping[str, str]) -> str:
    asked = ""
    for k, name in enumerate(objectives):
        group = f"{row['id']}.{k}"
        buttons = "".join(f'<label><input type="radio" name="{group}" value="{c}"> {c}</label>' for c in CHOICES)
        asked += f"<fieldset><legend>{html.escape(name)}: which is better?</legend>{buttons}</fieldset>"
    said, first, second = (html.escape(row[part]) for part in ("conversation", "answer_1", "answer_2"))
    answers = f"<div><h3>Answer 1</h3><pre>{first}</pre></div><div><h3>Answer 2</h3><pre>{second}</pre></div>"
    return f'<section><h2>{row["id"]}</h2><pre>{said}</pre><div class="two">{answers}</div>{asked}</section>'


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Which answer is better?</title>
<style>
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { max-width: 70rem; margin: auto; padding: 1rem }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: inherit; margin: 0 }
section { border-top: 2px solid; margin: 2rem 0; padding-top: 1rem }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1rem }
.two { margin-top: 1rem }
.two > div { border: 1px solid; padding: 0 .8rem .8rem }
fieldset { margin: .8rem 0 } label { margin-right: 1.5rem }
footer { position: sticky; bottom: 0; padding: .6rem; background: Canvas; border-top: 1px solid }
button { font: inherit; padding: .4rem 1rem }
</style></head><body>
<h1>Which answer is better?</h1>
<p>Judge each aim by itself. Choose “tie” where neither answer is better.</p>
<dl>@MEANING@</dl>
<form>@CARDS@</form>
<footer><button type="button" id="save">Save as CSV</button> <span id="count"></span></footer>
<script>
const told = @TOLD@, form = document.querySelector("form"), at = "sheet " + told.sheet;
const chosen = () => Object.fromEntries(new FormData(form));
const count = () => { document.getElementById("count").textContent =
  Object.keys(chosen()).length + " of " + told.ids.length * told.objectives.length + " judged" };
try { for (const [name, value] of Object.entries(JSON.parse(localStorage.getItem(at) || "{}")))
  for (const radio of form.elements[name] || []) radio.checked = radio.value === value; } catch (e) {}
form.addEventListener("change", () => {
  try { localStorage.setItem(at, JSON.stringify(chosen())) } catch (e) {}
  count() });
document.getElementById("save").addEventListener("click", () => {
  const quote = text => '"' + String(text).replaceAll('"', '""') + '"', values = chosen();
  const lines = [["id", ...told.objectives], ...told.ids.map(id =>
    [id, ...told.objectives.map((_, k) => values[id + "." + k] || "")])].map(line => line.map(quote).join(","));
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([lines.join("\\n") + "\\n"], { type: "text/csv" }));
  link.download = told.name; link.click() });
count();
</script></body></html>
"""
