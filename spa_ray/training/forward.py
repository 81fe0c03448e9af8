"""Log-probs of responses: from token rows to one number a sequence, logits only where a response token is predicted.

Comes in: prompt and response ids. Goes out: summed log-probs and token counts per sequence. Never: losses, weights,
optimizers. A `MicroBatch` says where the response tokens stand, not how the rows are laid out, so that a packed layout
is another `collate`, and nothing else changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from spa_ray.training.losses import token_logps


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass over `sequences` sequences laid out in `input_ids`.

    Response token k is `targets[k]`; it is predicted at the flat position `predict[k]` of `input_ids` and belongs to
    sequence `owner[k]`. `position_ids` is None where each row counts from 0.
    """

    input_ids: Int[Tensor, "batch seq"]
    position_ids: Int[Tensor, "batch seq"] | None
    predict: Int[Tensor, " tokens"]
    targets: Int[Tensor, " tokens"]
    owner: Int[Tensor, " tokens"]
    sequences: int
    real_tokens: int


def collate_padded(sequences: list[tuple[np.ndarray, np.ndarray]], device: torch.device | str) -> MicroBatch:
    """One sequence a row, padded on the right.

    There is no attention mask because none is needed: under causal attention no real token sees the padding behind it,
    the padding's own outputs are never read, and the fast causal kernels refuse a mask.
    """
    prompts = np.array([len(p) for p, _ in sequences])
    responses = np.array([len(r) for _, r in sequences])
    width = int((prompts + responses).max())
    ids = np.zeros((len(sequences), width), dtype=np.int64)
    for row, (prompt, response) in enumerate(sequences):
        ids[row, : len(prompt)] = prompt
        ids[row, len(prompt) : len(prompt) + len(response)] = response
    owner = np.repeat(np.arange(len(sequences)), responses)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(responses) - responses, responses)
    column = prompts[owner] + within
    arrays = {
        "input_ids": ids,
        "predict": owner * width + column - 1,
        "targets": ids[owner, column],
        "owner": owner,
    }
    tensors = {k: torch.from_numpy(v).to(device, non_blocking=True) for k, v in arrays.items()}
    real = int((prompts + responses).sum())
    return MicroBatch(**tensors, position_ids=None, sequences=len(sequences), real_tokens=real)


class ResponseLogps(nn.Module):
    """A causal LM that answers with its responses' log-probs.

    The output head is given only the hidden states that predict a response token (a forward pre-hook picks them), so
    the logits are (tokens, vocab) and what the model does to its logits afterwards (scaling, soft caps) still holds.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self._predict: Tensor | None = None
        model.get_output_embeddings().register_forward_pre_hook(self._pick)

    def _pick(self, head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (inputs[0].flatten(0, 1)[self._predict],)

    def forward(self, batch: MicroBatch) -> tuple[Float[Tensor, " sequences"], Int[Tensor, " sequences"]]:
        """Summed response log-probs in float32 and response token counts."""
        self._predict = batch.predict
        output = self.model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
        self._predict = None
        logps = token_logps(output.logits, batch.targets)
        summed = logps.new_zeros(batch.sequences).index_add(0, batch.owner, logps)
        return summed, torch.bincount(batch.owner, minlength=batch.sequences)
