"""Log-probs of responses: from token rows to one number a sequence, logits only where a response token is predicted.

Comes in: prompt and response ids. Goes out: summed log-probs and token counts per sequence, hidden states where they
are asked for. Never: losses, weights, optimizers. A `MicroBatch` says where the response tokens stand, not how the rows
are laid out: packed (one row, no padding) and padded (a row a sequence) are two `collate`s and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from spa_ray.training.attention import SharedPrompts, plain_attention
from spa_ray.training.head import LogitTransform, head_logps
from spa_ray.training.losses import token_logps

Rows = list[tuple[np.ndarray, np.ndarray]]  # prompt ids, response ids


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass over `sequences` sequences laid out in `input_ids`.

    Response token k is `targets[k]`; it is predicted at the flat position `predict[k]` of `input_ids` and belongs to
    sequence `owner[k]`; where no sequence has a response, one token is predicted and is nobody's. `prompt_ends` are the
    flat positions of the prompts' last tokens. `position_ids` is None where each row counts from 0. `offsets` are where
    packed sequences begin and end, None where each row is a sequence; `longest` is the longest one's tokens. Where
    packed sequences share their prompt's tokens, `shared` says so and `offsets` are of sequences that have all their
    tokens.
    """

    input_ids: Int[Tensor, "batch seq"]
    position_ids: Int[Tensor, "batch seq"] | None
    offsets: Int[Tensor, " sequences_plus_1"] | None
    shared: SharedPrompts | None
    longest: int
    predict: Int[Tensor, " tokens"]
    targets: Int[Tensor, " tokens"]
    owner: Int[Tensor, " tokens"]
    prompt_ends: Int[Tensor, " sequences"]
    sequences: int
    real_tokens: int


def collate_padded(sequences: Rows, device: torch.device | str) -> MicroBatch:
    """One sequence a row, padded on the right.

    There is no attention mask because none is needed: under causal attention no real token sees the padding behind it,
    the padding's own outputs are never read, and the fast causal kernels refuse a mask.
    """
    prompts, responses = _sizes(sequences)
    width = int((prompts + responses).max())
    ids = np.zeros((len(sequences), width), dtype=np.int64)
    for row, (prompt, response) in enumerate(sequences):
        ids[row, : len(prompt)] = prompt
        ids[row, len(prompt) : len(prompt) + len(response)] = response
    first = np.arange(len(sequences)) * width
    return _micro_batch(ids, first + prompts, prompts, responses, device, prompt_at=first)


def collate_packed(sequences: Rows, device: torch.device | str) -> MicroBatch:
    """All sequences one after the other in a single row, a prompt's responses behind one copy of it; positions count as
    if each had its own. No padding at all."""
    prompts, responses = _sizes(sequences)
    groups: dict[bytes, list[int]] = {}
    for number, (prompt, _) in enumerate(sequences):
        groups.setdefault(prompt.astype(np.int64).tobytes(), []).append(number)
    ids, positions, at = [], [], 0
    prompt_at, response_at = np.empty(len(sequences), np.int64), np.empty(len(sequences), np.int64)
    for members in groups.values():
        prompt = sequences[members[0]][0]
        prompt_at[members] = at
        parts = [prompt, *(sequences[i][1] for i in members)]
        starts = at + np.cumsum([len(part) for part in parts])
        response_at[members] = starts[:-1]
        positions += [np.arange(len(prompt)), *(len(prompt) + np.arange(responses[i]) for i in members)]
        ids += parts
        at = int(starts[-1])
    offsets = np.concatenate([[0], np.cumsum(prompts + responses)]).astype(np.int32)
    shared = len(groups) < len(sequences)
    return _micro_batch(
        np.concatenate(ids).astype(np.int64)[None],
        response_at,
        prompts,
        responses,
        device,
        prompt_at=prompt_at,
        positions=np.concatenate(positions)[None],
        offsets=offsets,
        shared=SharedPrompts.of(prompt_at, response_at, prompts, responses, device) if shared else None,
    )


def _sizes(sequences: Rows) -> tuple[np.ndarray, np.ndarray]:
    return np.array([len(p) for p, _ in sequences]), np.array([len(r) for _, r in sequences])


