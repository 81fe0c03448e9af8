"""oneDNN's linear layers compute what torch's do, and are taken where they are much faster."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from spa_ray.training import linear
from spa_ray.training.linear import use_fast_linear


@pytest.fixture(autouse=True)
def onednn_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "onednn_pays", lambda: True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 12), (2, 5, 12)])
def test_outputs_and_gradients_are_torchs(bias: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Linear(12, 9, bias=bias), nn.Tanh(), nn.Linear(9, 4, bias=bias))
    ours = copy.deepcopy(theirs)
    use_fast_linear(ours)
    x = [torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)]
    outs = [m(v) for m, v in zip((ours, theirs), x, strict=True)]
    for out in outs:
        (out**2).sum().backward()
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(x[0].grad, x[1].grad, rtol=0, atol=1e-5)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-5)


def test_a_frozen_weight_gets_no_gradient_and_passes_one_on() -> None:
    layer = nn.Linear(4, 3).requires_grad_(False)
    use_fast_linear(layer)
    x = torch.randn(2, 4, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(x.grad, layer.weight.sum(dim=0).expand(2, 4))


def test_bfloat16_layers_are_left_alone() -> None:
    layer = nn.Linear(4, 3).bfloat16()
    use_fast_linear(layer)
    assert "forward" not in vars(layer)


@pytest.mark.parametrize(("onednn", "pays"), [(0.0014, False), (0.0005, True)])
def test_onednn_must_be_far_ahead(monkeypatch: pytest.MonkeyPatch, onednn: float, pays: bool) -> None:
    monkeypatch.undo()
    seconds = iter([0.0015, onednn] * linear.REPEATS)
    monkeypatch.setattr(linear, "_seconds", lambda *product: next(seconds))
    assert linear.onednn_pays.__wrapped__() is pays


def test_where_torch_is_as_fast_its_layers_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "onednn_pays", lambda: False)
    layer = nn.Linear(4, 3)
    use_fast_linear(layer)
    assert "forward" not in vars(layer)
