"""What training asks of a method: which sequences an example has, its loss, its statistics, its defaults.

Planning, packing, distinct sequences, the step loop, resuming and export are the same for all methods and know none of
them by name. This module and the methods import torch only inside the functions that need it, because a config is read
without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

import numpy as np
from jaxtyping import Float, Int

from spa_ray.config.plugs import source_hash
from spa_ray.config.training import Train, method_class
from spa_ray.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

Stats = dict[str, "Tensor"]
Gaps = Float[np.ndarray, " pairs"]
C = TypeVar("C", bound=Train)


@dataclass(frozen=True)
class LossInputs:
    """Some pairs of a step. `sides` are the pairs' sequences, the chosen one first; `summed`, `counts` and `reference`
    (summed log-probs of the policy before step 0) are by sequence. A sequence is computed once, in however many pairs
    it is."""

    summed: Float[Tensor, " sequences"]
    counts: Int[Tensor, " sequences"]
    sides: Int[Tensor, "pairs sides"]
    weights: Float[Tensor, " pairs"]
    reference: Float[Tensor, " sequences"] | None = None

    def summed_logps(self) -> list[Float[Tensor, " pairs"]]:
        """Of each side, the chosen one first."""
        return self._of_sides(self.summed)

    def mean_logps(self) -> list[Float[Tensor, " pairs"]]:
        """Of each side, over its response's tokens."""
        return self._of_sides(self.summed / self.counts)

    def reference_logps(self, *, mean: bool = False) -> list[Float[Tensor, " pairs"]]:
        """Of each side, of the policy before step 0."""
        assert self.reference is not None
        return self._of_sides(self.reference / self.counts if mean else self.reference)

    def _of_sides(self, values: Tensor) -> list[Tensor]:
        return [values[side] for side in self.sides.unbind(dim=1)]


class Method(Generic[C]):
    """A training method. Derive from it, or from `PairwiseMethod`, and give `train.method: my_file:MyMethod`."""

    Config: ClassVar[type[Train]] = Train  # the method's keys under `train`, with their defaults
    # Learning rates that are known to work with AdamW on every weight of a model of 7 to 8 billion parameters.
    known_lr: ClassVar[tuple[float, float] | None] = None
    sides: ClassVar[tuple[str, ...]] = ("chosen", "rejected")  # the sequences that a pair is to this method
    needs_reference: ClassVar[bool] = False  # log-probs of the policy before step 0
    weighted: ClassVar[bool] = False  # whether `weights` looks at the gaps
    stats: ClassVar[tuple[str, ...]] = ()  # the names of `loss`'s statistics

    def __init__(self, config: C) -> None:
        self.config = config

    def weights(self, gap: Gaps, *, mean_gap: float | None = None) -> Gaps:
        """Constant weights of the pairs of one optimizer step; `mean_gap` is all pairs' with `gap_mean: epoch`."""
        return np.ones_like(gap)

    def check_gaps(self, gap: Gaps) -> None:
        """Raises: InputError when a run's pairs cannot be trained on by their gaps."""

    def loss(self, inputs: LossInputs) -> tuple[Float[Tensor, " pairs"], Stats]:
        """Losses, one per pair, weighted and not reduced; and statistics, one number per pair each."""
        raise NotImplementedError


def method_of(train: Train) -> Method[Train]:
    """The method that a `train` section names."""
    found: Callable[[Train], Method[Train]] = method_class(train.method)
    return found(train)


def check_section_of_method(train: Train, *, name: str) -> None:
    """Raises: InputError for a job's section without its method's defaults."""
    if not isinstance(train, method_class(train.method).Config):
        raise InputError(f"job {name}: train is no section of {train.method}; make it with train_section({{..}})")


def method_source(train: Train) -> list[str]:
    """The hash of a user's own method's source, which decides a result as a setting does; none for built-in ones."""
    found = source_hash(train.method)
    return [] if found is None else [found]
