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
from jaxtyping import Bool, Float, Int

from spa_ray.config.training import Train
from spa_ray.errors import InputError
from spa_ray.training.batches import LABELS, SUBSET, stream
from spa_ray.training.deal import Sequences
from spa_ray.training.method import ANSWERS, Method

Sequence = tuple[np.ndarray, np.ndarray]  # prompt ids, response ids


class TokenizedPairs:
    """Rows of the token file, in the order of `pair_id`, whatever the order in the file."""

    def __init__(self, path: Path) -> None:
        self._table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        batches = self._table.to_batches()
        self._rank = pc.sort_indices(self._table, sort_keys=[("pair_id", "ascending")]).to_numpy()
        self.sides = tuple(n.removesuffix("_context") for n in self._table.column_names if n.endswith("_context"))
        self._context = {f"{side}_ids": self._table.column(f"{side}_context").to_numpy() for side in self.sides}
        self._first = np.cumsum([0] + [len(b) for b in batches])
        self._ids = {
            name: [(c.offsets.to_numpy(), c.values.to_numpy()) for c in (b.column(name) for b in batches)]
            for name in ("prompt_ids", *self._context)
        }

    def __len__(self) -> int:
        return len(self._table)

    def column(self, name: str) -> np.ndarray:
        """A flat column (`gap`, `chosen_key`, `rejected_key`)."""
        return self._table.column(name).to_numpy()[self._rank]

    def lengths(self, name: str) -> Int[np.ndarray, " pairs"]:
        """Token counts of one of the id columns."""
        return pc.list_value_length(self._table.column(name)).to_numpy()[self._rank].astype(np.int64)

    def targets(self) -> Float[np.ndarray, "pairs k"] | None:
        """The examples' numbers for the loss, None without any. Raises: InputError unless all have equally many."""
        counts = self.lengths("targets")
        if len(counts) == 0 or not counts.any():
            return None
        if (counts != counts[0]).any():
            raise InputError(f"the method's examples have {counts.min()} to {counts.max()} targets; give equally many")
        flat = pc.list_flatten(self._table.column("targets")).to_numpy()
        return flat.reshape(len(counts), -1)[self._rank]

    def contexts(self, side: str) -> Int[np.ndarray, " pairs"]:
        """`context` of every row; `side` is a name in `sides`."""
        return self._context[f"{side}_ids"][self._rank].astype(np.int64)

    def context(self, side: str, row: int) -> int:
        """How many of a response's first ids are its thinking; `side` is its column of ids. Negative: so many of the
        ids are the prompt, and `prompt_ids` is not read."""
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

    `source` says where the ids of a sequence stand: its row times the number of `sides` in the token file, and the
    place of its side among them. `targets` are the pairs' numbers for the loss, `keys` the
    sequences' hashes.
    """

    rows: Int[np.ndarray, " pairs"]
    gap: Float[np.ndarray, " pairs"]
    sequences: Sequences
    source: Int[np.ndarray, " sequences"]
    sides: tuple[str, ...] = ANSWERS
    targets: Float[np.ndarray, "pairs k"] | None = None
    keys: Int[np.ndarray, " sequences"] | None = None

    def __len__(self) -> int:
        return len(self.rows)


def select_pairs(data: TokenizedPairs, method: Method[Train], *, seed: int) -> tuple[Selection, dict[str, int]]:
    """Apply `drop_dead`, `max_pairs` and `shuffle_labels`, in this order; count what falls away. A method that looks at
    no rejected answer gets each distinct example once.

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
        if (data.lengths("rejected_ids")[rows[swapped]] == 0).any():
            raise InputError(f"train.shuffle_labels: {train.method} has examples without a rejected answer to swap")
    at = _places(data, method, swapped)
    if "rejected" not in method.sides:
        _, first = np.unique(_examples(data, rows, at), axis=0, return_index=True)
        first.sort()
        dropped["duplicate"] = len(rows) - len(first)
        rows, at = rows[first], at[first]
    if len(rows) == 0:
        raise InputError(f"no pairs to train on: the table is empty or every pair was dropped ({dropped})")
    method.check_gaps(gap[rows])
    targets = data.targets()
    return _selection(data, rows, at, gap[rows], None if targets is None else targets[rows]), dropped


