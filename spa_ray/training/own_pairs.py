"""Pairs that a user already has, as the pairs table that training reads: rendered and cut into tokens once.

An answer's ids are what the chat template writes for it, up to and with the first end-of-sequence id.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from spa_ray.data.forms import messages_digest
from spa_ray.data.own_pairs import SIDES, OwnPair
from spa_ray.data.schemas import PAIRS
from spa_ray.errors import InputError
from spa_ray.rollout.chat import Chat

AT_ONCE = 1024  # rows in memory
NO_SCORES = 1.0  # the gap of every pair where there are none: all weigh alike


def write_own_pairs(pairs: Iterable[OwnPair], out: Path, chat: Chat, ends: frozenset[int]) -> int:
    """Write the pairs table and return its rows; `ends` are the model's end-of-sequence ids.

    Raises: InputError for a prompt or answer that the chat template refuses, and without any pair.
    """
    count = 0
    with pq.ParquetWriter(out, PAIRS) as writer:
        for rows in _batches(_rows(pairs, chat, ends)):
            writer.write_table(pa.Table.from_pylist(rows, schema=PAIRS))
            count += len(rows)
    if not count:
        raise InputError("pairs: there is none in it; give rows with prompt, chosen and rejected")
    return count


def _batches(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


def _rows(pairs: Iterable[OwnPair], chat: Chat, ends: frozenset[int]) -> Iterator[dict[str, Any]]:
    for number, pair in enumerate(pairs):
        name = messages_digest(pair.prompt).hex()
        scores = [[score] for score in pair.scores] if pair.scores else [[], []]
        gap = abs(pair.scores[0] - pair.scores[1]) if pair.scores else NO_SCORES
        try:
            ids = [answer_ids(chat, pair.prompt, text, ends) for text in (pair.chosen, pair.rejected)]
        except ValueError as e:
            raise InputError(f"{pair.place}: {e}") from e
        yield {
            "pair_id": f"{name}:{number:09d}:0",
            "prompt_id": name,
            "prompt": pair.prompt,
            **{side: [{"role": "assistant", "content": getattr(pair, side)}] for side in SIDES},
            "chosen_index": number,
            "rejected_index": 0,
            **{f"{side}_ids": found for side, found in zip(SIDES, ids, strict=True)},
            **{f"{side}_scores": found for side, found in zip(SIDES, scores, strict=True)},
            "margin": gap,
            "gap": gap,
            "decided_by": "",
            "kind": "candidate",
        }


def answer_ids(chat: Chat, prompt: list[dict[str, str]], text: str, ends: frozenset[int]) -> list[int]:
    """The answer's ids behind its prompt, one end-of-sequence id at their end. Raises: ValueError."""
    before, complete = chat.prompt_ids(prompt), chat.answered_ids(prompt, text)
    if complete[: len(before)] != before:
        raise ValueError("the chat template writes a conversation with its answer otherwise than its prompt")
    ids = complete[len(before) :]
    at = next((place for place, found in enumerate(ids) if found in ends), None)
    ids = [*ids, min(ends)] if at is None else ids[: at + 1]
    if len(ids) < 2:
        raise ValueError("an answer has no token")
    return ids


def end_ids(model: Path) -> frozenset[int]:
    """The end-of-sequence ids of a model folder: its generation config's, else its config's.

    Raises: InputError where it names none.
    """
    for name in ("generation_config.json", "config.json"):
        file = model / name
        found = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
        if found is not None:
            return frozenset(found if isinstance(found, list) else [found])
    raise InputError(f"{model}: neither generation_config.json nor config.json names an eos_token_id; add it there")
