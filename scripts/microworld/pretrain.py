"""Pretrain the embedded model from scratch: `python -m scripts.microworld.pretrain --out DIR` (about an hour, 2 cores).

Comes in: a seed and a number of steps. Goes out: a model folder (safetensors, tokenizer, generation config, the
training log). Loss on completions only, averaged per sequence (else the judge's single token drowns), in every step
the same mixture of answers, judgements, refinements and utility tasks.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from scripts.microworld import tokenizer as world_tokenizer
from scripts.microworld.corpus import MAKERS, Example

MIXTURE = {"answer": 44, "judge": 60, "refine": 26, "utility": 6}  # sequences in a step
CONTEXT = 512


def model_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """A Llama of 1.1 M parameters."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )


class Encoder:
    """Examples to token ids, word by word (the tokenizer's own result, which a test holds, at a tenth of its cost)."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.eos = tokenizer.eos_token_id

    def __call__(self, example: Example) -> tuple[list[int], int]:
        """(ids of prompt and completion, length of the prompt)."""
        system = f"<system>{example.system}<end>" if example.system else ""
        prompt = self._ids(f"<s>{system}<user>{example.user}<end><assistant>")
        return [*prompt, *self._ids(example.target), self.eos], len(prompt)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


def batch(encoded: list[tuple[list[int], int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded (ids, labels), both (B, T); labels are -100 off the completion."""
    width = max(len(ids) for ids, _ in encoded)
    ids = torch.full((len(encoded), width), pad)
    labels = torch.full((len(encoded), width), -100)
    for row, (tokens, start) in enumerate(encoded):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, start : len(tokens)] = torch.tensor(tokens[start:])
    return ids, labels


def sequence_loss(model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy per sequence (B,), each the mean over its own completion."""
    hidden = model.model(ids).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    used = targets != -100
    losses = torch.nn.functional.cross_entropy(model.lm_head(hidden[used]).float(), targets[used], reduction="none")
    rows = used.nonzero()[:, 0]
    total = torch.zeros(len(ids)).index_add(0, rows, losses)
    return total / used.sum(1)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warmup over 100 steps, then linear decay to a fiftieth."""
    return peak * min(1.0, (step + 1) / 100, 0.02 + 0.98 * (steps - step) / steps)


@dataclass(frozen=True)
class Corpus:
    """What a model learns: its tokenizer, makers of examples, and how many of each are in a step."""

    tokenizer: PreTrainedTokenizerFast
    makers: Mapping[str, Callable[[random.Random], Example]]
    mixture: Mapping[str, int]


def pretrain(
    out: Path, corpus: Corpus, model: LlamaForCausalLM, *, steps: int, seed: int, peak: float, log_every: int = 25
) -> None:
    """Train and save. Deterministic but for the order of floating-point sums over threads."""
    rng = random.Random(f"pretrain/{seed}")
    tokenizer, makers, mixture = corpus.tokenizer, corpus.makers, corpus.mixture
    model.train()
    encode = Encoder(tokenizer)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    out.mkdir(parents=True, exist_ok=True)
    log = (out / "pretrain_log.jsonl").open("w")
    total, started = sum(mixture.values()), time.monotonic()
    running: dict[str, float] = {}
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        losses: dict[str, float] = {}
        for kind, count in mixture.items():
            ids, labels = batch([encode(makers[kind](rng)) for _ in range(count)], tokenizer.pad_token_id)
            with torch.autocast("cpu", dtype=torch.bfloat16):  # master weights and the loss stay float32
                loss = sequence_loss(model, ids, labels).sum()
            (loss / total).backward()
            losses[kind] = loss.item() / count
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running = {k: 0.95 * running.get(k, v) + 0.05 * v for k, v in losses.items()}
        if (step + 1) % log_every == 0:
            row = {"step": step + 1, "seconds": round(time.monotonic() - started), "grad_norm": round(norm.item(), 3)}
            row |= {k: round(v, 4) for k, v in running.items()}
            log.write(json.dumps(row) + "\n")
            log.flush()
            print(json.dumps(row), flush=True)
        if (step + 1) % 100 == 0:
            save(model, tokenizer, out)
    save(model, tokenizer, out)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the model folder."""
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=3e-3)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = world_tokenizer.build()
    model = LlamaForCausalLM(model_config(tokenizer))
    corpus = Corpus(tokenizer, MAKERS, MIXTURE)
    pretrain(args.out, corpus, model, steps=args.steps, seed=args.seed, peak=args.lr)


if __name__ == "__main__":
    main()
