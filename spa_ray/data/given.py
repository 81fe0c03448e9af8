"""Answers with scores that a data set already holds, as episodes: no engine and no judge takes part.

`forms` has those of public data sets, which their own files know, and of rows of one's own, each shown by its columns.
Rows are read, checked, refused and counted as prompts are (`prompts.py`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from spa_ray.config.plugs import SOURCES, load_plug
from spa_ray.config.prompts import Episodes, Prompts
from spa_ray.data.forms import BadRowError, check_text, in_words
from spa_ray.data.left_out import DUPLICATE
from spa_ray.data.named import Answer, DataSet, Values
from spa_ray.data.overlap import Wordings
from spa_ray.data.own_pairs import own_pair, score_of
from spa_ray.data.prompts import Prompt, PromptCounts, Seen, to_prompt, write_rows
from spa_ray.data.readers import Row, read_rows
from spa_ray.data.schemas import WRITE_OPTIONS, imported
from spa_ray.errors import InputError

Ranges = Mapping[str, tuple[float, float]]  # by the score's name
PREFERRED = "preferred"  # the one score of a preference pair: 1 for the chosen answer, 0 for the rejected one


@dataclass
class EpisodeCounts(PromptCounts):
    """`rows` are prompts that came out; `attributes` the names of the scores that were read, of all `named` ones, and
    `ranges` theirs where they are known."""

    answers: int = 0
    attributes: tuple[str, ...] = ()
    ranges: tuple[tuple[float, float], ...] | None = field(default=None, compare=False)
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


def _pair(values: Values) -> list[Answer]:
    """`chosen` and `rejected` in any of the forms that `own_pairs` reads (HH-RLHF, TRL): the label is the score."""
    pair = own_pair(Row("", dict(values)))
    for column in ("prompt", "chosen", "rejected"):
        values.pop(column, None)
    values["messages"] = pair.prompt
    return [Answer(pair.chosen, {PREFERRED: 1.0}), Answer(pair.rejected, {PREFERRED: 0.0})]


class _Form(NamedTuple):
    columns: tuple[str, ...]  # show it
    answers: Callable[[Values], list[Answer]]
    prompt: Callable[[Values], Values] = dict  # what is left of the row
    ranges: Ranges = MappingProxyType({})


@cache
def forms() -> tuple[_Form, ...]:
    """Our own, and those of public data sets."""
    pair = _Form(("chosen", "rejected"), _pair, ranges={PREFERRED: (0, 1)})
    own = (_Form(("responses",), _own), pair, _Form(("response", "scores"), _own_row))
    sets: list[DataSet] = [load_plug(SOURCES, name, where="episodes.source") for name in SOURCES]
    return (*own, *(_Form(s.shown_by, s.answers, s.row, s.ranges) for s in sets if s.answers is not None))


NO_FORM = "no answers with scores (columns: {}); give `prompt` and `responses`: [{{text, scores: {{name: number}}}}]"

# --- episodes --------------------------------------------------------------------------------------------------------


class _Given(NamedTuple):
    place: str
    prompt: Prompt
    answers: list[Answer]
    ranges: Ranges
    key: Any  # rows with equal ones that follow each other are one episode


def read_episodes(section: Episodes, counts: EpisodeCounts, *, scores: bool = True) -> Iterator[Values]:
    """Rows of EPISODES, one per prompt, in the source's order. Where the section names no attributes, the first row
    with scores does; rows of one answer each that follow each other and share a prompt are one episode. Without
    `scores`, which a judge will give, those of the source are not read, and it may lack them.

    Raises: InputError at a bad row (unless `on_bad_row` is skip), where the source cannot be read, and where no answer
    has a score, or none of an attribute's name.
    """
    seen, wordings, counts.attributes = Seen(), Wordings(), section.attributes or ()
    begun = False
    nameless: list[tuple[Prompt, list[Answer]]] = []  # rows before the first one with scores
    for _, rows in itertools.groupby(_given(section, counts, scores=scores), key=lambda given: given.key):
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
        counts.near += wordings.repeats(first.prompt["messages"])
        nameless.append((first.prompt, answers))
        if counts.attributes:
            bounds = _bounds(counts.attributes, first.ranges, section.ranges or {}) if scores else None
            if begun and bounds != counts.ranges:
                raise InputError(f"{first.place}: its scores have other ranges than those before; set episodes.ranges")
            counts.ranges, begun = bounds, True
            yield from (_episode(*row, counts.attributes) for row in nameless)
            nameless.clear()
        if counts.rows == section.limit:
            break
    if nameless:
        raise InputError(f"episodes.source: {section.source}: no answer has a score")
    strange, unread = set(counts.attributes) - counts.named, sorted(counts.named - set(counts.attributes))
    if strange and counts.rows and scores:
        there = f"they have {', '.join(sorted(counts.named))}"
        raise InputError(f"episodes.attributes: no answer of {section.source} has a score {min(strange)!r}; {there}")
    if unread:
        counts.told[f"episodes: {section.source}: scores that episodes.attributes leaves out: {', '.join(unread)}"] = (
            None
        )


def _bounds(names: Sequence[str], ranges: Ranges, given: Ranges) -> tuple[tuple[float, float], ...] | None:
    """Of each attribute; None where one has none. Raises: InputError in that case, where some are `given`, and for a
    given one of no attribute."""
    if unknown := sorted(set(given) - set(names)):
        raise InputError(f"episodes.ranges: {unknown[0]!r} is not one of the scores {', '.join(names)}")
    if missing := [name for name in names if name not in ranges]:
        if given:
            raise InputError(f"episodes.ranges: {missing[0]!r} has none; give [lowest, highest] of every attribute")
        return None
    return tuple(ranges[name] for name in names)


def _given(section: Episodes, counts: EpisodeCounts, *, scores: bool) -> Iterator[_Given]:
    source = Prompts(source=section.source, split=section.split)
    for row in read_rows(source, where="episodes", notes=counts.told, raw=True):
        if row.blank:
            counts.dropped.add("empty", row.place, "an empty line")
            continue
        try:
            yield _read(row, counts, section.ranges or {}, scores=scores)
        except BadRowError as e:
            counts.refuse(row.place, e, section.on_bad_row, where="episodes")


def _read(row: Row, counts: EpisodeCounts, ranges: Ranges, *, scores: bool) -> _Given:
    """Raises: BadRowError."""
    if row.values is None:
        raise BadRowError(str(row.problem), "unreadable")
    values = dict(row.values) if scores else _with_no_scores(row.values)
    form = next((form for form in forms() if all(values.get(c) is not None for c in form.columns)), None)
    if form is None:
        raise BadRowError(NO_FORM.format(", ".join(map(str, values))), "no answers")
    try:
        answers = form.answers(values)
        values = form.prompt(values)
    except (AttributeError, KeyError, TypeError) as e:
        raise BadRowError(f"`{form.columns[0]}` is not of the form that it shows ({type(e).__name__}: {e})") from e
    prompt = to_prompt(Row(row.place, values), {}, left_out=counts.left_out)
    if not scores:
        answers = [answer._replace(scores={}) for answer in answers]
    ranges = {**form.ranges, **ranges}
    for name, score in ((name, score) for answer in answers for name, score in answer.scores.items()):
        low, high = ranges.get(name, (-math.inf, math.inf))
        if score is not None and not low <= score <= high:
            raise BadRowError(f"`{name}` is {score:g}; its range is {low:g} to {high:g} (episodes.ranges)")
    alone = "response" in form.columns
    return _Given(row.place, prompt, answers, ranges, (prompt["prompt_id"], prompt["messages"]) if alone else object())


def _with_no_scores(values: Mapping[str, Any]) -> Values:
    """A row of our own forms, whose answers may lack their scores, as if they had them."""
    answers = values.get("responses")
    if isinstance(answers, list):
        return {**values, "responses": [{**a, "scores": {}} if isinstance(a, Mapping) else a for a in answers]}
    ours = "response" in values and not any(set(form.columns) <= set(values) for form in forms())
    return {**values, "scores": {}} if ours else dict(values)


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


def write_episodes(section: Episodes, out: Path, *, scores: bool = True) -> EpisodeCounts:
    """Write a source's answers to one Parquet file of EPISODES, by rename once all rows are checked. `scores` as in
    `read_episodes`.

    Raises: InputError as `read_episodes` does, and when no prompt is left.
    """
    counts = EpisodeCounts()
    rows = read_episodes(section, counts, scores=scores)
    first = next(rows, None)  # names the attributes
    if first is None:
        why = f"; {counts.bad} bad rows, the first: {counts.first_bad}" if counts.bad else ""
        raise InputError(f"episodes.source: {section.source}: no prompt with answers in it{why}")
    write_rows(itertools.chain([first], rows), imported(counts.attributes, counts.ranges), out, **WRITE_OPTIONS)
    return counts
