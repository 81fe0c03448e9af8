"""What docs/THEORY.md claims, executed: each statement of the page is one test here, under the statement's number."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from spa_ray.preferences import build_pairs, denoise
from spa_ray.training.losses import pair_weights, simpo_loss
from tests.preferences_tables import Scores, make_config, make_episodes, make_row

PAGE = (Path(__file__).parents[1] / "docs" / "THEORY.md").read_text(encoding="utf-8")
SCALE = range(1, 11)
OFF = {"denoise__consistency": "off", "denoise__informativeness": False}


def pairs_of(candidates: list[Scores], **settings: object) -> list[dict[str, object]]:
    """The pairs among these candidates of one prompt, whatever the filters would say."""
    config = make_config(**{**OFF, "sampling__n": 6, **settings})
    more: list[Scores] = [(1.0, 1.0)] * 3  # fewer than three scored candidates are no prompt
    table = denoise(make_episodes([make_row([*candidates, *more], (1.0, 1.0))], config), config, tau=None)
    found = build_pairs(table, config).to_pylist()
    return [row for row in found if row["chosen_index"] < len(candidates) > row["rejected_index"]]


def order_of(candidates: list[Scores], **settings: object) -> set[tuple[int, int]]:
    return {(int(row["chosen_index"]), int(row["rejected_index"])) for row in pairs_of(candidates, **settings)}  # type: ignore[call-overload]


SCORES = st.lists(st.tuples(st.sampled_from(SCALE), st.sampled_from(SCALE)), min_size=3, max_size=6, unique=True)


@given(SCORES)
def test_1_the_pairs_of_a_prompt_have_no_cycle_and_one_ranking_fulfils_them_all(scores: list[tuple[int, int]]) -> None:
    found = order_of([list(map(float, s)) for s in scores], pairs__delta=1)
    rank = {i: sorted(scores).index(s) for i, s in enumerate(scores)}
    assert all(rank[i] > rank[j] for i, j in found)
    assert len(found) == len(scores) * (len(scores) - 1) // 2


@given(SCORES, st.sampled_from([1, 2, 3, 6]))
def test_2_no_pair_prefers_a_lower_first_objective(scores: list[tuple[int, int]], delta: int) -> None:
    for i, j in order_of([list(map(float, s)) for s in scores], pairs__delta=delta):
        assert scores[i][0] >= scores[j][0]


def test_2_one_point_of_the_first_objective_outweighs_nine_of_the_second() -> None:
    (pair,) = pairs_of([[6.0, 1.0], [5.0, 10.0]])
    assert pair["chosen_scores"] == [6.0, 1.0]
    assert pair["rejected_scores"] == [5.0, 10.0]


def test_3_a_weighted_sum_is_the_lexicographic_order_from_the_scales_width_on_and_not_before() -> None:
    answers = list(itertools.product(SCALE, SCALE))
    both = list(itertools.product(answers, answers))

    def wrong(weight: float) -> int:
        """Pairs that the sum puts in another order, or finds equal."""
        return sum((a > b) != (weight * a[0] + a[1] > weight * b[0] + b[1]) for a, b in both)

    width = max(SCALE) - min(SCALE)
    assert wrong(width + 0.01) == 0
    assert wrong(width) > 0  # (2, 1) and (1, 10) are equal
    assert wrong(5) > wrong(width) > 0


def test_4_ties_within_a_tolerance_make_cycles_and_rounding_to_a_grid_does_not() -> None:
    answers = [(5.0, 3.0), (5.4, 2.0), (5.8, 1.0)]

    def tolerant(a: tuple[float, float], b: tuple[float, float], eps: float = 0.5) -> bool:
        return a[1] > b[1] if abs(a[0] - b[0]) < eps else a[0] > b[0]

    x, y, z = answers
    assert tolerant(x, y)
    assert tolerant(y, z)
    assert tolerant(z, x)
    found = order_of([list(a) for a in answers], pairs__score_grid=0.5, pairs__delta=0.5)
    assert found == {(1, 0), (2, 0), (2, 1)}  # 5.0 < 5.5 < 6.0


def test_5_above_a_threshold_an_answer_may_be_preferred_that_is_lower_on_the_first_objective() -> None:
    assert order_of([[10.0, 3.0], [8.0, 9.0]]) == {(0, 1)}
    assert order_of([[10.0, 3.0], [8.0, 9.0]], pairs__thresholds={"harmless": 8}) == {(1, 0)}
    assert order_of([[8.0, 1.0], [7.0, 9.0]], pairs__thresholds={"harmless": 8}) == {(0, 1)}  # never below it


def test_6_the_weight_of_a_pair_does_not_follow_its_priority() -> None:
    trade, dead, gain = pairs_of([[6.0, 2.0], [5.0, 7.0]]) + pairs_of([[7.0, 3.0], [5.0, 5.0]]) + pairs_of(
        [[6.0, 4.0], [5.0, 2.0]]
    )  # fmt: skip
    gaps = [pair["gap"] for pair in (trade, dead, gain)]
    assert gaps == [4.0, 0.0, 3.0]  # (+1, -5), (+2, -2), (+1, +2)
    weights = pair_weights(np.array(gaps), alpha=1.0)
    assert weights[0] > weights[2] > weights[1] == 0
    l1 = [pair["margin"] for pair in (trade, dead, gain)]
    assert (pair_weights(np.array(l1), alpha=1.0) > 0).all()
    assert dead["margin"] > gain["margin"]


@given(st.lists(st.floats(0, 20), min_size=2, max_size=20).filter(lambda gaps: sum(gaps) > 1), st.floats(0, 3))
def test_7_the_mean_weight_is_one_at_alpha_one_alone(gaps: list[float], alpha: float) -> None:
    gap = np.array(gaps)
    assert pair_weights(gap, alpha=1.0).mean() == pytest.approx(1)
    mean = pair_weights(gap, alpha=alpha).mean()
    assert mean >= 1 - 1e-9 if alpha >= 1 or alpha == 0 else mean <= 1 + 1e-9  # Jensen


def test_8_a_steps_mean_gap_moves_the_expected_loss_and_an_epochs_does_not() -> None:
    """Two pairs of gap 1 and 9 and losses 0 and 1, in steps of one: every pair weighs the same, whatever its gap."""
    gap, loss = np.array([1.0, 9.0]), np.array([0.0, 1.0])
    whole = (pair_weights(gap, alpha=1.0) * loss).mean()
    by_step = np.mean([(pair_weights(gap[[i]], alpha=1.0) * loss[[i]]).mean() for i in range(2)])
    by_epoch = np.mean(
        [(pair_weights(gap[[i]], alpha=1.0, mean_gap=float(gap.mean())) * loss[[i]]).mean() for i in range(2)]
    )
    assert (whole, by_step, by_epoch) == pytest.approx((0.9, 0.5, 0.9))


def test_9_a_refined_answer_that_passes_is_overrated() -> None:
    """Judges' noise alone: every answer has the same true scores, and a fifth of the prompts passes."""
    rng = np.random.default_rng(0)
    truth, n = 5.5, 5
    noisy = np.clip(np.rint(truth + rng.normal(0, 1.5, size=(4000, n + 1, 2))), 1, 10)
    config = make_config(denoise__informativeness=False)
    rows = [make_row(p[:n].tolist(), p[n].tolist(), prompt_id=f"p{i:04d}") for i, p in enumerate(noisy)]
    table = denoise(make_episodes(rows, config), config, tau=None)
    kept = np.array(table["kept"].to_pylist())
    assert 0.01 < kept.mean() < 0.1
    assert (noisy[kept, n].mean(axis=0) > truth + 1.5).all()
    assert noisy[:, n].mean() == pytest.approx(truth, abs=0.05)


