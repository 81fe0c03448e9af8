"""Causal attention over sequences packed into one row: block-diagonal, without a mask and without padding.

Comes in: queries, keys, values of a packed row and where its sequences end. Goes out: the attention's output.
Registered with transformers as `spa_packed`: a model whose config names it calls it in every layer. Never: one sequence
seen from another.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from spa_ray.errors import InputError

NAME = "spa_packed"
# Layers that look at other positions through attention alone, so that a packed row can be cut where sequences end.
LAYERS = {"full_attention", "sliding_attention"}
# Arguments by which some models change the attention's scores in a way that is not computed here.
UNKNOWN = ("softcap", "s_aux", "position_bias")
UNSAID = -1


def why_not_packed(model: Any) -> str | None:
    """The reason why this model's sequences cannot be packed, or None when they can."""
    config = model.config.get_text_config()
    strange = set(getattr(config, "layer_types", None) or ()) - LAYERS
    if not model._supports_attention_backend or model._is_stateful:
        return "its attention cannot be replaced"
    if strange:
        return f"it has layers of type {', '.join(sorted(strange))}"
    if getattr(config, "attn_logit_softcapping", None):
        return "it caps its attention scores"
    if any(name.endswith("sinks") for name, _ in model.named_parameters()):
        return "it has attention sinks"
    return None


def plain_attention(model: Any) -> str:
    """The fastest of transformers' own implementations that computes what the model's config says: sdpa leaves out a
    cap on attention scores without a word."""
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    return "sdpa" if model._supports_sdpa and not capped else "eager"


def use_attention(model: Any, *, packed: bool) -> None:
    """Let every layer of the model attend within packed sequences (its forward then needs `cu_seq_lens_q`), or over
    padded rows."""
    if packed:
        use_packed_attention(model)
    else:
        model.set_attn_implementation(plain_attention(model))


def use_packed_attention(model: Any) -> None:
    """Let every layer of the model attend within sequences; its forward then needs `cu_seq_lens_q`."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)
    model.set_attn_implementation(NAME)


@dataclass(frozen=True, eq=False)
class SharedPrompts:
    """A packed row in which a prompt stands once before all its responses, and the row in which each response has its
    own copy. Attention is computed over the second, everything else over the first.

    `copies`: of every token of the second row, its place in the first. `own`: of every token of the first row, the
    place of one of its copies in the second; a prompt's are all alike.
    """

    copies: Int[Tensor, " expanded"]
    own: Int[Tensor, " tokens"]

    @classmethod
    def of(
        cls,
        prompt_at: Int[np.ndarray, " sequences"],
        response_at: Int[np.ndarray, " sequences"],
        prompts: Int[np.ndarray, " sequences"],
        responses: Int[np.ndarray, " sequences"],
        device: torch.device | str,
    ) -> SharedPrompts:
        """By where the parts of each sequence begin in the first row, and how long they are."""
        starts = np.stack([prompt_at, response_at], axis=1).ravel()
        sizes = np.stack([prompts, responses], axis=1).ravel()
        copies = np.repeat(starts - (np.cumsum(sizes) - sizes), sizes) + np.arange(sizes.sum())
        own = np.empty(int(copies.max()) + 1, dtype=np.int64)
        own[copies] = np.arange(len(copies))
        return cls(*(torch.from_numpy(x).to(device) for x in (copies, own)))


def packed_attention(
    module: nn.Module,
    query: Float[Tensor, "1 heads tokens dim"],
    key: Float[Tensor, "1 kv_heads tokens dim"],
    value: Float[Tensor, "1 kv_heads tokens dim"],
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = UNSAID,
    cu_seq_lens_q: Int[Tensor, " sequences_plus_1"] | None = None,
    max_length_q: int | None = None,
    shared_prompts: SharedPrompts | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "1 tokens heads dim"], None]:
    """transformers' attention interface. `cu_seq_lens_q` are int32 offsets, from 0 to the number of tokens, which with
    `shared_prompts` are those of the row in which every response has its prompt.

    Raises: InputError when the offsets or a sliding window do not arrive, or the model wants scores that are not
    computed here.
    """
    if cu_seq_lens_q is None or max_length_q is None or attention_mask is not None:
        raise InputError(f"{type(module).__name__} does not pass the packed lengths on; set train.packing=false")
    unknown = [name for name in UNKNOWN if kwargs.get(name) is not None]
    if unknown:
        raise InputError(f"{type(module).__name__}: no {unknown[0]} in packed rows; set train.packing=false")
    if sliding_window == UNSAID:
        sliding_window = None
        window = getattr(getattr(module, "config", None), "sliding_window", None)
        if window is not None and max_length_q > window:  # it would be in the mask, which is not made here
            raise InputError(f"{type(module).__name__} keeps its sliding window to itself; set train.packing=false")
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return _flash(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window, shared_prompts), None
    return _by_length(query, key, value, cu_seq_lens_q, scaling, sliding_window, shared_prompts), None


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    longest: int,
    scale: float | None,
    window: int | None,
    shared: SharedPrompts | None,
) -> Tensor:
    """torch's own variable-length flash attention: (tokens, heads, dim), one kernel for all sequences."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if shared is not None:
        move = _Move(shared.copies, shared.copies.new_empty(0), None, None)
        q, k, v = (_Rearrange.apply(x.flatten(1), move).unflatten(1, x.shape[1:]) for x in (q, k, v))
    sizes = (-1, 0) if window is None or window >= longest else (window - 1, 0)
    grouped = query.shape[1] != key.shape[1]
    limits = {"max_q": longest, "max_k": longest, "window_size": sizes}
    out = varlen_attn(q, k, v, offsets, offsets, **limits, scale=scale, enable_gqa=grouped)
    return (out if shared is None else out.index_select(0, shared.own))[None]


