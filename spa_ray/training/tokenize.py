"""A pairs table becomes token rows in an Arrow file that every rank memory-maps.

It reads pairs Parquet (DESIGN, pairs/) and writes an Arrow IPC file of `TOKENS`; pairs that are left out are counted.
Prompts are rendered by `rollout.chat`, as generation rendered them. Responses are the generated ids, never re-tokenised
text; no end token is added or taken away, and nothing is cut: a pair that is too long is dropped and counted. Given
answers, whose ids are null, are cut into tokens here (`own_pairs.answer_ids`).
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from spa_ray.data.schemas import is_imported
from spa_ray.errors import InputError
from spa_ray.rollout.chat import Chat
from spa_ray.training.own_pairs import answer_ids

IDS = pa.list_(pa.int32())
TOKENS = pa.schema(
    [
        ("pair_id", pa.string()),
        ("prompt_ids", IDS),
        ("chosen_ids", IDS),
        ("rejected_ids", IDS),
        ("gap", pa.float64()),  # the one that `train.gap` names
        ("prompt_key", pa.int64()),  # hashes: of the prompt, and of (prompt, response)
        ("chosen_key", pa.int64()),
        ("rejected_key", pa.int64()),
        ("chosen_context", pa.int32()),  # how many of a response's first ids are its thinking (`model.think`)
        ("rejected_context", pa.int32()),
    ]
)
COLUMNS = ["pair_id", "prompt", "chosen_ids", "rejected_ids"]
TEXTS = ["chosen", "rejected"]  # of given answers
Ends = Callable[[], frozenset[int]]
GAP_COLUMNS = {"abs_sum": ["gap"], "l1": ["margin"], "primary": ["chosen_scores", "rejected_scores"]}


def pair_files(pairs: Path) -> list[Path]:
    """The Parquet files of a pairs table. Raises: InputError when there is none."""
    files = [pairs] if pairs.is_file() else sorted(pairs.rglob("*.parquet"))
    if not files:
        raise InputError(f"{pairs}: no pairs here; give a Parquet file or the folder that `spa build` wrote")
    return files


def content_hash(pairs: Path) -> str:
    """A hash of the table's bytes, whatever its files are called."""
    digests = []
    for file in pair_files(pairs):
        with file.open("rb") as f:
            digests.append(hashlib.file_digest(f, "blake2b").hexdigest())
    return hashlib.blake2b("".join(sorted(digests)).encode(), digest_size=16).hexdigest()


def tokenize_pairs(
    pairs: Path, out: Path, chat: Chat, *, vocab_size: int, max_length: int, gap: str, ends: Ends = frozenset
) -> dict[str, int]:
    """Write the token rows of all pairs that can be trained on; return the counts of those that cannot, by reason.
    `ends` gives the model's end-of-sequence ids, for answers without ids.

    Reasons: `too_long` (prompt and a response exceed `max_length` tokens), `identical` (equal ids on both sides).
    Raises: InputError for a missing column, an empty response, an id outside the vocabulary, a gap that is not a
    number of 0 or more, a prompt that the chat template refuses.
    """
    dropped: Counter[str] = Counter({"too_long": 0, "identical": 0})
    partial = out.with_name(out.name + ".partial")
    with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, TOKENS) as writer:
        for file, batch in _batches(pairs, gap):
            rows = _token_rows(file, batch, chat, ends, vocab_size=vocab_size, max_length=max_length, dropped=dropped)
            gaps = _gaps(file, batch, gap)
            for row in rows:
                row["gap"] = gaps[row.pop("row")]
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=TOKENS))
    os.replace(partial, out)
    return dict(dropped)


def _batches(pairs: Path, gap: str) -> Iterator[tuple[Path, pa.RecordBatch]]:
    columns = COLUMNS + GAP_COLUMNS[gap]
    for file in pair_files(pairs):
        try:
            source = pq.ParquetFile(file)
        except (OSError, pa.ArrowInvalid) as e:
            raise InputError(f"{file}: cannot be read as Parquet ({e})") from e
        with source:
            missing = [c for c in columns if c not in source.schema_arrow.names]
            if missing:
                raise InputError(f"{file}: column {missing[0]!r} is missing; `spa build` writes it (DESIGN, pairs/)")
            texts = TEXTS if is_imported(source.schema_arrow) else []
            for batch in source.iter_batches(batch_size=4096, columns=columns + texts):
                yield file, batch


