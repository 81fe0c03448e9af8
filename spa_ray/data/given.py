"""Answers with scores that a data set already holds, as episodes: no engine and no judge takes part.

`FORMS` reads the public ones (HelpSteer2, UltraFeedback, HH-RLHF) and rows of one's own, each known by its columns.
Rows are read, checked, refused and counted as prompts are (`prompts.py`).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from spa_ray.config.models import Episodes, Prompts
from spa_ray.data.episodes import WRITE_OPTIONS
from spa_ray.data.forms import BadRowError, check_text, in_words
from spa_ray.data.left_out import DUPLICATE
from spa_ray.data.own_pairs import own_pair, score_of, split_turns
from spa_ray.data.prompts import Prompt, PromptCounts, Seen, to_prompt, write_rows
from spa_ray.data.readers import Row, read_rows
from spa_ray.data.schemas import imported
from spa_ray.errors import InputError

HELPSTEER2 = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
ULTRAFEEDBACK = ("instruction_following", "truthfulness", "honesty", "helpfulness")
PREFERRED = "preferred"  # the one score of a preference pair: 1 for the chosen answer, 0 for the rejected one
_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")  # HelpSteer2's, in prompts of several turns

Values = dict[str, Any]


class Answer(NamedTuple):
    """`scores` by name, null where there is none; `system` is what it was sampled under."""

    text: str
    scores: Mapping[str, float | None]
    system: str | None = None


@dataclass
class EpisodeCounts(PromptCounts):
    """`rows` are prompts that came out; `attributes` the names of the scores that were read, of all `named` ones."""

    answers: int = 0
    attributes: tuple[str, ...] = ()
    named: set[str] = field(default_factory=set, compare=False)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "answers": self.answers, "attributes": list(self.attributes)}


# --- forms: each takes the answers out of a row's values; what is left is the prompt and `meta` -----------------------


def _answer(given: Any, name: str) -> Answer:
    """{text, scores: {name: number}}, perhaps with `system`."""
    if not isinstance(given, Mapping) or not isinstance(given.get("scores"), Mapping):
        raise BadRowError(f"{name} is no answer; give {{text, scores: {{name: number, or null where there is none}}}}")
    scores = {str(key): None if value is None else score_of(value, key) for key, value in given["scores"].items()}
    return Answer(check_text(given.get("text"), f"{name}.text", "an answer"), scores, given.get("system"))


def _own(values: Values) -> list[Answer]:
    answers = values.pop("responses")
    if not isinstance(answers, list):
        raise BadRowError(f"`responses` is {in_words(answers)}; give a list of {{text, scores: {{name: number}}}}")
    return [_answer(answer, f"`responses`[{number}]") for number, answer in enumerate(answers)]


def _own_row(values: Values) -> list[Answer]:
    return [_answer({"text": values.pop("response"), "scores": values.pop("scores")}, "`response`")]


def _helpsteer2(values: Values) -> list[Answer]:
    """One answer with five ratings of 0-4; r / 4."""
    scores = {name: _rating(values.pop(name), name, 0, 4) for name in HELPSTEER2}
    if isinstance(values.get("prompt"), str) and _TURN.search(values["prompt"]):
        values["messages"] = split_turns(values.pop("prompt"), _TURN, "prompt")
    return [Answer(check_text(values.pop("response"), "`response`", "an answer"), scores)]


def _ultrafeedback(values: Values) -> list[Answer]:
    """`completions`, each with four ratings of 1-5 as text, «N/A» for none; (r - 1) / 4."""
    answers = []
    for number, given in enumerate(values.pop("completions")):
        name, scores = f"`completions`[{number}]", {}
        for attribute in ULTRAFEEDBACK:
            rating = given["annotations"][attribute]["Rating"]
            scores[attribute] = None if rating in (None, "N/A") else _rating(rating, f"{name} {attribute}", 1, 5)
        text = check_text(given["response"], name, "an answer")
        answers.append(Answer(text, scores, given.get("custom_system_prompt")))
    return answers


def _pair(values: Values) -> list[Answer]:
    """`chosen` and `rejected` in any of the forms that `own_pairs` reads (HH-RLHF, TRL): the label is the score."""
    pair = own_pair(Row("", dict(values)))
    for column in ("prompt", "chosen", "rejected"):
        values.pop(column, None)
    values["messages"] = pair.prompt
    return [Answer(pair.chosen, {PREFERRED: 1.0}), Answer(pair.rejected, {PREFERRED: 0.0})]


def _rating(value: Any, name: str, low: int, high: int) -> float:
    """A rating from `low` to `high` as a score from 0 to 1, two decimals."""
    try:
        rating = float("nan" if isinstance(value, bool) else value)
    except (TypeError, ValueError):
        rating = math.nan
    if not low <= rating <= high:
        raise BadRowError(f"{name} is {value!r}; a rating is a number from {low} to {high}")
    return round((rating - low) / (high - low), 2)


FORMS: Mapping[tuple[str, ...], Callable[[Values], list[Answer]]] = {  # by the columns that show each
    ("responses",): _own,
    ("completions",): _ultrafeedback,
    ("chosen", "rejected"): _pair,
    ("response", "scores"): _own_row,
    ("response", *HELPSTEER2): _helpsteer2,
}
NO_FORM = "no answers with scores (columns: {}); give `prompt` and `responses`: [{{text, scores: {{name: number}}}}]"

# --- episodes --------------------------------------------------------------------------------------------------------


class _Given(NamedTuple):
    place: str
    prompt: Prompt
    answers: list[Answer]
    key: Any  # rows with equal ones that follow each other are one episode


def read_episodes(section: Episodes, counts: EpisodeCounts) -> Iterator[Values]:
    """Rows of EPISODES, one per prompt, in the source's order. The first row's scores are read where the section names
    no attributes; rows of one answer each that follow each other and share a prompt are one episode.

    Raises: InputError at a bad row (unless `on_bad_row` is skip), where the source cannot be read, and where no answer
    has a score of an attribute's name.
    """
    seen, counts.attributes = Seen(), section.attributes or ()
    for _, rows in itertools.groupby(_given(section, counts), key=lambda given: given.key):
        first, *others = rows
        try:
            new = seen.add(first.prompt)
        except BadRowError as e:
            counts.refuse(first.place, e, section.on_bad_row, where="episodes")
            continue
        if not new:
            counts.duplicates += 1
            counts.dropped.add(DUPLICATE, first.place, "the same messages as in an earlier row")
            continue
        answers = [answer for given in (first, *others) for answer in given.answers]
        counts.named.update(*(answer.scores for answer in answers))
        counts.attributes = counts.attributes or tuple(dict.fromkeys(n for answer in answers for n in answer.scores))
        counts.rows, counts.answers = counts.rows + 1, counts.answers + len(answers)
        yield _episode(first.prompt, answers, counts.attributes)
        if counts.rows == section.limit:
            break
    strange, unread = set(counts.attributes) - counts.named, sorted(counts.named - set(counts.attributes))
    if strange and counts.rows:
        there = f"they have {', '.join(sorted(counts.named))}"
        raise InputError(f"episodes.attributes: no answer of {section.source} has a score {min(strange)!r}; {there}")
    if unread:
        counts.told[f"episodes: {section.source}: scores that episodes.attributes leaves out: {', '.join(unread)}"] = (
            None
        )


def _given(section: Episodes, counts: EpisodeCounts) -> Iterator[_Given]:
    for row in read_rows(Prompts(source=section.source, split=section.split), where="episodes", notes=counts.told):
        if row.blank:
            counts.dropped.add("empty", row.place, "an empty line")
            continue
        try:
            yield _read(row, counts)
        except BadRowError as e:
            counts.refuse(row.place, e, section.on_bad_row, where="episodes")


def _read(row: Row, counts: EpisodeCounts) -> _Given:
    """Raises: BadRowError."""
    if row.values is None:
        raise BadRowError(str(row.problem), "unreadable")
    values = dict(row.values)
    form = next((form for columns, form in FORMS.items() if all(values.get(c) is not None for c in columns)), None)
    if form is None:
        raise BadRowError(NO_FORM.format(", ".join(map(str, values))), "no answers")
    try:
        answers = form(values)
    except (AttributeError, KeyError, TypeError) as e:
        raise BadRowError(f"`completions` are not UltraFeedback's ({type(e).__name__}: {e})") from e
    prompt = to_prompt(Row(row.place, values), {}, left_out=counts.left_out)
    alone = form in (_own_row, _helpsteer2)
    return _Given(row.place, prompt, answers, (prompt["prompt_id"], prompt["messages"]) if alone else object())


def _episode(prompt: Prompt, answers: list[Answer], names: tuple[str, ...]) -> Values:
    scores = [[answer.scores.get(name) for name in names] for answer in answers]
    responses = [
        {
            "index": index,
            "kind": "candidate",
            **answer._asdict(),
            "scores": found,
            "score_draws": [[] if score is None else [score] for score in found],
            "score_status": ["missing" if score is None else "ok" for score in found],
        }
        for index, (answer, found) in enumerate(zip(answers, scores, strict=True))
    ]
    tokens = {"prompt_tokens": 0, "generated_tokens": 0}
    return {**prompt, "responses": responses, "scores": scores, "attempt": 0, **tokens}


def write_episodes(section: Episodes, out: Path) -> EpisodeCounts:
    """Write a source's answers to one Parquet file of EPISODES, by rename once all rows are checked.

    Raises: InputError as `read_episodes` does, and when no prompt is left.
    """
    counts = EpisodeCounts()
    rows = read_episodes(section, counts)
    first = next(rows, None)  # names the attributes
    if first is None:
        why = f"; {counts.bad} bad rows, the first: {counts.first_bad}" if counts.bad else ""
        raise InputError(f"episodes.source: {section.source}: no prompt with answers in it{why}")
    write_rows(itertools.chain([first], rows), imported(counts.attributes), out, **WRITE_OPTIONS)
    return counts
