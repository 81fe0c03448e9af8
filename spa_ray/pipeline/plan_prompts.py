"""How many prompts a run has and what they look like, from a bounded look at their source.

Comes in: a `prompts` section. Goes out: `PromptFacts`: a count, and a few prompts from all over what was read. Never: a
whole large data set; what was not counted is assumed and said so.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from spa_ray.config.evaluation import Evaluation
from spa_ray.config.prompts import Episodes, Prompts
from spa_ray.data.containers import kind_of
from spa_ray.data.folders import files_of
from spa_ray.data.forms import Message
from spa_ray.data.given import EpisodeCounts, read_episodes
from spa_ray.data.hub import UnreachableError
from spa_ray.data.left_out import LeftOut
from spa_ray.data.prompts import Check, read_prompts
from spa_ray.data.readers import source_kind
from spa_ray.errors import InputError

COUNTED = 10_000  # prompts that are read at most
SAMPLED = 40
SAMPLED_CHARS = 200_000
UNKNOWN_COUNT = 1000
STAND_IN = "What should someone think of before they decide about this, and what would you advise them to do first?"


@dataclass(frozen=True)
class PromptFacts:
    """`count` prompts, `sample` of them; `estimated` where the source was not counted to its end. `dropped` has the
    rows that were left out of what was read."""

    source: str
    count: int
    sample: list[list[Message]]
    estimated: bool
    answers: float = 0.0  # per prompt, where they are given
    dropped: LeftOut = field(default_factory=LeftOut)


def prompt_facts(
    prompts: Prompts,
    notes: list[str],
    where: str,
    check: Check | None = None,
    given: Episodes | None = None,
    scores: bool = True,
    against: Sequence[Prompts] = (),
) -> PromptFacts:
    """Reads at most COUNTED prompts, those of `given` answers where there are any, with or without their `scores`.

    Raises: InputError for a source that is missing, or wrong within what is read.
    """
    counts = EpisodeCounts()
    look = max(COUNTED, 2 * (prompts.limit or 0))  # a sample of as many rows is taken for one of all
    rows = (
        read_episodes(given, counts, scores=scores)
        if given
        else read_prompts(prompts, where=where, counts=counts, check=check, against=against, look=look)
    )
    try:
        read = [row["messages"] for row in islice(rows, COUNTED)]
    except UnreachableError as e:
        return _assumed(prompts, notes, str(e))
    notes += counts.notes(where)
    if not read:
        raise InputError(f"{where}.source: {prompts.source}: no prompt in it")
    whole = len(read) < COUNTED or prompts.limit == COUNTED
    count = len(read) if whole else _beyond(prompts, notes, where)
    step = max(1, len(read) // SAMPLED)
    sample = _bounded(read[::step][:SAMPLED])
    return PromptFacts(str(prompts.source), count, sample, not whole, counts.answers / len(read), counts.dropped)


def _assumed(prompts: Prompts, notes: list[str], why: str) -> PromptFacts:
    count = prompts.limit or UNKNOWN_COUNT
    notes.append(f"{why}; {count:,} prompts of one sentence assumed")
    return PromptFacts(str(prompts.source), count, [[{"role": "user", "content": STAND_IN}]], True)


def _bounded(sample: list[list[Message]]) -> list[list[Message]]:
    """Of a sample whose texts are long, as many prompts, evenly spaced, as hold about SAMPLED_CHARS."""
    chars = sum(len(message["content"]) for messages in sample for message in messages)
    return sample[:: -(-chars // SAMPLED_CHARS) or 1]


def _beyond(prompts: Prompts, notes: list[str], where: str) -> int:
    """The count of a source that holds more than was read: Parquet files say theirs, else the limit is believed."""
    import pyarrow.parquet as pq

    path, kind = Path(os.path.expanduser(str(prompts.source))), source_kind(prompts, where=where)
    files = [path] if kind == "file" else files_of(path, prompts.split, where, {}) if kind == "folder" else []
    if files and all(kind_of(file) == "parquet" and file.suffix == ".parquet" for file in files):
        rows = sum(pq.ParquetFile(file).metadata.num_rows for file in files)
        notes.append(f"{where}: {rows:,} rows by the files' own count; repetitions are not taken off")
        return min(rows, prompts.limit or rows)
    count = prompts.limit or COUNTED
    told = "prompts.limit is taken at its word" if prompts.limit else f"{count:,} are planned for; set {where}.limit"
    notes.append(f"{where}: more than {COUNTED:,} prompts, which were not counted; {told}")
    return count


def held_out_facts(evaluation: Evaluation, notes: list[str], check: Check | None = None) -> dict[str, PromptFacts]:
    """The main held-out set and the further families, by their keys."""
    return {where: prompt_facts(prompts, notes, where, check) for where, prompts in _held_out(evaluation)}


def _held_out(evaluation: Evaluation) -> Iterator[tuple[str, Prompts]]:
    if evaluation.prompts is not None:
        yield "evaluation.prompts", evaluation.prompts
    for family, prompts in evaluation.families.items():
        yield f"evaluation.families.{family}", prompts