def _token_rows(
    file: Path,
    batch: pa.RecordBatch,
    chat: Chat,
    ends: Ends,
    *,
    vocab_size: int,
    max_length: int,
    dropped: Counter[str],
) -> list[dict[str, Any]]:
    rows = []
    last: tuple[Any, list[int], int] = (None, [], 0)  # a prompt's pairs are adjacent: it is rendered once
    for i, pair in enumerate(batch.select([n for n in (*COLUMNS, *TEXTS) if n in batch.schema.names]).to_pylist()):
        where = f"{file}: pair {pair['pair_id']!r}"
        if pair["prompt"] != last[0]:
            ids = _rendered(where, partial(chat.prompt_ids, pair["prompt"]))
            last = (pair["prompt"], ids, _key(ids, []))
        prompt = last[1]
        given = {side: _ids(chat, pair, side, ends, where) for side in _SIDES}
        sides = {side: _checked_ids(ids, vocab_size, f"{where}: {side}_ids") for side, ids in given.items()}
        if sides["chosen"] == sides["rejected"]:
            dropped["identical"] += 1
        elif len(prompt) + max(map(len, sides.values())) > max_length:
            dropped["too_long"] += 1
        else:
            keys = {"prompt_key": last[2]} | {f"{side}_key": _key(prompt, ids) for side, ids in sides.items()}
            keys |= {f"{side}_context": _context(chat, ids, f"{where}: {side}_ids") for side, ids in sides.items()}
            responses = {f"{side}_ids": ids for side, ids in sides.items()}
            rows.append({"pair_id": pair["pair_id"], "prompt_ids": prompt, **responses, **keys, "row": i})
    return rows


_SIDES = ("chosen", "rejected")


def _rendered(where: str, render: Callable[[], list[int]]) -> list[int]:
    try:
        return render()
    except ValueError as e:
        raise InputError(f"{where}: {e}") from e


def _ids(chat: Chat, pair: dict[str, Any], side: str, ends: Ends, where: str) -> list[int] | None:
    ids: list[int] | None = pair[f"{side}_ids"]
    if ids is not None or side not in pair:
        return ids
    return _rendered(where, lambda: answer_ids(chat, pair["prompt"], pair[side][0]["content"], ends()))


def _checked_ids(ids: list[int] | None, vocab_size: int, where: str) -> list[int]:
    if not ids:
        raise InputError(f"{where} is empty; a response needs one token or more")
    if min(ids) < 0 or max(ids) >= vocab_size:
        stray = next(i for i in ids if not 0 <= i < vocab_size)
        raise InputError(f"{where} holds id {stray}, the model's vocabulary ends at {vocab_size - 1}: another model's?")
    return ids


def _context(chat: Chat, ids: list[int], where: str) -> int:
    """How many ids of a response are thinking that was kept (`model.think` mask). Raises: InputError when all are."""
    if chat.settings.think != "mask":
        return 0
    thinking = chat.thinking(ids)
    if thinking.length == len(ids):
        raise InputError(f"{where} holds thinking and no answer; such an answer is in no pair that `spa build` makes")
    return thinking.length


def _key(prompt: list[int], response: list[int]) -> int:
    raw = np.array([len(prompt), *prompt, *response], dtype=np.int32).tobytes()
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little", signed=True)


def _gaps(file: Path, batch: pa.RecordBatch, gap: str) -> np.ndarray:
    if gap == "primary":
        first = [
            np.array([scores[0] if scores else None for scores in batch.column(c).to_pylist()], dtype=np.float64)
            for c in GAP_COLUMNS[gap]
        ]
        gaps = np.abs(first[0] - first[1])
    else:
        gaps = batch.column(GAP_COLUMNS[gap][0]).to_numpy(zero_copy_only=False).astype(np.float64)
    bad = np.flatnonzero(~(np.isfinite(gaps) & (gaps >= 0)))
    if bad.size:
        pair = batch.column("pair_id")[int(bad[0])].as_py()
        raise InputError(
            f"{file}: pair {pair!r}: its {gap} gap is {gaps[bad[0]]}, a finite number of 0 or more is needed"
        )
    return gaps
