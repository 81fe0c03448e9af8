"""When a checkpoint is due, by steps and by the clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spa_ray.config.training import Train
from spa_ray.training import checkpoint, comm
from spa_ray.training.checkpoint import SaveTimer, is_due

STEPS = st.integers(1, 1000)
MINUTES = st.none() | st.floats(0.01, 100)
EVERY = st.none() | st.integers(1, 50)


@given(STEPS, EVERY, MINUTES, st.floats(0, 1e5))
def test_nothing_is_saved_after_the_last_step(steps: int, every: int | None, minutes: float | None, s: float) -> None:
    assert not is_due(steps, steps, every_steps=every, every_minutes=minutes, seconds_since=s)


@given(STEPS, STEPS, st.floats(0, 1e5))
def test_unasked_nothing_is_saved(done: int, steps: int, seconds: float) -> None:
    assert not is_due(done, steps, every_steps=None, every_minutes=None, seconds_since=seconds)


@given(st.integers(1, 999), st.integers(1, 50), MINUTES, st.floats(0, 1e5))
def test_steps_and_minutes_each_suffice(done: int, every: int, minutes: float | None, seconds: float) -> None:
    by_steps = is_due(done, 1000, every_steps=every, every_minutes=None, seconds_since=seconds)
    by_clock = is_due(done, 1000, every_steps=None, every_minutes=minutes, seconds_since=seconds)
    assert by_steps == (done % every == 0)
    assert by_clock == (minutes is not None and seconds >= 60 * minutes)
    both = is_due(done, 1000, every_steps=every, every_minutes=minutes, seconds_since=seconds)
    assert both == (by_steps or by_clock)


def test_the_clock_starts_anew_after_a_save_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comm, "on_rank_zero", lambda work: work())
    now = [0.0]
    timer = SaveTimer(Train(save_every_minutes=1), 100, now=lambda: now[0])
    now[0] = 59.9
    assert not timer.due(1)
    now[0] = 60.0
    assert timer.due(2)
    now[0] = 90.0  # the save took half a minute
    timer.restart()
    now[0] = 149.0
    assert not timer.due(3)
    now[0] = 150.0
    assert timer.due(4)


def test_rank_zeros_clock_decides_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comm, "on_rank_zero", lambda work: True)  # what rank 0 found
    assert SaveTimer(Train(save_every_minutes=60), 100).due(1)


def test_without_a_clock_no_rank_asks_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint.comm, "on_rank_zero", lambda work: pytest.fail("a collective in every step"))
    timer = SaveTimer(Train(save_every_steps=2), 6)
    assert [timer.due(done) for done in range(1, 7)] == [False, True, False, True, False, False]
