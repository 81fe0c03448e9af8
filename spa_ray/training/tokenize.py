"""A pairs table becomes token rows in an Arrow file that every rank memory-maps.

It reads pairs Parquet (DESIGN, pairs/) and writes an Arrow IPC file of `tokens_schema`, a row for each of the method's
examples; pairs that are left out are counted. Prompts are rendered by `rollout.chat`, as generation rendered them.
Responses are the generated ids, never re-tokenised text; no end token is added or taken away, and nothing is cut: a
pair that is too long is dropped and counted. Given answers, whose ids are null, are cut into tokens here
(`own_pairs.answer_ids`).
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from spa_ray.config.training import Train
from spa_ray.data.schemas import RELIABILITY, is_imported, objectives_of
from spa_ray.errors import InputError
from spa_ray.rollout.chat import Chat
from spa_ray.training.method import ANSWERS, Example, Messages, Method, Read, Row
from spa_ray.training.own_pairs import answer_ids

IDS = pa.list_(pa.int32())
OF_SIDE = {"ids": IDS, "key": pa.int64(), "context": pa.int32()}
COLUMNS = ["pair_id", "prompt", "chosen_ids", "rejected_ids"]
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


def tokens_schema(sides: Sequence[str]) -> pa.Schema:
    """Token rows: a row is an example, and has ids, a hash and a context of each of its sequences.

    `prompt_key` is the hash of the prompt as it stands in pairs/, `head_key` of `prompt_ids`, a side's of its prompt
    and response. A side's `ids` stand behind `prompt_ids`, and the first `context` of them count as its prompt too
    (thinking that was kept, `model.think`); where `context` is negative, so many of them are the whole prompt, and
    `prompt_ids` is not read.
    """
    of_sides = [(f"{side}_{name}", kind) for name, kind in OF_SIDE.items() for side in sides]
    keys = [("prompt_key", pa.int64()), ("head_key", pa.int64())]
    fixed = [("pair_id", pa.string()), ("gap", pa.float64()), ("targets", pa.list_(pa.float64())), *keys]
    return pa.schema([*fixed, ("prompt_ids", IDS), *of_sides])


def tokenize_pairs(
    pairs: Path,
    out: Path,
    chat: Chat,
    *,
    vocab_size: int,
    max_length: int,
    gap: str,
    reliable: bool = False,
    method: Method[Train] | None = None,
    ends: Ends = frozenset,
) -> dict[str, int]:
    """Write the token rows of all pairs that can be trained on; return the counts of those that cannot, by reason.
    `ends` gives the model's end-of-sequence ids, for answers without ids; with `reliable` a gap is times the pair's
    `reliability`.

    Reasons: `too_long` (a sequence exceeds `max_length` tokens), `identical` (equal answers), `no_example` (the method
    has none of such a pair).
    Raises: InputError for a missing column, an empty response, an id outside the vocabulary, a gap that is not a
    number of 0 or more, a prompt that the chat template refuses, an example that is not what `method` declares.
    """
    method = method or Method(Train())
    dropped: Counter[str] = Counter({"too_long": 0, "identical": 0})
    schema = tokens_schema(tokens_sides(method))
    maker = _Maker(chat, method, ends, vocab_size, max_length, dropped)
    partial = out.with_name(out.name + ".partial")
    with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        weighed_by = [*GAP_COLUMNS[gap], *([RELIABILITY] if reliable else [])]
        for file, batch in _batches(pairs, [*COLUMNS, *weighed_by, *method.columns]):
            rows = maker.rows(file, batch)
            gaps = _gaps(file, batch, gap, reliable=reliable)
            for row in rows:
                row["gap"] = gaps[row.pop("row")]
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))
    os.replace(partial, out)
    return dict(dropped)


def objectives_in(pairs: Path) -> list[str]:
    """The objectives that a pairs table names; none where its metadata do not say."""
    schema = pq.read_schema(pair_files(pairs)[0])
    return objectives_of(schema) if b"objectives" in (schema.metadata or {}) else []


def read_columns(pairs: Path, columns: Sequence[str]) -> pa.Table:
    """These columns of all pairs, with the table's metadata. Raises: InputError for one that is missing."""
    batches = [batch for _, batch in _batches(pairs, columns, texts=False)]
    return pa.Table.from_batches(batches, schema=batches[0].schema if batches else pa.schema([]))


