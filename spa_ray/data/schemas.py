"""The Arrow schemas of every table that crosses a stage, and their metadata.

Goes out: `PROMPTS`, `EPISODES`, `PAIRS` and `with_metadata`. Never: readers, models, Ray.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import pyarrow as pa

MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
MESSAGES = pa.list_(MESSAGE)
SCORES = pa.list_(pa.float64())

# Episodes are written with a checksum of every page: a disk may change bits unseen.
WRITE_OPTIONS = {"write_page_checksum": True}

PROMPTS = pa.schema([("prompt_id", pa.string()), ("messages", MESSAGES), ("meta", pa.string())])

RESPONSE = pa.struct(
    [
        ("index", pa.int32()),  # 0..n-1 the candidates, n the refined answer
        ("kind", pa.string()),  # "candidate" | "refined"
        ("text", pa.string()),
        ("token_ids", pa.list_(pa.int32())),  # as generated, the end token included when it was generated
        ("system", pa.string()),  # null: none
        ("temperature", pa.float64()),
        ("seed", pa.int64()),
        ("finish_reason", pa.string()),  # "stop" | "length"
        ("scores", SCORES),  # objective order; null where a judgement failed
        ("score_draws", pa.list_(SCORES)),  # [objective][draw]
        ("score_status", pa.list_(pa.string())),  # per objective: "ok" or the failure
        ("judge_texts", pa.list_(pa.string())),  # per objective: the last judgement's raw text
        ("off_scale", SCORES),  # per objective: probability mass off the scale (mode expected), else null
        ("think_text", pa.string()),  # what came up to </think>, null where nothing did; older files lack it
    ]
)

EPISODES = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("messages", MESSAGES),
        ("meta", pa.string()),
        ("responses", pa.list_(RESPONSE)),
        ("scores", pa.list_(SCORES)),  # responses.scores once more, so that thresholds read a narrow column
        ("error", pa.string()),  # null when fine
        ("attempt", pa.int32()),
        ("prompt_tokens", pa.int64()),
        ("generated_tokens", pa.int64()),
    ]
)

# Further columns of EPISODES where a model's prompts say which scores an answer is to have. They are columns and not in
# `meta`, which judges read: no judge may see what was asked for. `attributes` in the metadata names them, in order. The
# values count from 0 to 1 within each one's range, and are in its own units where the range is not known.
STEERED = pa.schema(
    [
        ("sensed", SCORES),  # by the model's own head; null: nothing was
        ("asked", SCORES),  # said in the prompt; null: nothing was
        ("floored", pa.list_(pa.string())),  # the attributes that `steer.floors` raised
    ]
)


def episodes_schema(*, steered: bool) -> pa.Schema:
    """EPISODES, perhaps with its further columns."""
    return pa.schema([*EPISODES, *STEERED]) if steered else EPISODES


PAIRS = pa.schema(
    [
        ("pair_id", pa.string()),  # prompt_id:chosen_index:rejected_index
        ("prompt_id", pa.string()),
        ("prompt", MESSAGES),
        ("chosen", MESSAGES),
        ("rejected", MESSAGES),
        ("chosen_index", pa.int32()),
        ("rejected_index", pa.int32()),
        ("chosen_ids", pa.list_(pa.int32())),
        ("rejected_ids", pa.list_(pa.int32())),
        ("chosen_scores", SCORES),
        ("rejected_scores", SCORES),
        ("margin", pa.float64()),  # Eq. 2: sum of absolute differences
        ("gap", pa.float64()),  # Eq. 3: absolute difference of the sums
        ("decided_by", pa.string()),  # the first objective that differs
        ("kind", pa.string()),  # "refined" where the chosen is the refined answer, else "candidate"
    ]
)

# A further column of PAIRS where scores are means of several draws: d² / (d² + se²) of the deciding objective's scores,
# their difference and its standard error; null where one of them was drawn once.
RELIABILITY = "reliability"


def pairs_schema(*, reliability: bool) -> pa.Schema:
    """PAIRS, perhaps with its further column."""
    return PAIRS.append(pa.field(RELIABILITY, pa.float64())) if reliability else PAIRS


# A pairwise judge's verdicts on the answers of two arms (FastChat's rule makes one outcome of both orders).
JUDGEMENTS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("a", pa.string()),  # an arm
        ("b", pa.string()),  # what it is compared with
        ("objective", pa.string()),
        ("order", pa.string()),  # "ab": a was shown first; "ba"
        ("verdict", pa.string()),  # "a" | "b" | "tie" | "failed"
        ("judge_text", pa.string()),
        ("attempt", pa.int32()),
        ("status", pa.string()),  # "ok", or why it failed
    ]
)


IMPORTED = {"origin": "imported"}
Ranges = Sequence[tuple[float, float]]  # the lowest and the highest score of each objective


def imported(objectives: Sequence[str], ranges: Ranges | None) -> pa.Schema:
    """EPISODES whose answers a data set held already: nothing generated them."""
    about = {"objectives": json.dumps(list(objectives)), **IMPORTED}
    return with_ranges(EPISODES.with_metadata(about), ranges)


def is_imported(schema: pa.Schema) -> bool:
    """Whether a table's answers, or those that its pairs were built from, were given."""
    return bool((schema.metadata or {}).get(b"origin") == b"imported")


def with_attributes(schema: pa.Schema, attributes: Sequence[str]) -> pa.Schema:
    """The schema with the names of what `sensed` and `asked` are of."""
    return schema.with_metadata({**(schema.metadata or {}), "attributes": json.dumps(list(attributes))})


def attributes_of(schema: pa.Schema) -> list[str] | None:
    """What `sensed` and `asked` are of; None where a table has neither."""
    found = (schema.metadata or {}).get(b"attributes")
    return None if found is None else list(json.loads(found))


def with_metadata(
    schema: pa.Schema,
    *,
    objectives: Sequence[str],
    model: str,
    config_hash: str,
    ranges: Ranges | None = None,
    given: bool = False,
) -> pa.Schema:
    """The schema with the run's facts in its metadata (DESIGN: objectives, model, config hash). `given`: the scores are
    the run's, and a data set held the answers."""
    about = {"objectives": json.dumps(list(objectives)), "model": model, "config_hash": config_hash}
    return with_ranges(schema.with_metadata(about | (IMPORTED if given else {})), ranges)


def with_ranges(schema: pa.Schema, ranges: Ranges | None) -> pa.Schema:
    """The schema with these ranges in its metadata in the place of others, if any; None leaves it as it is."""
    if ranges is None:
        return schema
    return schema.with_metadata({**(schema.metadata or {}), b"ranges": json.dumps([list(bounds) for bounds in ranges])})


def objectives_of(schema: pa.Schema) -> list[str]:
    """The objectives, highest priority first, that a table's metadata names. Raises: KeyError when it names none."""
    metadata = schema.metadata or {}
    return json.loads(metadata[b"objectives"])


def ranges_of(schema: pa.Schema) -> list[tuple[float, float]] | None:
    """The lowest and the highest score of each objective; None where a table's metadata do not say."""
    found = (schema.metadata or {}).get(b"ranges")
    return None if found is None else [(float(low), float(high)) for low, high in json.loads(found)]


def canonical(table: pa.Table) -> pa.Table:
    """The table sorted by prompt_id (and pair_id where there is one), in one chunk: equal runs give equal bytes."""
    keys = [(k, "ascending") for k in ("prompt_id", "pair_id") if k in table.column_names]
    return table.sort_by(keys).combine_chunks()
