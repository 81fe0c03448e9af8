"""Learning rate over the steps of a run, as a pure function: a resume needs no scheduler state.

Comes in: step, total steps. Goes out: a multiplier of `train.lr`. Never: optimizers.
"""

from __future__ import annotations

import math
from typing import Literal


def lr_multiplier(step: int, steps: int, *, kind: Literal["cosine", "linear", "constant"], warmup: float) -> float:
    """The multiplier at optimizer step `step` (0-based) of `steps`: a linear rise, then the named decay towards 0.

    The rise takes ceil(warmup · steps) steps and starts above 0; the decay ends above 0: no step is wasted on lr 0.
    """
    rise = math.ceil(warmup * steps)
    if step < rise:
        return (step + 1) / (rise + 1)
    done = (step - rise) / (steps - rise)
    match kind:
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        case "linear":
            return 1 - done
        case "constant":
            return 1.0