def _batches(pairs: Path, columns: Sequence[str], *, texts: bool = True) -> Iterator[tuple[Path, pa.RecordBatch]]:
    """Record batches of these columns; with `texts` given answers' texts as well."""
    for file in pair_files(pairs):
        try:
            source = pq.ParquetFile(file)
        except (OSError, pa.ArrowInvalid) as e:
            raise InputError(f"{file}: cannot be read as Parquet ({e})") from e
        with source:
            missing = [c for c in columns if c not in source.schema_arrow.names]
            if missing:
                where = ", from scoring.draws of 2 or more" if missing[0] == RELIABILITY else " (DESIGN, pairs/)"
                raise InputError(f"{file}: column {missing[0]!r} is missing; `spa build` writes it{where}")
            also = ANSWERS if texts and is_imported(source.schema_arrow) else ()
            for batch in source.iter_batches(batch_size=4096, columns=list(dict.fromkeys([*columns, *also]))):
                yield file, batch


class _Rendered:
    """A renderer that remembers its last conversation: a prompt's pairs are adjacent."""

    def __init__(self, render: Callable[[Messages], list[int]]) -> None:
        self._render = render
        self._last: tuple[Messages | None, list[int]] = (None, [])
        self.where = ""

    def __call__(self, messages: Messages) -> list[int]:
        if messages != self._last[0]:
            try:
                self._last = (messages, self._render(messages))
            except ValueError as e:
                raise InputError(f"{self.where}: {e}") from e
        return self._last[1]


