"""What a run should be told while there is time: a policy that collapses, a learning rate out of place, data lost.

Comes in: log rows and settings as plain numbers. Goes out: one line each, or None; the caller writes them into the
step's row, under `warnings`, which the driver follows. Never: torch, files, printing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from statistics import fmean, median
from typing import Any

from spa_ray.config.training import Train
from spa_ray.errors import RunError
from spa_ray.training.method import method_of
from spa_ray.training.schedule import lr_multiplier

PER_TOKEN = "logps/chosen_per_token"  # the chosen answers' log-prob: a mean over tokens, then over the step's pairs
BASELINE = 5  # first steps that say where the log-prob stood
WINDOW = 5  # steps that the current value is the median of: one odd batch, or a short last one, is no collapse


class CollapseAlarm:
    """Watches the chosen answers' log-prob a token, which SimPO and DPO let fall as long as the rejected fall faster.

    In a run that broke (docs/RESULTS.md, «Twice the learning rate») it fell from -0.7 to below -1.6 while
    `rewards/accuracies` rose, and the answers repeated one word; in a sound run of the same arm it fell to -1.2. The
    default limit of 0.7 nats lies between: the answers that the model should prefer have become half as likely, token
    for token. With `on_collapse: warn` it speaks once, and again each time the fall has doubled; with `stop` it raises.
    """

    def __init__(self, train: Train, earlier: Iterable[Mapping[str, Any]] = ()) -> None:
        """`earlier`: the rows of the steps before a resume, so that the baseline is the run's own."""
        self.limit = train.collapse_nats
        self.stop = train.on_collapse == "stop"
        self.first: list[float] = []
        self.recent: deque[float] = deque(maxlen=WINDOW)
        for row in earlier:
            self._add(row)
            if not self.stop:
                self._passed()  # said before the resume

    def see(self, row: Mapping[str, Any]) -> str | None:
        """One step's row; the same answer on every rank. Raises: RunError with `on_collapse: stop`."""
        if self.limit is None:
            return None
        self._add(row)
        if not self._passed():
            return None
        accuracy = row.get("rewards/accuracies")
        text = (
            f"step {row['step']:g}: the chosen answers' log-prob fell from {self._baseline():.2f} to "
            f"{self._now():.2f} a token"
            + (f" at rewards/accuracies {accuracy:.2f}" if accuracy is not None else "")
            + ": the policy may be collapsing; look at its answers, lower train.lr or train.epochs"
        )
        if self.stop:
            raise RunError(f"{text} (train.on_collapse is stop, train.collapse_nats the limit)")
        return text

    def _add(self, row: Mapping[str, Any]) -> None:
        value = float(row[PER_TOKEN])
        if len(self.first) < BASELINE:
            self.first.append(value)
        self.recent.append(value)

    def _baseline(self) -> float:
        """Not below the first step, whose forward is the model as loaded: a collapse at once is one too."""
        return max(self.first[0], fmean(self.first))

    def _now(self) -> float:
        return median(self.recent)

    def _passed(self) -> bool:
        """Whether the fall has reached the limit; if so, the next one is twice as far, beyond this fall."""
        fall = self._baseline() - self._now()
        if self.limit is None or len(self.recent) < WINDOW or fall < self.limit:
            return False
        while not self.stop and self.limit <= fall:
            self.limit *= 2
        return True


KNOWN_AT = 8e9  # parameters of the models that a method's `known_lr` is of
LORA = (10.0, 20.0)  # times these: TRL's scripts, 5e-6 for DPO and 2e-4 for SFT; Schulman et al. 2025: ten times
FAR = 5.0  # times outside the range


