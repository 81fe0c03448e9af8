"""Model folders of conditioned methods with random heads, for the tests of steering."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from spa_ray.config.training import train_section
from spa_ray.training.method import method_of
from spa_ray.training.own_modules import Beside

NAMES = ["harmless", "helpful"]
STATE: dict[str, Any] = {"objectives": NAMES, "ranges": [[1.0, 10.0], [0.0, 4.0]]}
WIDTHS = [16, 8]


def sga_folder(model: Path, out: Path, *, seed: int = 0, scale: float = 12.0) -> Path:
    """A model folder as `sga_sft` leaves it; the random head's last layer is scaled, so that prompts differ."""
    from transformers import AutoConfig

    shutil.copytree(model, out)
    train = train_section({"method": "sga_sft", "head_widths": WIDTHS, "head_seed": seed})
    config = AutoConfig.from_pretrained(model)
    head = method_of(train, STATE).modules(type("Model", (), {"config": config})())
    assert head is not None
    tensors = dict(head.state_dict())
    last = max(int(name.split(".")[0]) for name in tensors)
    tensors[f"{last}.weight"] = scale * tensors[f"{last}.weight"]
    Beside(STATE, tensors).write(out, train)
    return out


def cpo_folder(model: Path, out: Path) -> Path:
    """A model folder as `cpo` leaves it: no head, and the upper ends of the ranges to ask for."""
    shutil.copytree(model, out)
    Beside(STATE).write(out, train_section({"method": "cpo"}))
    return out
