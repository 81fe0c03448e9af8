"""What warns during training: a collapsing policy, a learning rate out of place, too many pairs dropped."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spa_ray.config.plugs import METHODS
from spa_ray.config.training import Lora, Train, method_class, train_section
from spa_ray.errors import RunError
from spa_ray.training.guards import PER_TOKEN, CollapseAlarm, check_dropped, check_lr
from spa_ray.training.method import method_of

# Every fourth step of a sound run of the arm that broke at twice the learning rate (spa_robust, seed 0, lr 1e-4); its
# last step is a short one of four pairs.
SOUND = [
    *(-0.69, -0.71, -0.64, -0.65, -0.68, -0.70, -0.63, -0.63, -0.73, -0.69, -0.80, -0.70, -0.78, -1.00, -0.83, -1.07),
    *(-0.91, -1.02, -1.12, -1.04, -1.08, -1.16, -1.05, -1.15, -1.00, -1.25, -1.22, -1.11, -1.16, -1.83),
]


def row(step: int, value: float, accuracy: float = 0.8) -> dict[str, Any]:
    return {"step": step, PER_TOKEN: value, "rewards/accuracies": accuracy}


def alarms(values: list[float] | np.ndarray, **settings: Any) -> list[tuple[int, str]]:
    alarm = CollapseAlarm(Train(**settings))
    said = ((step, alarm.see(row(step, float(value)))) for step, value in enumerate(values, start=1))
    return [(step, text) for step, text in said if text is not None]


def falling(steps: int = 120, start: float = -0.7, end: float = -1.9, noise: float = 0.08) -> np.ndarray:
    """The collapse on record: the chosen answers' log-prob a token from -0.7 to -1.9 within the run."""
    return np.linspace(start, end, steps) + np.random.default_rng(0).normal(0, noise, steps)


def test_the_collapse_on_record_is_told_once_well_before_the_end() -> None:
    ((step, text),) = alarms(falling())
    assert 50 <= step <= 90
    assert text.startswith(f"step {step}: the chosen answers' log-prob fell from -0.69 to -1.40 a token")
    assert "rewards/accuracies 0.80" in text
    assert "\n" not in text


def test_the_sound_run_of_the_same_arm_is_let_alone() -> None:
    assert alarms(SOUND) == []


def test_a_fall_is_told_again_each_time_it_has_doubled() -> None:
    steps = [step for step, _ in alarms(np.linspace(-0.7, -6.7, 601))]  # 0.01 nats a step
    falls = [0.01 * step for step in steps]
    assert falls == pytest.approx([0.7, 1.4, 2.8, 5.6], abs=0.06)


def test_a_sudden_fall_is_told_once_and_not_once_for_every_doubling() -> None:
    assert len(alarms([-0.7] * 20 + [-9.0] * 20)) == 1


def test_a_collapse_within_the_first_steps_is_seen() -> None:
    assert alarms([-0.7, -3.0, -5.0, -6.0, -7.0, -7.0, -7.0])


def test_one_odd_batch_is_no_collapse() -> None:
    assert alarms([-0.7] * 20 + [-5.0, -0.7, -4.0] + [-0.7] * 20) == []


@given(st.lists(st.floats(-0.69, 0), min_size=1, max_size=40))
def test_less_than_the_limit_is_never_told(values: list[float]) -> None:
    assert alarms(values) == []


@given(st.lists(st.floats(-8, 0), min_size=1, max_size=60), st.integers(0, 60))
def test_a_resume_changes_nothing_in_what_is_told(values: list[float], cut: int) -> None:
    rows = [row(step, value) for step, value in enumerate(values, start=1)]
    resumed = CollapseAlarm(Train(), earlier=rows[:cut])
    after = [(r["step"], text) for r in rows[cut:] if (text := resumed.see(r)) is not None]
    assert after == [(step, text) for step, text in alarms(values) if step > cut]


def test_without_a_limit_there_is_no_alarm() -> None:
    assert alarms(falling(), collapse_nats=None) == []
    assert CollapseAlarm(Train(collapse_nats=None)).see({"step": 1}) is None


