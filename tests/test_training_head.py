"""The LM head by chunks: the same log-probs and gradients as all logits at once, with a bounded number of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spa_ray.training.head import LogitTransform, head_logps

TOKENS, WIDTH, VOCAB = 37, 24, 151
TRANSFORMS = [LogitTransform(), LogitTransform(scale=0.25), LogitTransform(scale=3.0, softcap=2.0)]


def inputs(dtype: torch.dtype, *, bias: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCAB, WIDTH, dtype=dtype, requires_grad=True)
    offset = torch.randn(VOCAB, dtype=dtype, requires_grad=True) if bias else None
    return hidden, weight, offset, torch.randint(VOCAB, (TOKENS,))


def written_out(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, t: LogitTransform) -> Tensor:
    z = (hidden @ weight.t() + (0 if bias is None else bias)) * t.scale
    z = z if t.softcap is None else t.softcap * torch.tanh(z / t.softcap)
    return torch.log_softmax(z, dim=-1).gather(1, targets[:, None])[:, 0]


def gradients(logps: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    upstream = torch.linspace(-1, 2, len(logps), dtype=logps.dtype)
    return list(torch.autograd.grad((logps * upstream).sum(), leaves))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("rows", [1, 5, 36, 37, 1000])
@pytest.mark.parametrize("bias", [False, True])
def test_any_chunk_size_gives_the_written_out_log_softmax_and_its_gradients(
    transform: LogitTransform, rows: int, bias: bool
) -> None:
    hidden, weight, offset, targets = inputs(torch.float64, bias=bias)
    leaves = [leaf for leaf in (hidden, weight, offset) if leaf is not None]
    ours = head_logps(hidden, weight, offset, targets, logits_budget=rows * VOCAB, transform=transform)
    truth = written_out(hidden, weight, offset, targets, transform)
    torch.testing.assert_close(ours, truth, rtol=0, atol=1e-12)
    for mine, true in zip(gradients(ours, leaves), gradients(truth, leaves), strict=True):
        torch.testing.assert_close(mine, true, rtol=0, atol=1e-12)


def test_a_budget_below_one_row_still_takes_whole_rows() -> None:
    hidden, weight, _, targets = inputs(torch.float64, bias=False)
    ours = head_logps(hidden, weight, None, targets, logits_budget=1)
    torch.testing.assert_close(ours, written_out(hidden, weight, None, targets, LogitTransform()))


def test_a_frozen_head_gets_no_gradient_and_passes_one_on() -> None:
    hidden, weight, _, targets = inputs(torch.float32, bias=False)
    weight.requires_grad_(False)
    head_logps(hidden, weight, None, targets, logits_budget=VOCAB).sum().backward()
    assert weight.grad is None
    assert hidden.grad is not None
    assert hidden.grad.abs().sum() > 0


@pytest.mark.parametrize("rows", [4, 1000])
def test_bfloat16_states_give_float32_log_probs_near_the_exact_ones(rows: int) -> None:
    hidden, weight, _, targets = inputs(torch.bfloat16, bias=False)
    ours = head_logps(hidden, weight, None, targets, logits_budget=rows * VOCAB)
    assert ours.dtype == torch.float32
    truth = written_out(hidden.double(), weight.double(), None, targets, LogitTransform())
    torch.testing.assert_close(ours.double(), truth, rtol=0, atol=0.1)
    assert gradients(ours, [weight])[0].dtype == torch.bfloat16


def test_no_chunk_holds_more_logits_than_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    from spa_ray.training import head

    rows = []
    product = head.product

    def counted(x: Tensor, w: Tensor) -> Tensor:
        out = product(x, w)
        if out.shape[1] == VOCAB:
            rows.append(len(out))
        return out

    monkeypatch.setattr(head, "product", counted)
    hidden, weight, _, targets = inputs(torch.float32, bias=False)
    logps = head_logps(hidden, weight, None, targets, logits_budget=7 * VOCAB)
    logps.sum().backward()
    assert rows == 2 * [7, 7, 7, 7, 7, 2]  # every chunk once forward and once more backward


def test_logits_within_the_budget_are_computed_once_and_again_for_a_second_backward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from spa_ray.training import head

    calls = []
    logits = head._logits
    monkeypatch.setattr(head, "_logits", lambda *a: calls.append(1) or logits(*a))
    hidden, weight, _, targets = inputs(torch.float64, bias=False)
    logps = head_logps(hidden, weight, None, targets, logits_budget=TOKENS * VOCAB).sum()
    first = torch.autograd.grad(logps, [hidden, weight], retain_graph=True)
    assert len(calls) == 1
    for again, before in zip(torch.autograd.grad(logps, [hidden, weight]), first, strict=True):
        torch.testing.assert_close(again, before, rtol=0, atol=1e-12)
    assert len(calls) == 2


def test_what_a_model_does_to_its_logits_is_read_off_its_config() -> None:
    from transformers import CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig

    assert LogitTransform.of(LlamaConfig()) == LogitTransform()
    assert LogitTransform.of(CohereConfig(logit_scale=0.0625)) == LogitTransform(scale=0.0625)
    assert LogitTransform.of(GraniteConfig(logits_scaling=8.0)) == LogitTransform(scale=0.125)
    assert LogitTransform.of(Gemma2Config(final_logit_softcapping=30.0)) == LogitTransform(softcap=30.0)
