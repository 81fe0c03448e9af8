"""Answers with scores that a data set already holds, as episodes: no engine and no judge takes part.

`FORMS` reads the public ones (HelpSteer2, UltraFeedback, HH-RLHF) and rows of one's own, each known by its columns.
Rows are read, checked, refused and counted as prompts are (`prompts.py`).
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from spa_ray.config.models import Episodes, Prompts
from spa_ray.data.episodes import WRITE_OPTIONS
from spa_ray.data.forms import BadRowError, check_text, in_words, split_turns
from spa_ray.data.left_out import DUPLICATE
from spa_ray.data.own_pairs import own_pair
from spa_ray.data.prompts import Prompt, PromptCounts, Seen, to_prompt
from spa_ray.data.readers import Row, read_rows
from spa_ray.data.schemas import imported
from spa_ray.errors import InputError

AT_ONCE = 256  # prompts in memory
HELPSTEER2 = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
ULTRAFEEDBACK = ("instruction_following", "truthfulness", "honesty", "helpfulness")
PREFERRED = "preferred"  # the one score of a preference pair: 1 for the chosen answer, 0 for the rejected one
_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")  # HelpSteer2's, in prompts of several turns

Values = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """`scores` by name, null where there is none."""

    text: str
    scores: Mapping[str, float | None]
    system: str | None = None  # what it was sampled under


@dataclass
class EpisodeCounts(PromptCounts):
    """`rows` are prompts that came out. `attributes`: the names of the scores that were read."""

    answers: int = 0
    attributes: tuple[str, ...] = ()
    named: set[str] = field(default_factory=set, compare=False)  # all names of scores that were seen

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "answers": self.answers, "attributes": list(self.attributes)}


# --- forms -----------------------------------------------------------------------------------------------------------


def _own(values: Values) -> list[Answer]:
    """`responses`: a list of {text, scores: {name: number}}, each perhaps with `system`."""
    answers = values.pop("responses")
    if not isinstance(answers, list) or not all(isinstance(answer, Mapping) for answer in answers):
        raise BadRowError("`responses` is not a list of {text, scores: {name: number}}")
    return [
        Answer(_text(answer.get("text"), f"`responses`[{number}].text"), _scores(answer.get("scores")),
               answer.get("system"))
        for number, answer in enumerate(answers)
    ]  # fmt: skip


def _own_row(values: Values) -> list[Answer]:
    """One answer: `response` and `scores: {name: number}`."""
    return [Answer(_text(values.pop("response"), "`response`"), _scores(values.pop("scores")))]


def _helpsteer2(values: Values) -> list[Answer]:
    """One answer with five ratings of 0-4; r / 4."""
    answer = Answer(_text(values.pop("response"), "`response`"),
                    {name: _rating(values.pop(name), name, 0, 4) for name in HELPSTEER2})  # fmt: skip
    if isinstance(values.get("prompt"), str) and _TURN.search(values["prompt"]):
        values["messages"] = split_turns(values.pop("prompt"), _TURN, "prompt")
    return [answer]


def _ultrafeedback(values: Values) -> list[Answer]:
    """`completions`, each with four ratings of 1-5 as text, «N/A» for none; (r - 1) / 4."""
    answers = []
    for number, given in enumerate(values.pop("completions")):
        name, rated = f"`completions`[{number}]", given.get("annotations") or {}
        scores = {}
        for attribute in ULTRAFEEDBACK:
            found = rated.get(attribute)
            found = found[0] if isinstance(found, list) and found else found
            rating = found.get("Rating") if isinstance(found, Mapping) else None
            scores[attribute] = None if rating in (None, "N/A") else _rating(rating, f"{name} {attribute}", 1, 5)
        answers.append(Answer(_text(given.get("response"), name), scores, given.get("custom_system_prompt")))
    return answers


def _pair(values: Values) -> list[Answer]:
    """`chosen` and `rejected` in any of the forms that `own_pairs` reads (HH-RLHF, TRL): the label is the score."""
    pair = own_pair(Row("", dict(values)))
    for column in ("prompt", "chosen", "rejected"):
        values.pop(column, None)
    values["messages"] = pair.prompt
    return [Answer(pair.chosen, {PREFERRED: 1.0}), Answer(pair.rejected, {PREFERRED: 0.0})]


def _text(value: Any, name: str) -> str:
    return check_text(value, name, "an answer")


def _scores(value: Any) -> dict[str, float | None]:
    if not isinstance(value, Mapping):
        raise BadRowError(f"`scores` is {in_words(value)}; give {{name: number}}, the number null where there is none")
    for name, score in value.items():
        if score is not None and (isinstance(score, bool) or not isinstance(score, int | float)):
            raise BadRowError(f"the score {str(name)!r} is {in_words(score)}; a score is a number or null")
        if score is not None and not math.isfinite(score):
            raise BadRowError(f"the score {str(name)!r} is {score}; a score is a finite number or null")
    return {str(name): None if score is None else float(score) for name, score in value.items()}


def _rating(value: Any, name: str, low: int, high: int) -> float:
    """A rating from `low` to `high` as a score from 0 to 1, two decimals."""
    try:
        rating = float("nan" if isinstance(value, bool) else value)
    except (TypeError, ValueError):
        rating = math.nan
    if not low <= rating <= high:
        raise BadRowError(f"{name} is {value!r}; a rating is a number from {low} to {high}")
    return round((rating - low) / (high - low), 2)


# The columns that show a form, and what makes answers of a row; what that leaves is the prompt and `meta`.
FORMS: tuple[tuple[tuple[str, ...], Callable[[Values], list[Answer]]], ...] = (
    (("responses",), _own),
    (("completions",), _ultrafeedback),
    (("chosen", "rejected"), _pair),
    (("response", "scores"), _own_row),
    (("response", *HELPSTEER2), _helpsteer2),
)


# --- episodes --------------------------------------------------------------------------------------------------------


@dataclass
class _Given:
    place: str
    prompt: Prompt
    answers: list[Answer]


def read_episodes(section: Episodes, counts: EpisodeCounts) -> Iterator[Values]:
    """Rows of EPISODES, one per prompt, in the source's order; rows of one answer each that follow each other and share
    a prompt are one episode. The first row's scores are read where the section names no attributes.

    Raises: InputError at a bad row (unless `on_bad_row` is skip), where the source cannot be read, and where no answer
    has a score of an attribute's name.
    """
    seen = Seen()
    counts.attributes = section.attributes or ()
    for given in _grouped(section, counts):
        try:
            if not seen.add(given.prompt):
                counts.duplicates += 1
                counts.dropped.add(DUPLICATE, given.place, "the same messages as in an earlier row")
                continue
            row = _episode(given, section, counts)
        except BadRowError as e:
            counts.refuse(given.place, e, section.on_bad_row, where="episodes")
            continue
        counts.rows += 1
        counts.answers += len(given.answers)
        yield row
        if counts.rows == section.limit:
            break
    strange = [name for name in counts.attributes if name not in counts.named]
    if strange and counts.rows:
        raise InputError(
            f"episodes.attributes: no answer of {section.source} has a score {strange[0]!r}; they have "
            f"{', '.join(sorted(counts.named))}"
        )


def _grouped(section: Episodes, counts: EpisodeCounts) -> Iterator[_Given]:
    held: _Given | None = None
    for row in read_rows(Prompts(source=section.source, split=section.split), where="episodes", notes=counts.told):
        if row.blank:
            counts.dropped.add("empty", row.place, "an empty line")
            continue
        try:
            given, alone = _read(row, counts)
        except BadRowError as e:
            counts.refuse(row.place, e, section.on_bad_row, where="episodes")
            continue
        if held and alone and all(held.prompt[key] == given.prompt[key] for key in ("prompt_id", "messages")):
            held.answers += given.answers
            continue
        if held:
            yield held
        held = given
    if held:
        yield held


def _read(row: Row, counts: EpisodeCounts) -> tuple[_Given, bool]:
    """A row, and whether it holds one answer of perhaps several of its prompt. Raises: BadRowError."""
    if row.values is None:
        raise BadRowError(str(row.problem), "unreadable")
    values = dict(row.values)
    read = next((read for columns, read in FORMS if all(values.get(name) is not None for name in columns)), None)
    if read is None:
        raise BadRowError(
            f"no answers with scores (columns: {', '.join(map(str, values))}); give `prompt` and `responses`: "
            "[{text, scores: {name: number}}]",
            "no answers",
        )
    answers = read(values)
    prompt = to_prompt(Row(row.place, values), {}, left_out=counts.left_out)
    return _Given(row.place, prompt, answers), read in (_own_row, _helpsteer2)


def _episode(given: _Given, section: Episodes, counts: EpisodeCounts) -> Values:
    names = list(dict.fromkeys(name for answer in given.answers for name in answer.scores))
    counts.named.update(names)
    counts.attributes = counts.attributes or tuple(names)
    strange = set(names) - set(counts.attributes)
    if strange and section.attributes is None:
        raise BadRowError(f"has a score {min(strange)!r}, the first row has none; name all with episodes.attributes")
    scores = [[answer.scores.get(name) for name in counts.attributes] for answer in given.answers]
    responses = [
        {
            "index": index,
            "kind": "candidate",
            "text": answer.text,
            "system": answer.system,
            "scores": found,
            "score_draws": [[] if score is None else [score] for score in found],
            "score_status": ["missing" if score is None else "ok" for score in found],
        }
        for index, (answer, found) in enumerate(zip(given.answers, scores, strict=True))
    ]
    return {**given.prompt, "responses": responses, "scores": scores, "attempt": 0, "prompt_tokens": 0,
            "generated_tokens": 0}  # fmt: skip


def write_episodes(section: Episodes, out: Path) -> EpisodeCounts:
    """Write a source's answers to one Parquet file of EPISODES, by rename once all rows are checked.

    Raises: InputError as `read_episodes` does, and when no prompt is left.
    """
    counts = EpisodeCounts()
    rows = read_episodes(section, counts)
    first = list(islice(rows, AT_ONCE))  # names the attributes
    if not first:
        why = f"; {counts.bad} bad rows, the first: {counts.first_bad}" if counts.bad else ""
        raise InputError(f"episodes.source: {section.source}: no prompt with answers in it{why}")
    schema = imported(counts.attributes)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        with pq.ParquetWriter(part, schema, **WRITE_OPTIONS) as writer:
            for group in itertools.chain([first], iter(lambda: list(islice(rows, AT_ONCE)), [])):
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    return counts
