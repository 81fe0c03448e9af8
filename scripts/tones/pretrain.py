"""Pretrain the model of `tones`: `python -m scripts.tones.pretrain --out DIR` (half an hour, 2 cores).

It goes on from the first world's model, whose words keep their places: the new words' embeddings start at random.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from scripts.microworld.pretrain import Corpus, model_config, pretrain
from scripts.tones import tokenizer as world_tokenizer
from scripts.tones.corpus import MAKERS

MIXTURE = {"answer": 52, "judge": 48, "refine": 24, "number": 12}  # sequences in a step
FIRST = Path("spa_ray/microworld/model")


def start(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The first world's model with room for the new words."""
    model = LlamaForCausalLM(model_config(tokenizer))
    known = LlamaForCausalLM.from_pretrained(FIRST, dtype=torch.float32).state_dict()
    state = model.state_dict()
    for name, value in known.items():
        state[name][: len(value)] = value  # embeddings and head have more rows, all else as many
    model.load_state_dict(state)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=2e-3)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = world_tokenizer.build()
    corpus = Corpus(tokenizer, MAKERS, MIXTURE)
    pretrain(args.out, corpus, start(tokenizer), steps=args.steps, seed=args.seed, peak=args.lr)


if __name__ == "__main__":
    main()
