"""The losses against arithmetic written out by hand in float64, and against TRL's."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spa_ray.training.losses import dpo_loss, pair_weights, sequence_logps, sft_loss, simpo_loss

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
    chosen, rejected, *_ = columns(rows)
    losses = simpo_loss(chosen, rejected, beta=beta, gamma=gamma, weights=torch.full_like(chosen, weight))
    written_out = [-weight * log_sigmoid(beta * c - beta * r - gamma) for c, r, *_ in rows]
    assert losses.tolist() == pytest.approx(written_out, rel=1e-12, abs=1e-12)


@given(LOGPS, st.floats(0.01, 5))
def test_dpo_is_the_written_out_formula(rows: list[tuple[float, ...]], beta: float) -> None:
    losses = dpo_loss(*columns(rows), beta=beta)
    written_out = [-log_sigmoid(beta * ((c - rc) - (r - rr))) for c, r, rc, rr in rows]
    assert losses.tolist() == pytest.approx(written_out, rel=1e-12, abs=1e-12)


def test_sft_is_the_mean_over_each_sequences_tokens() -> None:
    losses = sft_loss(torch.tensor([-6.0, -1.0]), torch.tensor([3, 4]), weights=torch.tensor([1.0, 2.0]))
    assert losses.tolist() == pytest.approx([2.0, 0.5])


def test_simpo_and_its_gradients_are_trls() -> None:
    cpo = pytest.importorskip("trl.experimental.cpo").CPOTrainer
    generator = torch.Generator().manual_seed(0)
    logps = [-8 * torch.rand(64, generator=generator, dtype=torch.float64) for _ in range(2)]
    ours = [x.clone().requires_grad_() for x in logps]
    theirs = [x.clone().requires_grad_() for x in logps]
    trainer = SimpleNamespace(
        alpha=0.0,
        beta=2.5,
        simpo_gamma=1.375,
        loss_type="simpo",
        label_smoothing=0.0,
        accelerator=SimpleNamespace(device="cpu"),
    )
    simpo = simpo_loss(*ours, beta=2.5, gamma=1.375)
    reference, *_ = cpo.cpo_loss(trainer, *theirs)
    torch.testing.assert_close(simpo, reference, rtol=0, atol=1e-12)
    simpo.mean().backward()
    reference.mean().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-12)


def test_no_gradient_flows_into_a_weight_or_the_reference() -> None:
    chosen, rejected, reference, weights = (torch.tensor([v], requires_grad=True) for v in (-1.0, -2.0, -1.5, 2.0))
    simpo_loss(chosen, rejected, beta=1.0, gamma=0.0, weights=weights).sum().backward()
    dpo_loss(chosen, rejected, reference, reference, beta=1.0, weights=weights).sum().backward()
    assert weights.grad is None
    assert reference.grad is None
    assert chosen.grad is not None


def test_bfloat16_log_probs_are_computed_in_float32() -> None:
    logps = torch.tensor([-1.0], dtype=torch.bfloat16)
    assert simpo_loss(logps, 2 * logps, beta=2.0, gamma=0.5).dtype == torch.float32


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_log_prob_or_weight_raises(bad: float) -> None:
    fine, wrong = torch.zeros(2), torch.tensor([0.0, bad])
    for pair in ((wrong, fine), (fine, wrong)):
        with pytest.raises(ValueError, match="not finite"):
            simpo_loss(*pair, beta=1.0, gamma=0.0)
    with pytest.raises(ValueError, match="not finite"):
        simpo_loss(fine, fine, beta=1.0, gamma=0.0, weights=wrong)


def test_a_weight_a_token_cannot_slip_in_by_broadcasting() -> None:
    with pytest.raises(ValueError, match="one number a pair"):
        simpo_loss(torch.zeros(2), torch.zeros(2), beta=1.0, gamma=0.0, weights=torch.ones(2, 2))
    with pytest.raises(ValueError, match="one number a pair"):
        simpo_loss(torch.zeros(2, 3), torch.zeros(2, 3), beta=1.0, gamma=0.0)


@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan")])
def test_beta_must_be_positive(beta: float) -> None:
    with pytest.raises(ValueError, match="beta"):
        simpo_loss(torch.zeros(1), torch.zeros(1), beta=beta, gamma=0.0)


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