def _by_length(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    scale: float | None,
    window: int | None,
    shared: SharedPrompts | None,
) -> Tensor:
    """One causal kernel for every group of sequences of nearly equal length, padded within the group on the right."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    layout = _layout(tuple(offsets.diff().tolist()), query.device, shared)
    heads, dim = query.shape[1], value.shape[3]
    rows = [x[0].transpose(0, 1).flatten(1) for x in (query, key, value)]
    split = [layout.split(_Rearrange.apply(x, layout.to_groups)) for x in rows]
    parts = []
    for shape, q, k, v in zip(layout.shapes, *split, strict=True):
        q, k, v = (x.view(*shape, heads, -1).transpose(1, 2) for x in (q, k, v))
        mask = _band(shape[1], window, query.device) if window is not None and shape[1] > window else None
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
        parts.append(out.transpose(1, 2).reshape(-1, heads * dim))
    return _Rearrange.apply(torch.cat(parts), layout.to_row).view(1, -1, heads, dim)


# A group's shortest sequence has at least this share of its longest one's tokens: kernels are few, and less than a
# fifth of their rows is padding.
ALIKE = 0.8


@dataclass(frozen=True)
class _Layout:
    """How tokens of a packed row move to padded groups of shapes (sequences, tokens), and back."""

    shapes: list[tuple[int, int]]
    to_groups: _Move
    to_row: _Move

    def split(self, tokens: Float[Tensor, "padded width"]) -> tuple[Tensor, ...]:
        return tokens.split([n * length for n, length in self.shapes])


@dataclass(frozen=True)
class _Move:
    """Row i of the result is row `source[i]`, but zero at `empty`; `back_…` are those of the inverse move, None where
    rows have several copies, whose gradients are added up."""

    source: Int[Tensor, " rows_out"]
    empty: Int[Tensor, " gaps"]
    back_source: Int[Tensor, " rows_in"] | None
    back_empty: Int[Tensor, " gaps_in"] | None


@lru_cache(maxsize=4)
def _layout(lengths: tuple[int, ...], device: torch.device, shared: SharedPrompts | None) -> _Layout:
    """The same for every layer of a forward pass, hence the cache."""
    sizes = np.array(lengths)
    first = np.cumsum(sizes) - sizes
    order = np.argsort(-sizes, kind="stable")
    shapes, source, filled = [], [], []
    at = 0
    while at < len(order):
        longest = sizes[order[at]]
        members = order[at : np.searchsorted(-sizes[order], -ALIKE * longest, side="right")]
        column = np.arange(longest)
        inside = column < sizes[members, None]
        source.append(np.where(inside, first[members, None] + column, 0).ravel())
        filled.append(inside.ravel())
        shapes.append((len(members), int(longest)))
        at += len(members)
    sources, real = np.concatenate(source), np.concatenate(filled)
    inverse = np.empty(sizes.sum(), dtype=np.int64)
    inverse[sources[real]] = np.flatnonzero(real)

    def on_device(*arrays: np.ndarray) -> list[Tensor]:
        return [torch.from_numpy(x).to(device) for x in arrays]

    nothing = np.empty(0, np.int64)
    if shared is None:
        there, back = on_device(sources, np.flatnonzero(~real)), on_device(inverse, nothing)
        return _Layout(shapes, _Move(*there, *back), _Move(*back, *there))
    copies, own = shared.copies.cpu().numpy(), shared.own.cpu().numpy()
    slots = inverse[own]
    taken = np.zeros(len(sources), dtype=bool)
    taken[slots] = True
    row_of_slot = np.zeros(len(sources), dtype=np.int64)
    row_of_slot[slots] = np.arange(len(own))
    source, empty = on_device(copies[sources], np.flatnonzero(~real))
    to_groups = _Move(source, empty, None, None)
    return _Layout(shapes, to_groups, _Move(*on_device(slots, nothing, row_of_slot, np.flatnonzero(~taken))))


def forget_layouts() -> None:
    """Give back the layouts of the last forward passes."""
    _layout.cache_clear()


class _Rearrange(torch.autograd.Function):
    """Move rows. Its backward moves them back, where indexing's own would add them up one by one."""

    @staticmethod
    def forward(ctx: Any, rows: Float[Tensor, "rows width"], move: _Move) -> Float[Tensor, "moved width"]:
        ctx.move, ctx.rows = move, len(rows)
        return rows.index_select(0, move.source).index_fill_(0, move.empty, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "moved width"]) -> tuple[Tensor, None]:
        move = ctx.move
        if move.back_source is None:
            wide = torch.promote_types(grad.dtype, torch.float32)  # sums of copies round once
            given = grad.index_fill(0, move.empty, 0).to(wide)
            total = given.new_zeros(ctx.rows, grad.shape[1]).index_add_(0, move.source, given)
            return total.to(grad.dtype), None
        return grad.index_select(0, move.back_source).index_fill_(0, move.back_empty, 0), None


def _band(size: int, window: int, device: torch.device) -> Bool[Tensor, "size size"]:
    """A causal band: each position sees itself and the window - 1 before it."""
    ones = torch.ones(size, size, dtype=torch.bool, device=device)
    return ones.tril().triu(1 - window)
