"""What a stage's calls spent: sums over calls, notes on the way, the most engines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from spa_ray.generation import usage
from spa_ray.generation.ledger import Ledger
from spa_ray.generation.usage import Spent, Usage

COUNTS = replace(Ledger().counts(), requests=10, generated_tokens=70, engines=2, deaths=1, busy=3.0, alive=4.0)


def test_calls_add_up_and_the_most_engines_count(tmp_path: Path) -> None:
    Usage(tmp_path / "usage").note(COUNTS, last=True)
    Usage(tmp_path / "usage").note(replace(COUNTS, requests=5, engines=1, busy=1.0), last=True)
    total = Usage(tmp_path / "usage").total()
    assert (total.requests, total.generated_tokens, total.engines, total.deaths) == (15, 140, 2, 2)
    assert total.busy_share == 0.5


def test_seconds_are_those_of_all_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 107.0, 107.0, 200.0, 203.0, 203.0])
    monkeypatch.setattr(usage.time, "monotonic", lambda: next(clock))
    Usage(tmp_path / "usage").note(COUNTS, last=True)
    second = Usage(tmp_path / "usage")
    second.note(COUNTS)
    assert second.total().seconds == 7.0 + 3.0


def test_a_call_that_is_killed_leaves_its_last_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = Usage(tmp_path / "usage")
    killed.note(COUNTS)
    assert Usage(tmp_path / "usage").total().requests == 0, "no note before its time"
    monkeypatch.setattr(usage, "NOTE_SECONDS", 0.0)
    killed.note(COUNTS)
    killed.note(replace(COUNTS, requests=12))  # a note takes the place of the call's earlier one
    assert Usage(tmp_path / "usage").total().requests == 12


def test_what_a_killed_ledger_knew_is_not_lost(tmp_path: Path) -> None:
    call = Usage(tmp_path / "usage")
    for requests in (10, 3, 8):  # the ledger began from nothing after 10
        call.note(replace(COUNTS, requests=requests), last=True)
    assert Usage(tmp_path / "usage").total().requests == 18


def test_engines_that_never_worked_have_no_share() -> None:
    assert Spent().busy_share is None
