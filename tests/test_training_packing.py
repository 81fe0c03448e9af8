"""Packed rows give what padded rows give: log-probs, gradients, trained weights; for several architectures."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from spa_ray.errors import InputError
from spa_ray.training import attention
from spa_ray.training.attention import NAME, packed_attention, use_attention, use_packed_attention, why_not_packed
from spa_ray.training.balance import COPY
from spa_ray.training.forward import ResponseLogps, Rows, collate_packed
from spa_ray.training.losses import sequence_logps
from spa_ray.training.policy import TOLERANCE, _short_rows, check_layout
from tests.training_support import make_job

VOCAB = 97
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


def tiny(kind: str, **more: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **more})
    return getattr(transformers, f"{kind}ForCausalLM")(config).double()


def rows(seed: int = 0) -> Rows:
    """Sequences of very unequal lengths, some longer than the windows below, one of a single response token."""
    rng = np.random.default_rng(seed)
    return [(rng.integers(3, VOCAB, p), rng.integers(3, VOCAB, r)) for p, r in [(3, 30), (11, 1), (1, 4), (17, 9)]]


MODELS = {
    "llama": lambda: tiny("Llama"),
    "mistral-windowed": lambda: tiny("Mistral", sliding_window=6),
    "qwen3": lambda: tiny("Qwen3"),
    "granite": lambda: tiny("Granite", logits_scaling=4.0),
    "cohere": lambda: tiny("Cohere", logit_scale=0.25),
    "llama-tied": lambda: tiny("Llama", tie_word_embeddings=True),
}


def summed_and_gradients(policy: ResponseLogps, data: Rows) -> tuple[Tensor, dict[str, Tensor]]:
    summed, counts = policy(policy.collate(data, "cpu"))
    assert counts.tolist() == [len(r) for _, r in data]
    upstream = torch.linspace(-1, 2, len(data), dtype=summed.dtype)
    policy.zero_grad()
    (summed * upstream).sum().backward()
    return summed.detach(), {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


def left_padded_logps(model: Any, data: Rows) -> Tensor:
    """Through transformers alone: left padding, an attention mask, its own logits."""
    width = max(len(p) + len(r) for p, r in data)
    ids = torch.zeros(len(data), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, (prompt, response) in enumerate(data):
        whole = torch.from_numpy(np.concatenate([prompt, response]))
        ids[i, width - len(whole) :] = whole
        mask[i, width - len(whole) :] = 1
        labels[i, width - len(response) :] = torch.from_numpy(response)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    return sequence_logps(logits, labels, average=False)[0].detach()


def packed_policy(model: Any, budget: int | None) -> ResponseLogps:
    assert why_not_packed(model) is None
    use_packed_attention(model)
    return ResponseLogps(model, packed=True, logits_budget=budget)


def rows_of_few_prompts() -> Rows:
    """Answers to two prompts, one of them longer than the windows below, and one sequence by itself."""
    rng = np.random.default_rng(2)
    one, two = rng.integers(3, VOCAB, 9), rng.integers(3, VOCAB, 2)
    of = [(one, 4), (two, 7), (one, 1), (rng.integers(3, VOCAB, 5), 3), (one, 12), (two, 7)]
    return [(prompt, rng.integers(3, VOCAB, tokens)) for prompt, tokens in of]


@pytest.mark.parametrize("budget", [None, 5 * VOCAB, 1000 * VOCAB], ids=["own-head", "chunks", "one-chunk"])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("make", [rows, rows_of_few_prompts])
def test_packed_is_padded_on_the_right_and_on_the_left(make: Any, kind: str, budget: int | None) -> None:
    data = make()
    left = left_padded_logps(MODELS[kind](), data)
    padded, padded_gradients = summed_and_gradients(ResponseLogps(MODELS[kind]()), data)
    packed, packed_gradients = summed_and_gradients(packed_policy(MODELS[kind](), budget), data)
    torch.testing.assert_close(padded, left, rtol=0, atol=1e-9)
    torch.testing.assert_close(packed, padded, rtol=0, atol=1e-9)
    assert packed_gradients.keys() == padded_gradients.keys()
    for name, gradient in padded_gradients.items():
        # Norms compute in float32 whatever the model's dtype.
        torch.testing.assert_close(packed_gradients[name], gradient, rtol=1e-5, atol=1e-5, msg=name)


def test_a_prompt_stands_once_before_all_its_responses() -> None:
    data = rows_of_few_prompts()
    batch = collate_packed(data, "cpu")
    assert batch.input_ids.numel() == 9 + 2 + 5 + sum(len(response) for _, response in data)
    assert batch.real_tokens == sum(len(prompt) + len(response) for prompt, response in data)
    assert batch.shared is not None
    whole = np.concatenate([part for row in data for part in row])
    assert batch.input_ids[0][batch.shared.copies].tolist() == whole.tolist()
    assert batch.input_ids[0].tolist() == whole[batch.shared.own].tolist()
    assert collate_packed(rows(), "cpu").shared is None


def saved_bytes(policy: ResponseLogps, data: Rows) -> int:
    """What a forward pass keeps for the backward pass, each tensor once."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        summed, _ = policy(policy.collate(data, "cpu"))
        summed.sum().backward()
    return sum(kept.values())