def _examples(data: TokenizedPairs, rows: np.ndarray, at: np.ndarray) -> np.ndarray:
    """(pairs, columns) what makes an example: its sequences and its targets."""
    keys, targets = _keys(data, rows, at), data.targets()
    same = np.zeros(len(rows), dtype=np.int64)
    if targets is not None:
        _, same = np.unique(targets[rows], axis=0, return_inverse=True)
    return np.column_stack([keys, same.reshape(len(rows))])


def _places(data: TokenizedPairs, method: Method[Train], swapped: np.ndarray) -> Int[np.ndarray, "pairs sides"]:
    """Where the method's sides are among the token file's; `swapped` pairs have the rejected answer as the chosen."""
    places = np.array([data.sides.index(side) for side in method.sides])
    return np.where(swapped[:, None] & (places < len(ANSWERS)), 1 - places, places)


def _keys(data: TokenizedPairs, rows: np.ndarray, at: Int[np.ndarray, "pairs sides"]) -> np.ndarray:
    every = np.stack([data.column(f"{side}_key")[rows] for side in data.sides], axis=1)
    return np.take_along_axis(every, at, axis=1)


def _selection(
    data: TokenizedPairs, rows: np.ndarray, at: np.ndarray, gap: np.ndarray, targets: np.ndarray | None
) -> Selection:
    """`at`: the places of each pair's sequences among the file's sides."""
    n = len(data.sides)
    keys, first, of_pair = np.unique(_keys(data, rows, at), return_index=True, return_inverse=True)
    source = (n * rows[:, None] + at).ravel()[first]
    row, side = np.divmod(source, n)
    responses, contexts = (
        np.stack([of_side(name) for name in data.sides])[side, row]
        for of_side in (lambda name: data.lengths(f"{name}_ids"), data.contexts)
    )
    prompts = np.where(contexts < 0, 0, data.lengths("prompt_ids")[row])  # what stands before a response's ids
    prompt = np.unique(data.column("prompt_key")[row], return_inverse=True)[1]
    sequences = Sequences(
        tokens=prompts + responses,
        responses=responses - np.abs(contexts),
        # An answer's thinking stands between it and the prompt; rendered prompts may differ between a prompt's pairs.
        heads=np.where((contexts == 0) & _alike(prompt, data.column("head_key")[row]), prompts, 0),
        prompt=prompt,
        of_pair=of_pair.reshape(at.shape),
    )
    return Selection(rows, gap, sequences, source, data.sides, targets, keys)


def _alike(group: Int[np.ndarray, " n"], key: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """Whether all of an entry's group have the same key."""
    firsts = key[np.unique(group, return_index=True)[1]]
    different = np.zeros(len(firsts), dtype=bool)
    different[group[key != firsts[group]]] = True
    return ~different[group]


def read_sequences(data: TokenizedPairs, selection: Selection, which: np.ndarray) -> list[Sequence]:
    """Prompt and response ids of these sequences. A response's thinking counts as its prompt's: it is read, and no loss
    looks at it."""
    sides = selection.sides
    return [
        _sequence(data, row, sides[side]) for row, side in (divmod(int(selection.source[i]), len(sides)) for i in which)
    ]


def _sequence(data: TokenizedPairs, row: int, name: str) -> Sequence:
    side = f"{name}_ids"
    response, context = data.ids(side, row), data.context(side, row)
    if context < 0:
        return response[:-context], response[-context:]
    prompt = data.ids("prompt_ids", row)
    return (np.concatenate([prompt, response[:context]]), response[context:]) if context else (prompt, response)
