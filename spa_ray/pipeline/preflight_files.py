"""What can be known to be wrong from files alone: prompts beyond the context, a full disk.

Comes in: a file of prompts, a planned size. Goes out: nothing, a warning of one line, or `InputError`.
Never: Ray, engines, weights.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from spa_ray.errors import InputError
from spa_ray.rollout.chat import Chat

RENDERED = 5000  # prompts that are rendered at most; of more that might be too long a sample is
TEXT = 20e6  # bytes of text that are cut into tokens at most
AT_LEAST = 50
AT_ONCE = 256
GIB = 1024**3


@dataclass(frozen=True)
class TooLong:
    """Of `total` prompts, how many leave no room for an answer; `sampled` of `doubtful` were rendered where not all."""

    total: int
    too_long: int
    longest: int
    doubtful: int
    rendered: int

    @property
    def exact(self) -> bool:
        return self.rendered == self.doubtful


def find_too_long(
    prompts: Path, chat: Chat, systems: Sequence[str | None], *, room: int, rendered: int = RENDERED, seed: int = 0
) -> TooLong:
    """Count the prompts whose rendered form exceeds `room` tokens under the longest of the system prompts.

    A token stands for a byte of text or more, so prompts of fewer bytes than the room are known to fit unrendered.
    (A tokenizer that writes one character out as many before it counts, as some do with ligatures, can exceed that.)
    """
    lengths, turns = _sizes(prompts)
    limit = lengths + _marks(chat, systems, turns)
    doubtful = np.flatnonzero(limit > room)
    chosen = doubtful
    if len(doubtful):
        rendered = min(rendered, max(AT_LEAST, int(TEXT // lengths[doubtful].mean())))
    if len(doubtful) > rendered:
        chosen = np.sort(np.random.default_rng(seed).choice(doubtful, rendered, replace=False))
    longest = max(systems, key=lambda system: len(system or ""))
    sizes = [
        size
        for part in np.array_split(chosen, -(-len(chosen) // AT_ONCE) or 1)
        for size in chat.lengths([(messages, longest) for messages in _messages(prompts, part)])
    ]
    over = sum(size > room for size in sizes)
    share = len(doubtful) / len(chosen) if len(chosen) else 0.0
    return TooLong(len(lengths), round(over * share), max(sizes, default=0), len(doubtful), len(chosen))


def context_warning(found: TooLong, *, context: int, answer: int, where: str) -> str | None:
    """A line when prompts do not fit. Raises: InputError when none does."""
    if not found.too_long:
        return None
    about = "" if found.exact else "about "
    how = f"; {found.rendered:,} of {found.doubtful:,} long ones were rendered" if not found.exact else ""
    text = (
        f"{where}: {about}{found.too_long:,} of {found.total:,} prompts leave no room in the context of {context} "
        f"tokens (the longest has {found.longest:,}, an answer takes up to {answer}{how})"
    )
    if found.too_long >= found.total:
        raise InputError(f"{text}; raise model.max_model_len or lower max_tokens")
    return f"{text}; they become rows with an error"


def _sizes(prompts: Path) -> tuple[np.ndarray, np.ndarray]:
    """(N,) bytes of text and (N,) turns of every prompt."""
    lengths, turns = [], []
    with pq.ParquetFile(prompts) as file:
        for batch in file.iter_batches(columns=["messages"]):
            column = batch["messages"]
            sizes = pc.binary_length(pc.cast(pc.struct_field(pc.list_flatten(column), "content"), pa.binary()))
            owners = pc.list_parent_indices(column).to_numpy()
            lengths.append(np.bincount(owners, weights=sizes.to_numpy(), minlength=len(column)).astype(np.int64))
            turns.append(pc.list_value_length(column).to_numpy())
    return np.concatenate(lengths), np.concatenate(turns)


def _marks(chat: Chat, systems: Sequence[str | None], turns: np.ndarray) -> np.ndarray:
    """(N,) tokens that the template and the longest system prompt add, at most."""
    user, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": "?"}
    one = max(len(chat.prompt_ids([user], system)) for system in systems)
    try:
        three = len(chat.prompt_ids([user, answer, user])) - len(chat.prompt_ids([user]))
    except ValueError:  # the template takes one turn alone
        three = one
    return one + max(0, three) * (turns - 1)


def _messages(prompts: Path, rows: np.ndarray) -> list[list[dict[str, str]]]:
    """The messages of some rows, by number."""
    found: list[list[dict[str, str]]] = []
    first = 0
    with pq.ParquetFile(prompts) as file:
        for batch in file.iter_batches(columns=["messages"]):
            inside = rows[(rows >= first) & (rows < first + len(batch))] - first
            found += batch["messages"].take(pa.array(inside)).to_pylist()
            first += len(batch)
    return found


def disk_warning(folder: Path, *, models_gib: float, rest_gib: float) -> str | None:
    """A line when the disk may fill up. Raises: InputError when the trained models alone do not fit.

    What the run folder holds already is taken off, so that a resume is not refused for what it wrote itself.
    """
    there = folder
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free / GIB
    weights = sum(f.stat().st_size for f in folder.glob("stages/train-*/model/*.safetensors")) / GIB
    models = max(0.0, models_gib - weights)
    if models > free:
        raise InputError(
            f"{folder}: {free:.1f} GiB free, the trained models alone need {models:.1f}; free some, or put run_dir on "
            "another disk"
        )
    if models + rest_gib > free:
        return f"{folder}: {free:.1f} GiB free, the run may write {models + rest_gib:.1f} GiB"
    return None