class _Maker:
    """Makes token rows of pairs, by a method's examples."""

    def __init__(
        self,
        chat: Chat,
        method: Method[Train],
        ends: Ends,
        vocab_size: int,
        max_length: int,
        dropped: Counter[str],
    ) -> None:
        self.chat, self.method, self.ends, self.dropped = chat, method, ends, dropped
        self.vocab_size, self.max_length = vocab_size, max_length
        self.sides = tokens_sides(method)
        self.plain, self.prompt, self.messages = (_Rendered(f) for f in (chat.prompt_ids,) * 2 + (chat.message_ids,))

    def rows(self, file: Path, batch: pa.RecordBatch) -> list[dict[str, Any]]:
        rows = []
        names = dict.fromkeys([*COLUMNS, *ANSWERS, *self.method.columns])
        for i, pair in enumerate(batch.select([name for name in names if name in batch.schema.names]).to_pylist()):
            where = f"{file}: pair {pair['pair_id']!r}"
            self.plain.where = self.prompt.where = self.messages.where = where
            prompt_key = _key(self.plain(pair["prompt"]), [])
            chosen, rejected = (
                _checked_ids(self._answer(pair, side, where), self.vocab_size, f"{where}: {side}_ids")
                for side in ANSWERS
            )
            if chosen == rejected:
                self.dropped["identical"] += 1
                continue
            columns = {name: _given(pair[name], f"{where}: {name}") for name in self.method.columns}
            row = Row(pair["prompt"], chosen, rejected, columns, self.prompt, self.messages)
            examples = self.method.examples(row)
            if not examples:
                self.dropped["no_example"] += 1
            for number, example in enumerate(examples):
                if any(len(read.prompt) + len(read.response) > self.max_length for read in example.sequences.values()):
                    self.dropped["too_long"] += 1
                    continue
                name = f"{pair['pair_id']}#{number}" if number else pair["pair_id"]
                made = self._row(example, where)
                rows.append({"pair_id": name, "prompt_key": prompt_key, **made, "row": i})
        return rows

    def _answer(self, pair: dict[str, Any], side: str, where: str) -> list[int] | None:
        ids: list[int] | None = pair[f"{side}_ids"]
        if ids is not None or side not in pair:
            return ids
        try:
            return answer_ids(self.chat, pair["prompt"], pair[side][0]["content"], self.ends())
        except ValueError as e:
            raise InputError(f"{where}: {e}") from e

    def _row(self, example: Example, where: str) -> dict[str, Any]:
        missing = [side for side in self.method.sides if side not in example.sequences]
        if missing:
            raise InputError(f"{where}: the method's examples have no sequence {missing[0]!r}, which its sides name")
        targets = [float(value) for value in example.targets]
        if not all(map(math.isfinite, targets)):
            raise InputError(f"{where}: the method's targets are {targets}; finite numbers are needed")
        prompt = next(iter(example.sequences.values())).prompt
        row: dict[str, Any] = {"prompt_ids": prompt, "head_key": _key(prompt, []), "targets": targets}
        for side in self.sides:
            read = example.sequences.get(side)
            found = ([], 0, 0) if read is None else self._side(read, prompt, f"{where}: {side}_ids")
            row |= {f"{side}_{name}": value for name, value in zip(OF_SIDE, found, strict=True)}
        return row

    def _side(self, read: Read, shared: Sequence[int], where: str) -> tuple[list[int], int, int]:
        """Ids, key and context of a sequence whose example's first prompt is `shared`."""
        prompt, response = list(read.prompt), list(read.response)
        if not prompt:
            raise InputError(f"{where}: the sequence has no prompt; nothing predicts its first token")
        whole = _checked_ids(prompt + response, self.vocab_size, where)
        context = _context(self.chat, response, where) if response else 0
        if read.span == "all":
            if context:
                raise InputError(f"{where}: span all would train on thinking; set model.think=strip")
            return whole, _key(whole[:1], whole[1:]), -1
        key = _key(prompt, response)
        return (response, key, context) if prompt == shared else (whole, key, -len(prompt) - context)


def tokens_sides(method: Method[Train]) -> list[str]:
    """The sequences in a method's token rows: both answers, which `train.shuffle_labels` swaps, then its own.

    Raises: InputError for a name that is taken.
    """
    taken = sorted({"prompt", "head"} & set(method.sides))
    if taken:
        raise InputError(f"train.method: a sequence called {taken[0]!r} in {type(method).__name__}.sides; rename it")
    return list(dict.fromkeys([*ANSWERS, *method.sides]))


def _given(value: Any, where: str) -> Any:
    if value is None or value == []:
        raise InputError(f"{where} is empty, and train.method reads it")
    return value


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


def _key(prompt: Sequence[int], response: Sequence[int]) -> int:
    raw = np.array([len(prompt), *prompt, *response], dtype=np.int32).tobytes()
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little", signed=True)


def _gaps(file: Path, batch: pa.RecordBatch, gap: str, *, reliable: bool) -> np.ndarray:
    if gap == "primary":
        first = [
            np.array([scores[0] if scores else None for scores in batch.column(c).to_pylist()], dtype=np.float64)
            for c in GAP_COLUMNS[gap]
        ]
        gaps = np.abs(first[0] - first[1])
    else:
        gaps = batch.column(GAP_COLUMNS[gap][0]).to_numpy(zero_copy_only=False).astype(np.float64)
    if reliable:
        gaps = gaps * batch.column(RELIABILITY).to_numpy(zero_copy_only=False).astype(np.float64)
    bad = np.flatnonzero(~(np.isfinite(gaps) & (gaps >= 0)))
    if bad.size:
        pair = batch.column("pair_id")[int(bad[0])].as_py()
        raise InputError(
            f"{file}: pair {pair!r}: its {gap} gap is {gaps[bad[0]]}, a finite number of 0 or more is needed"
        )
    return gaps
