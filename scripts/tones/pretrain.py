"""Pretrain the model of `tones`: `python -m scripts.tones.pretrain --out A`, then `.. --out B --after A` (45 minutes,
2 cores).

It goes on from the first world's model, whose words keep their places: the new words' embeddings start at random. The
second time it learns what scores in a prompt's words mean.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from scripts.microworld.pretrain import Corpus, model_config, pretrain
from scripts.tones import tokenizer as world_tokenizer
from scripts.tones.corpus import MAKERS

FIRST_MIXTURE = {"answer": 52, "judge": 48, "refine": 24, "number": 12, "reading": 32}  # sequences in a step
SECOND_MIXTURE = {"answer": 28, "judge": 28, "refine": 14, "number": 10, "reading": 10, "told": 60}
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
    parser.add_argument("--after", type=Path, help="the folder of the first time, for the second")
    parser.add_argument("--steps", type=int, help="700, and the second time 500")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=2e-3, help="the peak")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = world_tokenizer.build()
    if args.after is None:
        corpus, model, steps = Corpus(tokenizer, MAKERS, FIRST_MIXTURE), start(tokenizer), 700
    else:
        model = LlamaForCausalLM.from_pretrained(args.after, dtype=torch.float32)
        corpus, steps = Corpus(tokenizer, MAKERS, SECOND_MIXTURE), 500
    pretrain(args.out, corpus, model, steps=args.steps or steps, seed=args.seed, peak=args.lr)


if __name__ == "__main__":
    main()
