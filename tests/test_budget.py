"""A run stops when its budget is used up, and goes on where there is more: tokens, hours, GPU-hours."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from spa_ray.config.budget import Budget
from spa_ray.data.episodes import EpisodeFolder
from spa_ray.engine.openai import Allowance, BudgetSpentError
from spa_ray.generation import budget
from spa_ray.generation.budget import Meter, Spending
from spa_ray.storage.files import read_json

MODEL = Path(__file__).parents[1] / "spa_ray" / "microworld" / "model"
PROMPTS = 24


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(budget.time, "monotonic", lambda: now.seconds)
    return now


def test_hours_and_gpus_of_all_calls_and_stages_count(tmp_path: Path, clock: SimpleNamespace) -> None:
    for call in range(2):
        meter = Meter(tmp_path, Budget(hours=4, usd=20), price_per_gpu_hour=3)
        for name, gpus in (("generate", 2), ("build", 0)):
            with meter.stage(name, gpus=gpus):
                clock.seconds += 1800
                meter.spend(usd=0.25, tokens=10)
            clock.seconds += 9000  # between stages nothing counts
        assert meter.total() == Spending(usd=3.5 * (call + 1), tokens=20 * (call + 1), hours=call + 1)
        assert meter.left() == Allowance(usd=20 - 3.5 * (call + 1), tokens=None)
        assert meter.used_up() is None
    meter = Meter(tmp_path, Budget(hours=2))
    told = r"^train: budget\.hours 2 is used up; all calls of this run spent 40 tokens, 2\.00 h and \$7\.0000; raise it"
    with pytest.raises(BudgetSpentError, match=told), meter.stage("train", gpus=0):
        raise AssertionError("it began")
    with Meter(tmp_path, Budget(hours=3)).stage("train", gpus=0):
        pass


def test_a_call_that_is_killed_leaves_what_it_noted(tmp_path: Path, clock: SimpleNamespace) -> None:
    killed = Meter(tmp_path, None)
    with killed.stage("generate", gpus=0):
        for _ in range(4):
            clock.seconds += 2
            killed.spend(usd=1, tokens=5)
        assert Meter(tmp_path, None).total().tokens == 15  # noted after 6 seconds
    assert Meter(tmp_path, None).total() == Spending(4, 20, 8 / 3600)


@pytest.mark.engine
def test_a_command_stops_when_its_tokens_are_used_up_and_goes_on_where_there_are_more(
    tmp_path: Path, spa: Any, ray_session: None
) -> None:
    engine = {"engine": "spa_ray.engine.scripted:ScriptedEngine", "engine_kwargs": {"latency": 0.3}}
    raw = {
        "model": {"path": str(MODEL), **engine},
        "sampling": {"max_tokens": 60},
        "refine": {"max_tokens": 100},
        "scoring": {"mode": "regex", "max_tokens": 100},
        "generation": {"rows_per_block": 2},
        "resources": {"concurrency": 2},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    (tmp_path / "prompts.csv").write_text("prompt\n" + "".join(f"question {k}?\n" for k in range(PROMPTS)))
    out = tmp_path / "out"
    command = ("generate", tmp_path / "config.yaml", "--prompts", tmp_path / "prompts.csv", "--out", out)

    status, _, err = spa(*command, "budget.tokens=1000")
    (line,) = [line for line in err.splitlines() if line.startswith("spa:")]
    done = EpisodeFolder(out / "episodes").count()
    assert status == 1
    assert f"generate: budget.tokens 1000 is used up; {done} of {PROMPTS} prompts are done; all calls" in line
    assert 0 < done < PROMPTS

    status, _, err = spa(*command, "budget.tokens=1000")
    assert (status, EpisodeFolder(out / "episodes").count()) == (1, done), err
    spent = Meter(out / "spent", None).total().tokens

    status, _, err = spa(*command, "budget.tokens=10000000")
    assert status == 0, err
    facts = read_json(out / "stage.json")
    assert (facts["rows"], facts["errors"]) == (PROMPTS, 0)
    total = Meter(out / "spent", None).total().tokens
    assert total >= facts["prompt_tokens"] + facts["generated_tokens"] > spent > 1000
