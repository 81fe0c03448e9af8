"""Token rows on disk, read by memory map, and the choice of which of them a job trains on.

Comes in: the Arrow file that `tokenize` wrote. Goes out: `TokenizedPairs` (rows on demand) and `Selection` (indices).
Never: tensors, models. Nothing but lengths, gaps and keys is ever loaded whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Int

from spa_ray.config.training import Train
from spa_ray.errors import InputError
from spa_ray.training.batches import LABELS, SUBSET, stream
from spa_ray.training.deal import Sequences
from spa_ray.training.method import Method

SIDES = ("chosen", "rejected")
Sequence = tuple[np.ndarray, np.ndarray]  # prompt ids, response ids


class TokenizedPairs:
    """Rows of the token file, in the order of `pair_id`, whatever the order in the file."""

    def __init__(self, path: Path) -> None:
        self._table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        batches = self._table.to_batches()
        self._rank = pc.sort_indices(self._table, sort_keys=[("pair_id", "ascending")]).to_numpy()
        self._context = {
            f"{side}_ids": self._table.column(f"{side}_context").to_numpy() for side in ("chosen", "rejected")
        }
        self._first = np.cumsum([0] + [len(b) for b in batches])
        self._ids = {
            name: [(c.offsets.to_numpy(), c.values.to_numpy()) for c in (b.column(name) for b in batches)]
            for name in ("prompt_ids", "chosen_ids", "rejected_ids")
        }

    def __len__(self) -> int:
        return len(self._table)

    def column(self, name: str) -> np.ndarray:
        """A flat column (`gap`, `chosen_key`, `rejected_key`)."""
        return self._table.column(name).to_numpy()[self._rank]

    def lengths(self, name: str) -> Int[np.ndarray, " pairs"]:
        """Token counts of one of the id columns."""
        return pc.list_value_length(self._table.column(name)).to_numpy()[self._rank].astype(np.int64)

    def contexts(self, side: str) -> Int[np.ndarray, " pairs"]:
        """How many of each response's first ids are its thinking; `side` is chosen or rejected."""
        return self._context[f"{side}_ids"][self._rank].astype(np.int64)

    def context(self, side: str, row: int) -> int:
        """How many of a response's first ids are its thinking; `side` is its column of ids."""
        return int(self._context[side][self._rank[row]])

    def pair_id(self, row: int) -> str:
        return self._table.column("pair_id")[int(self._rank[row])].as_py()

    def ids(self, name: str, row: int) -> Int[np.ndarray, " tokens"]:
        """One row's ids, a view of the mapped file."""
        at = int(self._rank[row])
        batch = int(np.searchsorted(self._first, at, side="right")) - 1
        offsets, values = self._ids[name][batch]
        i = at - int(self._first[batch])
        return values[offsets[i] : offsets[i + 1]]


@dataclass(frozen=True)
class Selection:
    """The pairs of one job: rows of the token file, and the distinct sequences that they are made of.

    `source` says where the ids of a sequence stand: 2 · row, and 1 more for the row's rejected response.
    """

    rows: Int[np.ndarray, " pairs"]
    gap: Float[np.ndarray, " pairs"]
    sequences: Sequences
    source: Int[np.ndarray, " sequences"]

    def __len__(self) -> int:
        return len(self.rows)


def select_pairs(data: TokenizedPairs, method: Method[Train], *, seed: int) -> tuple[Selection, dict[str, int]]:
    """Apply `drop_dead`, `max_pairs` and `shuffle_labels`, in this order; count what falls away. A method that looks at
    one side alone gets each distinct sequence once.

    Raises: InputError when nothing is left, and as the method's `check_gaps`.
    """
    train = method.config
    gap = data.column("gap")
    rows = np.arange(len(data))
    dropped = {}
    if train.drop_dead:
        rows = rows[gap > 0]
        dropped["dead"] = len(data) - len(rows)
    if train.max_pairs is not None and train.max_pairs < len(rows):
        chosen = stream(seed, SUBSET).choice(len(rows), size=train.max_pairs, replace=False)
        dropped["max_pairs"] = len(rows) - train.max_pairs
        rows = rows[np.sort(chosen)]
    swapped = np.zeros(len(rows), dtype=bool)
    if train.shuffle_labels:
        swapped = stream(seed, LABELS).random(len(rows)) < 0.5
    if len(method.sides) == 1:
        keys = np.where(swapped, data.column("rejected_key")[rows], data.column("chosen_key")[rows])
        _, first = np.unique(keys, return_index=True)
        first.sort()
        dropped["duplicate"] = len(rows) - len(first)
        rows, swapped = rows[first], swapped[first]
    if len(rows) == 0:
        raise InputError(f"no pairs to train on: the table is empty or every pair was dropped ({dropped})")
    method.check_gaps(gap[rows])
    return _selection(data, rows, swapped, gap[rows], sides=len(method.sides)), dropped


def _selection(
    data: TokenizedPairs, rows: np.ndarray, swapped: np.ndarray, gap: np.ndarray, *, sides: int
) -> Selection:
    """`swapped` pairs have their rejected response as the chosen one."""
    keys, sources = [], []
    for side in range(sides):
        rejected = swapped ^ bool(side)
        keys.append(np.where(rejected, data.column("rejected_key")[rows], data.column("chosen_key")[rows]))
        sources.append(2 * rows + rejected)
    _, first, of_pair = np.unique(np.stack(keys, axis=1), return_index=True, return_inverse=True)
    source = np.stack(sources, axis=1).ravel()[first]
    row, rejected = np.divmod(source, 2)
    prompts = data.lengths("prompt_ids")
    responses, contexts = (
        np.where(rejected, of_side("rejected")[row], of_side("chosen")[row])
        for of_side in (lambda side: data.lengths(f"{side}_ids"), data.contexts)
    )
    sequences = Sequences(
        tokens=prompts[row] + responses,
        responses=responses - contexts,
        heads=np.where(contexts == 0, prompts[row], 0),  # an answer's thinking stands between it and the prompt
        prompt=np.unique(data.column("prompt_key")[row], return_inverse=True)[1],
        of_pair=of_pair.reshape(len(rows), sides),
    )
    return Selection(rows, gap, sequences, source)


def read_sequences(data: TokenizedPairs, selection: Selection, which: np.ndarray) -> list[Sequence]:
    """Prompt and response ids of these sequences. A response's thinking counts as its prompt's: it is read, and no loss
    looks at it."""
    return [_sequence(data, *map(int, divmod(selection.source[i], 2))) for i in which]


def _sequence(data: TokenizedPairs, row: int, rejected: int) -> Sequence:
    side = f"{SIDES[rejected]}_ids"
    prompt, response = data.ids("prompt_ids", row), data.ids(side, row)
    context = data.context(side, row)
    return (np.concatenate([prompt, response[:context]]), response[context:]) if context else (prompt, response)