def test_on_stop_the_run_ends_naming_step_and_values_and_so_does_its_resume() -> None:
    rows = [row(step, value) for step, value in enumerate(falling(), start=1)]
    alarm = CollapseAlarm(Train(on_collapse="stop"))
    seen: list[dict[str, Any]] = []

    def run(alarm: CollapseAlarm, rows: list[dict[str, Any]]) -> None:
        for r in rows:
            seen.append(r)
            alarm.see(r)

    with pytest.raises(RunError, match=r"step \d+: .* fell from -0\.69 to -1\.\d+ a token.*on_collapse"):
        run(alarm, rows)
    at = len(seen)
    assert 50 <= at <= 90
    with pytest.raises(RunError):
        run(CollapseAlarm(Train(on_collapse="stop"), earlier=rows[:at]), rows[at:])
    assert len(seen) <= at + 3


def test_a_row_without_the_log_prob_is_an_error_and_not_silence() -> None:
    with pytest.raises(KeyError, match="per_token"):
        CollapseAlarm(Train()).see({"step": 1})


# --- learning rate --------------------------------------------------------------------------------------------------


def section(method: str = "spa", **settings: Any) -> Train:
    return train_section({"method": method, **settings})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("parameters", [1e9, 8e9, 70e9])
def test_the_defaults_of_every_method_are_fine_for_models_of_the_usual_sizes(method: str, parameters: float) -> None:
    train = section(method)
    assert method_of(train).known_lr is not None
    assert check_lr(train, parameters) is None


@pytest.mark.parametrize(
    ("train", "parameters"),
    [
        (section(lr=1e-4), 1.13e6),  # the demo
        (section(lr=2e-4), 1.13e6),
        (section(method="spa_dpo", lr=2e-7), 70e9),  # Tülu 3
        (section(method="spa_dpo", lr=5e-6, lora=Lora()), 0.5e9),  # TRL's script
        (section(method="sft", lr=2e-4, lora=Lora()), 8e9),
        (section(method="spa_dpo", lr=5e-4, lora=Lora(r=64, alpha=1)), 8e9),  # MODPO's
        (section(lr=None), 8e9),
    ],
)
def test_known_recipes_are_let_alone(train: Train, parameters: float) -> None:
    assert check_lr(train, parameters) is None


@pytest.mark.parametrize(
    ("train", "parameters", "where"),
    [
        (section(lr=1e-5), 8e9, "above"),  # SimPO's README: «completely repetitive responses»
        (section(lr=1e-4), 8e9, "above"),
        (section(lr=1e-2), 1.13e6, "above"),
        (section(lr=1e-6), 1.13e6, "below"),  # the default of an 8 B model on the demo's
        (section(lr=1e-9), 8e9, "below"),
        (section(lr=1e-7, lora=Lora()), 8e9, "below"),
    ],
)
def test_a_rate_far_outside_is_told_with_the_range(train: Train, parameters: float, where: str) -> None:
    text = check_lr(train, parameters)
    assert text is not None
    assert f"is far {where}" in text
    assert "\n" not in text


@given(st.sampled_from(sorted(METHODS)), st.floats(1e5, 1e12), st.booleans())
def test_every_method_and_size_has_rates_that_are_fine_and_rates_that_are_not(
    method: str, parameters: float, lora: bool
) -> None:
    low, high = method_class(method).known_lr
    fine = math.sqrt(low * high * 8e9 / parameters) * (12 if lora else 1)
    base = section(method, lora=Lora() if lora else None)
    assert check_lr(base.model_copy(update={"lr": fine}), parameters) is None
    for far in (fine / 1000, fine * 1000):
        assert check_lr(base.model_copy(update={"lr": far}), parameters) is not None


# --- dropped pairs --------------------------------------------------------------------------------------------------


@given(st.integers(0, 1000), st.integers(0, 1000), st.integers(0, 1000))
def test_more_than_a_tenth_too_long_is_told_and_no_other_reason(too_long: int, others: int, trained: int) -> None:
    text = check_dropped({"too_long": too_long, "identical": others}, trained, max_length=512)
    assert (text is not None) == (10 * too_long > too_long + others + trained)


def test_the_length_to_raise_is_named() -> None:
    text = check_dropped({"too_long": 20, "identical": 5}, 75, max_length=512)
    assert text is not None
    assert text.startswith("20 of 100 pairs (20%) are longer than train.max_length 512")