def check_lr(train: Train, parameters: float) -> str | None:
    """A line when `train.lr` lies more than five times outside of what is known to work, else None.

    `parameters`: of the whole model. Ranges are known at 7 to 8 billion; they are scaled by (8e9 / parameters)^(1/2),
    for the best rate under Adam goes as 1 / width (Yang et al. 2022, Tensor Programs V) and parameters as the width's
    square. Tülu 3's DPO agrees: 5e-7 at 8 B, 2e-7 at 70 B, where this gives 1.7e-7. A model of 1.1 M, for which 1e-4 is
    right and 2e-4 breaks one arm in two seeds of three, gets 2.5e-5 to 8.4e-5, and a word from 4.2e-4 on. The factor of
    five is what keeps this from crying wolf: other data, batch sizes and schedules move the best rate by less.
    """
    known = method_of(train).known_lr
    if known is None or train.lr is None:
        return None
    scale = (KNOWN_AT / parameters) ** 0.5
    below, above = LORA if train.lora is not None else (1.0, 1.0)
    if train.lora is not None:  # the smaller their scale, the higher their rate may be
        above /= min(1.0, train.lora.alpha / train.lora.r)
    low, high = (lr * times * scale for lr, times in zip(known, (below, above), strict=True))
    if low / FAR <= train.lr <= high * FAR:
        return None
    what, mend = ("above", "the policy may collapse") if train.lr > high else ("below", "little may be learned")
    kind = "LoRA" if train.lora is not None else "all weights"
    return (
        f"train.lr {train.lr:g} is far {what} what is known to work for {train.method} ({kind}, "
        f"{_size(parameters)} parameters): about {low:.0e} to {high:.0e}; {mend}"
    )


# Half of the distance between two bfloat16 numbers from 2^-6 to 2^-5, where a typical weight of 0.02 lies: 8 bits of
# precision, so they are 2^-13 apart.
HALF_STEP = 2.0**-14
LORA_WIDTH = 4096  # inputs of a linear layer at 8 B


def movement(train: Train, parameters: float, steps: int) -> float:
    """How far one weight moves in a run at most: Adam's update is about the learning rate, so it is lr · Σ schedule.

    An adapter's B, which starts at zero, moves so far; the weight moves by (α/r) · √r · that · the deviation of A,
    1/√(3 · inputs) in peft's initialisation. Inputs go as the square root of the parameters.
    """
    assert train.lr is not None
    total = train.lr * sum(lr_multiplier(s, steps, kind=train.scheduler, warmup=train.warmup) for s in range(steps))
    if train.lora is None:
        return total
    inputs = LORA_WIDTH * (parameters / KNOWN_AT) ** 0.5
    return train.lora.alpha / train.lora.r * train.lora.r**0.5 * total / (3 * inputs) ** 0.5


def check_movement(train: Train, parameters: float, steps: int) -> str | None:
    """A line when a run in bfloat16 moves weights by less than bfloat16 can tell apart, else None.

    Master weights are float32, but the forward and the exported model see them rounded.
    """
    if train.lr is None or train.dtype != "bfloat16":
        return None
    far = movement(train, parameters, steps)
    if far >= HALF_STEP:
        return None
    return (
        f"train.lr {train.lr:g} over {steps:,} steps moves a weight by {far:.1e} at most, and a bfloat16 weight of "
        f"0.02 changes from {HALF_STEP:.1e} on: most weights of the exported model will be the base model's; raise "
        "train.lr, train.epochs or prompts.limit, or lower train.batch_size"
    )


def _size(parameters: float) -> str:
    return f"{parameters / 1e9:.3g} B" if parameters >= 1e9 else f"{parameters / 1e6:.3g} M"


MOST_TOO_LONG = 0.1


def check_dropped(dropped: Mapping[str, int], trained: int, max_length: int) -> str | None:
    """A line when more than a tenth of all pairs are too long to be trained on. `dropped`: pairs by reason."""
    too_long, pairs = dropped.get("too_long", 0), trained + sum(dropped.values())
    if pairs == 0 or too_long <= MOST_TOO_LONG * pairs:
        return None
    return (
        f"{too_long:,} of {pairs:,} pairs ({too_long / pairs:.0%}) are longer than train.max_length {max_length} and "
        "were dropped; those that are left are the short ones: raise train.max_length"
    )
