"""What `spa plan` says of the judge's scale on the model's own tokenizer: «10» is one token here, «11» two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from spa_ray.config.models import Config
from spa_ray.errors import InputError
from spa_ray.pipeline.plan import make_plan


def notes(
    model: Path, prompts: Path, scoring: dict[str, Any], *, max_tokens: int = 64, start: str = "scoring:"
) -> list[str]:
    raw = {
        "name": "x",
        "run_dir": "x",
        "objectives": ["harmless", "helpful"],
        "model": {"path": str(model)},
        "prompts": {"source": str(prompts)},
        "scoring": scoring,
        "sampling": {"max_tokens": max_tokens},
        "refine": {"max_tokens": max_tokens},
        "resources": {"gpus_per_engine": 0, "gpus_per_worker": 0},
    }
    found: list[str] = make_plan({"main": Config.model_validate(raw)})["notes"]
    return [note for note in found if note.startswith(start)]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "Is the kettle on?"}\n')
    return path


def test_a_label_of_several_tokens_is_named_with_the_scale_that_takes_one_step(tiny_model: Path, prompts: Path) -> None:
    (note,) = notes(tiny_model, prompts, {"mode": "choice", "scale": [1, 12]})
    assert "11 is several tokens" in note
    assert "scoring.scale=[1, 9]" in note


@pytest.mark.parametrize(
    "scoring", [{"mode": "choice", "scale": [1, 9]}, {"mode": "regex"}, {"mode": "expected", "scale": [1, 9]}]
)
def test_nothing_is_said_where_no_scale_is_faster(tiny_model: Path, prompts: Path, scoring: dict[str, Any]) -> None:
    assert notes(tiny_model, prompts, scoring) == []


@pytest.mark.parametrize(("max_tokens", "said"), [(64, False), (8192, True)])
def test_long_answers_are_cheaper_to_judge_answer_first(
    tiny_model: Path, tmp_path: Path, max_tokens: int, said: bool
) -> None:
    prompts = tmp_path / "several.jsonl"
    prompts.write_text("".join(f'{{"prompt": "Is kettle number {k} on the stove by now?"}}\n' for k in range(4)))
    found = notes(tiny_model, prompts, {"scale": [1, 9]}, max_tokens=max_tokens, start="scoring.layout")
    assert bool(found) is said
    if said:
        assert "answer_first" in found[0]
        assert notes(tiny_model, prompts, {"layout": "answer_first"}, max_tokens=max_tokens, start="scoring.l") == []


def test_expected_on_labels_of_several_tokens_is_refused(tiny_model: Path, prompts: Path) -> None:
    with pytest.raises(InputError, match=r"one-token labels.*scoring\.scale=\[1, 9\]"):
        notes(tiny_model, prompts, {"mode": "expected", "scale": [1, 12]})
