"""Models with two sets of rotary factors: training takes the one that generation takes, whatever is in the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spa_ray.training.forward import ResponseLogps
from spa_ray.training.rope import long_factors, pin_rope
from tests.test_training_packing import VOCAB, packed_policy, rows, tiny

ORIGINAL = 16  # the rows' sequences are 5 to 33 tokens long
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 2.0, 2.5, 3.0],
    "original_max_position_embeddings": ORIGINAL,
}


def phi(context: int | None = None, *, pinned: bool = True) -> Any:
    model = tiny(
        "Phi3", original_max_position_embeddings=ORIGINAL, max_position_embeddings=64, rope_parameters=LONGROPE
    )
    if pinned:
        pin_rope(model, context)
    return model


def alone(model: Any) -> torch.Tensor:
    policy = ResponseLogps(model)
    with torch.no_grad():
        return torch.cat([policy(policy.collate([row], "cpu"))[0] for row in rows()])


@pytest.mark.parametrize("context", [None, ORIGINAL, 64])
def test_a_sequences_log_probs_do_not_depend_on_the_lengths_beside_it(context: int | None) -> None:
    policy = packed_policy(phi(context), 5 * VOCAB)
    together = policy(policy.collate(rows(), "cpu"))[0]
    torch.testing.assert_close(together, alone(phi(context)), rtol=0, atol=1e-6)


def test_left_to_transformers_they_would() -> None:
    policy = packed_policy(phi(pinned=False), 5 * VOCAB)
    together = policy(policy.collate(rows(), "cpu"))[0]
    assert (together - alone(phi(pinned=False))).abs().max() > 0.1


def test_the_long_factors_are_those_of_a_context_beyond_the_original_one() -> None:
    config = phi(pinned=False).config
    assert [long_factors(config, context) for context in (None, ORIGINAL, ORIGINAL + 1)] == [False, False, True]
    assert long_factors(tiny("Llama").config, 64) is None
    by_transformers = alone(phi(pinned=False))
    longer = torch.tensor([len(p) + len(r) > ORIGINAL for p, r in rows()])
    torch.testing.assert_close(alone(phi(64))[longer], by_transformers[longer], rtol=0, atol=1e-6)
    torch.testing.assert_close(alone(phi(None))[~longer], by_transformers[~longer], rtol=0, atol=1e-6)