def _micro_batch(
    ids: Int[np.ndarray, "batch seq"],
    response_at: Int[np.ndarray, " sequences"],
    prompts: Int[np.ndarray, " sequences"],
    responses: Int[np.ndarray, " sequences"],
    device: torch.device | str,
    *,
    prompt_at: Int[np.ndarray, " sequences"],
    positions: Int[np.ndarray, "batch seq"] | None = None,
    offsets: Int[np.ndarray, " sequences_plus_1"] | None = None,
    shared: SharedPrompts | None = None,
) -> MicroBatch:
    """`prompt_at` and `response_at` are the flat positions of their first tokens."""
    owner = np.repeat(np.arange(len(prompts)), responses)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(responses) - responses, responses)
    at = response_at[owner] + within
    ends = prompt_at + prompts - 1
    before = np.where(within == 0, ends[owner], at - 1)
    if not len(at):  # the head runs all the same: ZeRO-3 gathers its weights, forward and backward
        at = before = ends[:1]

    def on_device(values: np.ndarray | None) -> Any:
        return None if values is None else torch.from_numpy(values).to(device, non_blocking=True)

    return MicroBatch(
        input_ids=on_device(ids),
        position_ids=on_device(positions),
        offsets=on_device(offsets),
        shared=shared,
        longest=int((prompts + responses).max()),
        predict=on_device(before),
        targets=on_device(ids.reshape(-1)[at]),
        owner=on_device(owner),
        prompt_ends=on_device(ends),
        sequences=len(prompts),
        real_tokens=int((prompts + responses).sum()),
    )


class ResponseLogps(nn.Module):
    """A causal LM that answers with its responses' log-probs.

    `packed` says which layout its attention computes, `hidden` whether it also answers with each prompt's last hidden
    state, as the head reads it. With a `logits_budget` the head computes log-probs itself, a few
    tokens at a time (`head_logps`); without one, and for a head that is not a plain linear layer, the model's own
    logits are taken, all at once, where a response token is predicted and nowhere else.
    """

    def __init__(
        self, model: Any, *, packed: bool = False, logits_budget: int | None = None, hidden: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        self.packed = packed
        self.hidden = hidden
        self.logits_budget = None
        self._batch: MicroBatch | None = None
        self._kept: Tensor | None = None
        self._states: Tensor | None = None
        self._catch: RemovableHandle | None = None
        self._transform = LogitTransform.of(model.config.get_text_config())
        self._head.register_forward_pre_hook(self._pick)
        if logits_budget is not None and type(self._head) is nn.Linear:
            self.logits_budget = logits_budget
            self._own_head, self._head.forward = self._head.forward, self._head_forward

    @property
    def _head(self) -> Any:
        return self.model.get_output_embeddings()

    def collate(self, sequences: Rows, device: torch.device | str) -> MicroBatch:
        """Lay sequences out as this model reads them."""
        return (collate_packed if self.packed else collate_padded)(sequences, device)

    def forward(self, batch: MicroBatch) -> tuple[Tensor, ...]:
        """Summed response log-probs in float32 (sequences), response token counts (sequences) and, where the module is
        asked for them, hidden states in float32 (sequences × width)."""
        logps = self.token_logps(batch)
        summed = logps.new_zeros(batch.sequences).index_add(0, batch.owner, logps[: len(batch.owner)])
        counts = torch.bincount(batch.owner, minlength=batch.sequences)
        states, self._states = self._states, None
        return (summed, counts) if states is None else (summed, counts, states.to(summed.dtype))

    def token_logps(self, batch: MicroBatch) -> Float[Tensor, " tokens"]:
        """log π of every response token, in the order of `batch.targets`."""
        if self._catch is None:
            # Late, so that it sees what DeepSpeed's own hooks on the head hand on.
            self._catch = self._head.register_forward_hook(self._keep)
        packed = {}
        if batch.offsets is not None:
            packed = {"cu_seq_lens_q": batch.offsets, "cu_seq_lens_k": batch.offsets}
            packed |= {"max_length_q": batch.longest, "max_length_k": batch.longest}
        if batch.shared is not None:
            packed["shared_prompts"] = batch.shared
        self._batch = batch
        output = self.model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **packed)
        kept, self._kept, self._batch = self._kept, None, None
        return token_logps(output.logits, batch.targets) if self.logits_budget is None else kept

    @contextmanager
    def plain(self) -> Iterator[None]:
        """While it lasts: padded rows, the model's own head, all logits at once. What every other path must equal."""
        layout = self.packed, self.logits_budget, self.model.config._attn_implementation
        self.packed, self.logits_budget = False, None
        self.model.set_attn_implementation(plain_attention(self.model))
        try:
            yield
        finally:
            self.packed, self.logits_budget = layout[:2]
            self.model.set_attn_implementation(layout[2])

    def _pick(self, head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        assert self._batch is not None
        hidden = inputs[0].flatten(0, 1)
        if self.hidden:
            self._states = hidden[self._batch.prompt_ends]
        return (hidden[self._batch.predict],)

    def _keep(self, head: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._kept = output

    def _head_forward(self, hidden: Float[Tensor, "tokens width"]) -> Tensor:
        """In the head's place, so that what DeepSpeed hooks to a module (ZeRO-3's gathering) goes on working."""
        if self.logits_budget is None:
            return self._own_head(hidden)
        assert self._batch is not None
        return head_logps(
            hidden,
            self._head.weight,
            self._head.bias,
            self._batch.targets,
            logits_budget=self.logits_budget,
            transform=self._transform,
        )