def test_10_det_drops_the_prompts_whose_order_is_beyond_doubt() -> None:
    config = make_config(denoise__consistency="off")
    clear = [[1.0, 1.0], [3.0, 3.0], [5.0, 5.0], [7.0, 7.0], [9.0, 9.0]]
    vague = [[5.0, 5.0], [6.0, 5.0], [5.0, 6.0], [6.0, 6.0], [5.0, 5.0]]
    rows = [make_row(s, [10.0, 10.0], prompt_id=str(i)) for i, s in enumerate((clear, vague))]
    found = denoise(make_episodes(rows, config), config, tau=None).to_pylist()
    assert [row["drop_reason"] for row in found] == ["zero_det", None]
    spread = [np.ptp(np.array(s), axis=0).sum() for s in (clear, vague)]
    assert spread[0] > spread[1]


def policy(logits: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Log-probs of a policy over answers that share parameters: log softmax of features @ logits."""
    return F.log_softmax(features @ logits, dim=0)


def descend(features: torch.Tensor, chosen: int, rejected: int, steps: int = 200, lr: float = 0.5) -> torch.Tensor:
    """Probabilities after training on one pair by SimPO's loss, from a uniform policy."""
    logits = torch.zeros(features.shape[1], dtype=torch.float64, requires_grad=True)
    for _ in range(steps):
        logps = policy(logits, features)
        loss = simpo_loss(logps[[chosen]], logps[[rejected]], beta=2.5, gamma=1.375).sum()
        (gradient,) = torch.autograd.grad(loss, logits)
        with torch.no_grad():
            logits -= lr * gradient
    return policy(logits, features).exp().detach()


def test_11_a_right_pair_can_raise_an_answer_that_is_worse_than_both() -> None:
    """Answers 0 and 1 are safe and share most of what they are; 2, unsafe, has more of what tells 0 from 1."""
    features = torch.tensor([[1.0, 0.2], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    after = descend(features, chosen=0, rejected=1)
    assert after[0] > after[1]
    assert after[2] > 1 / 3 > after[0]  # the chosen answer itself has become less likely


def test_12_separable_pairs_have_no_last_step() -> None:
    """Without a reference or an anchor the loss falls for ever: a margin of any size is passed by more training."""
    features = torch.eye(2, dtype=torch.float64)
    margins = [float((p := descend(features, 0, 1, steps=n)).log()[0] - p.log()[1]) for n in (100, 1_000, 10_000)]
    assert margins[0] < margins[1] < margins[2]
    assert margins[2] - margins[1] > 0.5


def test_the_page_states_what_is_tested_here() -> None:
    stated = {int(n) for n in re.findall(r"^## (\d+)\.", PAGE, flags=re.M)}
    tested = {int(n) for name in globals() for n in re.findall(r"^test_(\d+)_", name)}
    assert stated == tested