def test_a_copy_of_a_prompts_token_takes_no_more_than_it_counts_for() -> None:
    rng = np.random.default_rng(3)
    prompt = rng.integers(3, VOCAB, 190)
    together = [(prompt, rng.integers(3, VOCAB, 10)) for _ in range(6)]
    counted = 250 + round(COPY * 5 * 190)
    apart = [(rng.integers(3, VOCAB, counted // 2 - 10), rng.integers(3, VOCAB, 10)) for _ in range(2)]
    policy = packed_policy(tiny("Llama"), 5 * VOCAB)
    policy(policy.collate(apart, "cpu"))  # what is made once is not counted
    assert saved_bytes(policy, together) <= 1.1 * saved_bytes(policy, apart)
    assert saved_bytes(policy, together) > saved_bytes(policy, apart) * 250 / counted


def test_a_packed_sequence_sees_nothing_of_its_neighbours() -> None:
    policy = packed_policy(tiny("Llama"), None)
    data = rows()
    other = [data[0], *rows(seed=1)[1:]]
    first = policy(policy.collate(data, "cpu"))[0]
    second = policy(policy.collate(other, "cpu"))[0]
    assert first[0].item() == second[0].item()
    assert (first[1:] != second[1:]).all()


def test_the_order_of_sequences_changes_no_log_prob() -> None:
    policy = packed_policy(tiny("Llama"), 5 * VOCAB)
    data = rows()
    forward = policy(policy.collate(data, "cpu"))[0]
    backward = policy(policy.collate(data[::-1], "cpu"))[0]
    torch.testing.assert_close(forward, backward.flip(0), rtol=0, atol=1e-10)


def test_plain_is_padded_with_the_models_own_head_and_comes_back() -> None:
    policy = packed_policy(tiny("Llama"), 5 * VOCAB)
    with policy.plain():
        assert policy.collate(rows(), "cpu").offsets is None
        plain = policy(policy.collate(rows(), "cpu"))[0]
    assert policy.packed
    assert policy.model.config._attn_implementation == NAME
    torch.testing.assert_close(policy(policy.collate(rows(), "cpu"))[0], plain, rtol=0, atol=1e-9)


def test_models_that_cannot_be_packed_say_why() -> None:
    assert "caps its attention" in str(why_not_packed(tiny("Gemma2", attn_logit_softcapping=20.0)))
    linear = tiny("Qwen3")
    linear.config.layer_types = ["full_attention", "linear_attention"]
    assert "linear_attention" in str(why_not_packed(linear))
    sinks = tiny("Llama")
    sinks.model.layers[0].self_attn.sinks = torch.nn.Parameter(torch.zeros(4))
    assert "sinks" in str(why_not_packed(sinks))
    stateful = tiny("Llama")
    stateful._is_stateful = True
    assert why_not_packed(stateful) is not None


def test_a_softcapped_head_in_chunks_is_the_models_own() -> None:
    own, _ = summed_and_gradients(ResponseLogps(tiny("Gemma2", final_logit_softcapping=3.0)), rows())
    chunked = ResponseLogps(tiny("Gemma2", final_logit_softcapping=3.0), logits_budget=5 * VOCAB)
    torch.testing.assert_close(summed_and_gradients(chunked, rows())[0], own, rtol=0, atol=1e-9)


def test_capped_attention_scores_are_trained_as_the_model_has_them() -> None:
    def capped(cap: float | None = 0.5) -> Any:
        return tiny("Gemma2", attn_logit_softcapping=cap, sliding_window=6)

    truth = capped()
    truth.set_attn_implementation("eager")
    expected = torch.cat([left_padded_logps(truth, [row]) for row in rows()])
    model = capped()
    use_attention(model, packed=False)
    # eager takes its softmax in float32
    policy = ResponseLogps(model, logits_budget=5 * VOCAB)
    torch.testing.assert_close(summed_and_gradients(policy, rows())[0], expected, rtol=0, atol=1e-5)
    with policy.plain():
        torch.testing.assert_close(summed_and_gradients(policy, rows())[0], expected, rtol=0, atol=1e-5)
    uncapped = summed_and_gradients(ResponseLogps(capped(None)), rows())[0]
    assert (uncapped - expected).abs().max() > 1e-2


def test_packed_attention_without_lengths_or_with_unknown_scores_is_an_error() -> None:
    q = torch.randn(1, 2, 5, 4)
    with pytest.raises(InputError, match=r"packing=false"):
        packed_attention(torch.nn.Identity(), q, q, q, None)
    offsets = torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(InputError, match="softcap"):
        packed_attention(torch.nn.Identity(), q, q, q, None, cu_seq_lens_q=offsets, max_length_q=5, softcap=1.0)
    windowed = torch.nn.Identity()
    windowed.config = SimpleNamespace(sliding_window=4)
    with pytest.raises(InputError, match="sliding window to itself"):
        packed_attention(windowed, q, q, q, None, cu_seq_lens_q=offsets, max_length_q=5)


def deep(dtype: torch.dtype) -> Any:
    """A model of many layers whose scores reach far: rounding grows from layer to layer."""
    model = tiny("Llama", hidden_size=64, head_dim=16, num_hidden_layers=12, initializer_range=0.25)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight.mul_(1.4)
    return model.to(dtype)


class Engine:
    """Of a DeepSpeed engine what the check of the layout needs."""

    def __init__(self, policy: ResponseLogps) -> None:
        self.module = policy

    def __call__(self, batch: Any) -> Any:
        return self.module(batch)


def off(policy: ResponseLogps) -> float:
    """Root mean square of what the packed log-probs differ by from the plain ones, over the check's rows."""
    rows = _short_rows(VOCAB)
    with torch.no_grad():
        found, _ = policy(policy.collate(rows, "cpu"))
        with policy.plain():
            truth, _ = policy(policy.collate(rows, "cpu"))
    return float((found - truth).square().mean().sqrt())


@pytest.fixture
def other_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed attention by a kernel that is sound and rounds otherwise, as a GPU's does."""
    by_length = attention._by_length

    def by_math(*args: Any) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return by_length(*args)

    monkeypatch.setattr(attention, "_by_length", by_math)


def test_rounding_alone_is_not_refused_in_bfloat16(other_kernel: None, tmp_path: Path) -> None:
    policy = packed_policy(deep(torch.bfloat16), None)
    job = make_job(tmp_path, tmp_path, tmp_path, dtype="bfloat16")
    assert off(policy) > TOLERANCE["bfloat16"]
    check_layout(Engine(policy), job)


@pytest.mark.parametrize(
    ("wrong", "dtype"), [("scores", "bfloat16"), ("boundaries", "bfloat16"), ("scores", "float32")]
)
def test_attention_that_is_misunderstood_is_refused(wrong: str, dtype: str, other_kernel: None, tmp_path: Path) -> None:
    policy = packed_policy(deep(getattr(torch, dtype)), None)
    right = attention.packed_attention

    def misunderstood(*args: Any, **kwargs: Any) -> Any:
        if wrong == "scores":
            kwargs["scaling"] *= 1.25
        else:  # all sequences are taken for one
            last = int(kwargs["cu_seq_lens_q"][-1])
            kwargs["cu_seq_lens_q"], kwargs["max_length_q"] = torch.tensor([0, last], dtype=torch.int32), last
        return right(*args, **kwargs)

    transformers.AttentionInterface.register(NAME, misunderstood)
    try:
        with pytest.raises(InputError, match=r"a token off when packed .*rounding alone.*set train\.packing=false"):
            check_layout(Engine(policy), make_job(tmp_path, tmp_path, tmp_path, dtype=dtype))
    finally:
        transformers.AttentionInterface.register(NAME, right)
