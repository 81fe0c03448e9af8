"""The losses against arithmetic written out by hand in float64, and against TRL's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spa_ray.config.plugs import METHODS
from spa_ray.config.training import method_class, train_section
from spa_ray.training.losses import (
    dpo_loss,
    gamma_from_ratio,
    ipo_loss,
    log_odds_ratio,
    orpo_loss,
    pair_weights,
    sequence_logps,
    sft_loss,
    simpo_loss,
)
from spa_ray.training.method import LossInputs, Method, method_of

LOGPS = st.lists(st.tuples(*[st.floats(-40, 0)] * 4), min_size=1, max_size=6)
GAPS = st.lists(st.floats(0, 20).map(lambda g: round(g, 3)), min_size=1, max_size=40)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def columns(rows: list[tuple[float, ...]]) -> list[torch.Tensor]:
    return [torch.tensor(c, dtype=torch.float64) for c in zip(*rows, strict=True)]


@given(LOGPS, st.floats(0.1, 10), st.floats(-2, 3), st.floats(0, 5))
def test_simpo_is_the_written_out_formula(
    rows: list[tuple[float, ...]], beta: float, gamma: float, weight: float
) -> None:
    chosen, rejected, *_ = (x.requires_grad_() for x in columns(rows))
    losses = simpo_loss(chosen, rejected, beta=beta, gamma=gamma, weights=torch.full_like(chosen, weight))
    losses.sum().backward()
    at = [beta * c - beta * r - gamma for c, r, *_ in rows]
    slopes = [-weight * beta * math.exp(log_sigmoid(-z)) for z in at]
    assert losses.tolist() == pytest.approx([-weight * log_sigmoid(z) for z in at], rel=1e-12, abs=1e-12)
    assert chosen.grad.tolist() == pytest.approx(slopes, rel=1e-9, abs=1e-12)
    assert rejected.grad.tolist() == pytest.approx([-s for s in slopes], rel=1e-9, abs=1e-12)


@given(LOGPS, st.floats(0.01, 5))
def test_dpo_is_the_written_out_formula(rows: list[tuple[float, ...]], beta: float) -> None:
    losses = dpo_loss(*columns(rows), beta=beta)
    written_out = [-log_sigmoid(beta * ((c - rc) - (r - rr))) for c, r, rc, rr in rows]
    assert losses.tolist() == pytest.approx(written_out, rel=1e-12, abs=1e-12)


@given(LOGPS, st.floats(0.01, 5), st.floats(0, 5))
def test_ipo_is_the_written_out_formula(rows: list[tuple[float, ...]], beta: float, weight: float) -> None:
    weights = torch.full((len(rows),), weight, dtype=torch.float64)
    losses = ipo_loss(*columns(rows), beta=beta, weights=weights)
    written_out = [weight * ((c - rc) - (r - rr) - 0.5 / beta) ** 2 for c, r, rc, rr in rows]
    assert losses.tolist() == pytest.approx(written_out, rel=1e-9, abs=1e-9)


def test_ipo_is_least_where_the_margin_is_half_of_one_over_beta() -> None:
    losses = ipo_loss(torch.tensor([0.0, 5.0, 10.0]) - 20, *[torch.full((3,), -20.0)] * 3, beta=0.1)
    assert losses.tolist() == pytest.approx([25.0, 0.0, 25.0])


@given(st.lists(st.tuples(*[st.floats(-40, -1e-12)] * 2), min_size=1, max_size=6), st.floats(0.01, 5), st.floats(0, 5))
def test_orpo_and_its_gradients_are_the_written_out_formula(
    rows: list[tuple[float, float]], beta: float, weight: float
) -> None:
    chosen, rejected = (x.requires_grad_() for x in columns(rows))
    losses = orpo_loss(chosen, rejected, beta=beta, weights=torch.full_like(chosen, weight))
    losses.sum().backward()

    def log_odds(logp: float) -> float:
        return logp - math.log(-math.expm1(logp))

    ratios = [log_odds(c) - log_odds(r) for c, r in rows]
    slopes = [beta * math.exp(log_sigmoid(-ratio)) for ratio in ratios]  # of -β log σ, by minus the ratio
    one_minus_p = [(-math.expm1(c), -math.expm1(r)) for c, r in rows]
    written_out = [weight * (-c - beta * log_sigmoid(ratio)) for (c, _), ratio in zip(rows, ratios, strict=True)]
    by_chosen = [weight * (-1 - s / q) for s, (q, _) in zip(slopes, one_minus_p, strict=True)]
    by_rejected = [weight * s / q for s, (_, q) in zip(slopes, one_minus_p, strict=True)]
    assert losses.tolist() == pytest.approx(written_out, rel=1e-9, abs=1e-9)
    assert chosen.grad.tolist() == pytest.approx(by_chosen, rel=1e-6, abs=1e-9)
    assert rejected.grad.tolist() == pytest.approx(by_rejected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orpo_is_finite_with_finite_gradients_where_a_response_is_certain(dtype: torch.dtype) -> None:
    edge = [0.0, -1e-30, -1e-12, -1e-7, -1e-3, -50.0, -1e4, 1e-6]  # the last by rounding
    grid = torch.cartesian_prod(torch.tensor(edge, dtype=dtype), torch.tensor(edge, dtype=dtype))
    chosen, rejected = (x.clone().requires_grad_() for x in grid.unbind(dim=1))
    losses = orpo_loss(chosen, rejected, beta=1.0)
    losses.sum().backward()
    assert all(torch.isfinite(x).all() for x in (losses, chosen.grad, rejected.grad))
    assert log_odds_ratio(chosen[:1], rejected[:1]).item() == 0  # both certain: even odds


def test_a_log_prob_above_zero_has_no_odds() -> None:
    with pytest.raises(ValueError, match="0 or less"):
        orpo_loss(torch.tensor([-1.0]), torch.tensor([1.0]), beta=0.1)


@given(LOGPS, st.floats(0.1, 10), st.floats(0, 2))
def test_a_gamma_from_a_ratio_gives_simpos_own_formula(
    rows: list[tuple[float, ...]], beta: float, ratio: float
) -> None:
    chosen, rejected, *_ = columns(rows)
    losses = simpo_loss(chosen, rejected, beta=beta, gamma=gamma_from_ratio(ratio, beta=beta))
    simpos = [-log_sigmoid(beta * (c - r - ratio)) for c, r, *_ in rows]
    assert losses.tolist() == pytest.approx(simpos, rel=1e-9, abs=1e-9)


def test_simpos_llama_3_ratio_is_our_default_gamma() -> None:
    assert gamma_from_ratio(0.55, beta=2.5) == pytest.approx(train_section({"method": "spa_simpo"}).gamma)


@pytest.mark.parametrize(("ratio", "beta"), [(0.5, 0.0), (0.5, -1.0), (math.nan, 1.0), (math.inf, 1.0)])
def test_an_impossible_ratio_or_beta_gives_no_gamma(ratio: float, beta: float) -> None:
    with pytest.raises(ValueError, match="beta"):
        gamma_from_ratio(ratio, beta=beta)


PLAIN = [name for name in METHODS if not method_class(name).leaves_more_than_a_model()]


def the_method(name: str, **settings: Any) -> Method[Any]:
    return method_of(train_section({"method": name, **settings}))


@pytest.mark.parametrize("name", PLAIN)
def test_a_method_gives_one_loss_a_pair_and_the_statistics_that_it_declares(name: str) -> None:
    method = the_method(name)
    summed, counts = torch.tensor([-3.0, -8.0, -5.0, -6.0]), torch.tensor([2, 4, 5, 3])
    sides = torch.tensor([[0, 1], [2, 1], [3, 0]])[:, : len(method.sides)]
    reference = torch.tensor([-4.0, -7.0, -5.0, -5.5]) if method.needs_reference else None
    inputs = LossInputs(summed, counts, sides, torch.ones(3), reference)
    losses, stats = method.loss(inputs)
    assert losses.shape == (3,)
    assert set(stats) == set(method.stats)
    assert all(value.shape == (3,) and not value.requires_grad for value in stats.values())


def test_ipo_sees_log_ratios_a_token() -> None:
    summed, counts = torch.tensor([-4.0, -9.0]), torch.tensor([2, 3])
    inputs = LossInputs(summed, counts, torch.tensor([[0, 1]]), torch.ones(1), torch.tensor([-6.0, -6.0]))
    losses, stats = the_method("ipo", beta=0.5).loss(inputs)
    assert losses.item() == pytest.approx(((-4 + 6) / 2 - (-9 + 6) / 3 - 1) ** 2)
    assert stats["rewards/margins"].item() == pytest.approx(0.5 * 2)


def test_orpos_own_statistics_are_named_as_trl_names_them() -> None:
    inputs = LossInputs(torch.tensor([-1.0, -2.0]), torch.tensor([2, 2]), torch.tensor([[0, 1]]), torch.ones(1))
    losses, stats = the_method("orpo", beta=0.1).loss(inputs)
    log_odds = math.log(math.exp(-0.5) / (1 - math.exp(-0.5))) - math.log(math.exp(-1) / (1 - math.exp(-1)))
    assert stats["nll_loss"].item() == pytest.approx(0.5)
    assert stats["log_odds_chosen"].item() == pytest.approx(log_odds)
    assert stats["log_odds_ratio"].item() == pytest.approx(log_sigmoid(log_odds))
    assert losses.item() == pytest.approx((stats["nll_loss"] - 0.1 * stats["log_odds_ratio"]).item())


def test_sft_is_the_mean_over_each_sequences_tokens() -> None:
    losses = sft_loss(torch.tensor([-6.0, -1.0]), torch.tensor([3, 4]), weights=torch.tensor([1.0, 2.0]))
    assert losses.tolist() == pytest.approx([2.0, 0.5])


def test_no_gradient_flows_into_a_weight_or_the_reference() -> None:
    chosen, rejected, reference, weights = (torch.tensor([v], requires_grad=True) for v in (-1.0, -2.0, -1.5, 2.0))
    simpo_loss(chosen, rejected, beta=1.0, gamma=0.0, weights=weights).sum().backward()
    for loss in (dpo_loss, ipo_loss):
        loss(chosen, rejected, reference, reference, beta=1.0, weights=weights).sum().backward()
    orpo_loss(chosen, rejected, beta=1.0, weights=weights).sum().backward()
    assert weights.grad is None
    assert reference.grad is None
    assert chosen.grad is not None


Loss = Callable[..., torch.Tensor]
LOSSES: list[tuple[Loss, int]] = [
    (lambda *logps, **kw: simpo_loss(*logps, gamma=0.0, **kw), 2),
    (dpo_loss, 4),
    (ipo_loss, 4),
    (orpo_loss, 2),
]
LOSS_NAMES = ["simpo", "dpo", "ipo", "orpo"]


@pytest.mark.parametrize(("loss", "arguments"), LOSSES, ids=LOSS_NAMES)
def test_bfloat16_log_probs_are_computed_in_float32(loss: Loss, arguments: int) -> None:
    logps = torch.tensor([-1.0], dtype=torch.bfloat16)
    assert loss(*[logps] * arguments, beta=2.0).dtype == torch.float32


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("loss", "arguments"), LOSSES, ids=LOSS_NAMES)
def test_a_non_finite_log_prob_or_weight_raises(loss: Loss, arguments: int, bad: float) -> None:
    fine, wrong = torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, bad])
    for i in range(arguments):
        logps = [wrong if j == i else fine for j in range(arguments)]
        with pytest.raises(ValueError, match="not finite"):
            loss(*logps, beta=1.0)
    with pytest.raises(ValueError, match="weights is not finite"):
        loss(*[fine] * arguments, beta=1.0, weights=wrong)


@pytest.mark.parametrize(("loss", "arguments"), LOSSES, ids=LOSS_NAMES)
def test_a_weight_a_token_cannot_slip_in_by_broadcasting(loss: Loss, arguments: int) -> None:
    with pytest.raises(ValueError, match="one number a pair"):
        loss(*[-torch.ones(2)] * arguments, beta=1.0, weights=torch.ones(2, 2))
    with pytest.raises(ValueError, match="one number a pair"):
        loss(*[-torch.ones(2, 3)] * arguments, beta=1.0)


@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan")])
@pytest.mark.parametrize(("loss", "arguments"), LOSSES, ids=LOSS_NAMES)
def test_beta_must_be_positive(loss: Loss, arguments: int, beta: float) -> None:
    with pytest.raises(ValueError, match="beta"):
        loss(*[-torch.ones(1)] * arguments, beta=beta)


@given(GAPS)
def test_at_alpha_one_the_mean_weight_is_one(gaps: list[float]) -> None:
    assert pair_weights(np.array(gaps), alpha=1.0).mean() == pytest.approx(1.0)


@given(GAPS, st.floats(0, 3))
def test_a_weight_is_the_gap_over_the_mean_to_the_power_alpha(gaps: list[float], alpha: float) -> None:
    mean = sum(gaps) / len(gaps)
    expected = [1.0 if mean == 0 else (g / mean) ** alpha for g in gaps]
    assert pair_weights(np.array(gaps), alpha=alpha).tolist() == pytest.approx(expected)


@given(GAPS)
def test_alpha_zero_and_a_mean_of_zero_give_ones(gaps: list[float]) -> None:
    assert (pair_weights(np.array(gaps), alpha=0.0) == 1).all()
    assert (pair_weights(np.zeros(len(gaps)), alpha=1.0) == 1).all()
    assert (pair_weights(np.array(gaps), alpha=1.0, mean_gap=0.0) == 1).all()


def test_weights_come_back_as_the_kind_they_were_given_as() -> None:
    weights = pair_weights(torch.tensor([1.0, 3.0], requires_grad=True), alpha=1.0, mean_gap=4.0)
    assert weights.tolist() == [0.25, 0.75]
    assert not weights.requires_grad
    assert isinstance(pair_weights(np.array([1, 3]), alpha=0.5), np.ndarray)


@pytest.mark.parametrize(
    ("gap", "alpha", "mean"),
    [([-1.0], 1.0, None), ([float("nan")], 1.0, None), ([], 1.0, None), ([1.0], -1.0, None), ([1.0], 1.0, -1.0)],
)
def test_weights_of_impossible_gaps_raise(gap: list[float], alpha: float, mean: float | None) -> None:
    with pytest.raises(ValueError, match=r"gap|alpha"):
        pair_weights(np.array(gap), alpha=alpha, mean_gap=mean)


def test_sequence_log_probs_shift_by_one_and_skip_the_ignored() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    labels = torch.tensor([[-100, -100, 3, 4, -100], [0, 1, 2, 3, 6]])
    summed, counts = sequence_logps(logits, labels, average=False)
    logp = torch.log_softmax(logits, dim=-1)
    assert counts.tolist() == [2, 4]
    assert summed[0].item() == pytest.approx((logp[0, 1, 3] + logp[0, 2, 4]).item())
    assert summed[1].item() == pytest.approx(sum(logp[1, t, t + 1].item() for t in range(3)) + logp[1, 3, 6].item())
    averaged, _ = sequence_logps(logits, labels, average=True)
    torch.testing.assert_close(averaged, summed / counts)


def test_a_sequence_without_a_label_raises() -> None:
    labels = torch.tensor([[1, 2, 3], [4, -100, -100]])  # a label at position 0 has nothing before it
    with pytest.raises(ValueError, match="empty sequence"):
        sequence_logps(torch.zeros(2, 3, 5), labels, average=True)
