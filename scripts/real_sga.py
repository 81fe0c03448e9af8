"""What `make real ARGS=--sga` adds: SGA on the scored episodes of `make real`, and how well the trained model senses.

The scores that held-out prompts ask for are those of their own best answers, sampled and scored like the ones that were
trained on. Beside the model's error stands that of a constant, the mean score of the pairs that it was trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from spa_ray.config.models import Config
from spa_ray.data.episodes import EpisodeFolder
from spa_ray.data.schemas import ranges_of
from spa_ray.preferences import build_pairs, denoise

ARM = "sga_sft"
# The paper's settings but for one epoch, 256 tokens, and rates with which six steps move something.
TRAIN = {"method": ARM, "epochs": 1, "batch_size": 8, "max_length": 256, "lr": 1e-4, "head_lr": 1e-3}
SETTINGS = [f"arms={{{ARM}: {{{', '.join(f'train.{key}: {value}' for key, value in TRAIN.items())}}}}}"]

Scores = Float[np.ndarray, "prompts k"]
Errors = list[tuple[str, float, float]]


def wanted(pairs: pa.Table) -> Scores:
    """The chosen answers' scores, as parts of their ranges."""
    low, high = np.array(ranges_of(pairs.schema)).T
    return (np.array(pairs["chosen_scores"].to_pylist()) - low) / (high - low)


def errors(names: Sequence[str], sensed: Scores, held_out: Scores, trained: Scores) -> Errors:
    """Mean absolute error per objective: of what was sensed, and of the constant."""
    ours, constant = np.abs(sensed - held_out).mean(axis=0), np.abs(trained.mean(axis=0) - held_out).mean(axis=0)
    return list(zip(names, ours.tolist(), constant.tolist(), strict=True))


def sensing(config: Config, sensed: pa.Table, pairs: pa.Table, held_out: Path) -> tuple[int, Errors]:
    """How many held-out prompts have such scores, and the errors. `sensed` is `spa sense`'s, `held_out` are the
    prompts' episodes, `pairs` the run's."""
    found = build_pairs(denoise(EpisodeFolder(held_out).table(), config, tau=None), config)
    by_prompt = dict(zip(sensed["prompt_id"].to_pylist(), sensed["scores"].to_pylist(), strict=True))
    ours = np.array([by_prompt[prompt_id] for prompt_id in found["prompt_id"].to_pylist()])
    return found.num_rows, errors(config.objectives, ours, wanted(found), wanted(pairs))


def print_sensing(prompts: int, found: Errors) -> None:
    print(f"\nsensed scores of {prompts} held-out prompts, mean absolute error within [0, 1]:")
    for name, ours, constant in found:
        print(f"  {name:<10} sensed {ours:.3f}, the training pairs' mean {constant:.3f}")
