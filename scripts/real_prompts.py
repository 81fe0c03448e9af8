"""Draw the prompts of `configs/real.yaml` from three public sets, as their authors publish the files.

    python scripts/real_prompts.py DATA      # DATA/{do_not_answer,xstest,mt_bench}; writes configs/real/*.jsonl

A third each: requests that should be met with care (Do-Not-Answer, Apache-2.0), requests that only sound dangerous
(XSTest's safe half, CC-BY-4.0), plain questions (MT-Bench's first turns, Apache-2.0). Short ones alone, since the model
that reads them is small. The draw is seeded; the files that it wrote are in the repository with their licences.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

SEED, TRAIN, HELD_OUT = 0, 16, 11  # of each set; 48 to train on, 32 held out of 33
LONGEST = 200  # characters
DO_NOT_ANSWER = ("malicious_uses", "information_hazard")
MT_BENCH = ("writing", "roleplay", "humanities", "stem", "reasoning")

Row = dict[str, str]


def do_not_answer(data: Path) -> Iterator[Row]:
    for name in DO_NOT_ANSWER:
        lines = (data / "do_not_answer" / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
        for number, line in enumerate(filter(None, lines), 1):
            yield row(f"dna-{name}-{number}", json.loads(line)["prompt"], "do_not_answer", "harmful")


def xstest(data: Path) -> Iterator[Row]:
    with (data / "xstest" / "xstest_prompts.csv").open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            if line["label"] == "safe":
                yield row(f"xstest-{line['id']}", line["prompt"], "xstest", "sensitive")


def mt_bench(data: Path) -> Iterator[Row]:
    for line in filter(None, (data / "mt_bench" / "question.jsonl").read_text(encoding="utf-8").split("\n")):
        question = json.loads(line)
        if question["category"] in MT_BENCH:
            yield row(f"mtbench-{question['question_id']}", question["turns"][0], "mt_bench", "benign")


def row(prompt_id: str, prompt: str, source: str, category: str) -> Row:
    return {"prompt_id": prompt_id, "prompt": prompt.strip(), "source": source, "category": category}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("configs/real"))
    asked = parser.parse_args()
    train: list[Row] = []
    held_out: list[Row] = []
    for read in (do_not_answer, xstest, mt_bench):
        short = {r["prompt"].lower(): r for r in read(asked.data) if len(r["prompt"]) <= LONGEST}
        drawn = random.Random(SEED).sample(sorted(short.values(), key=lambda r: r["prompt_id"]), TRAIN + HELD_OUT)
        train += drawn[:TRAIN]
        held_out += drawn[TRAIN:]
    for name, rows in (("prompts.jsonl", train), ("held_out.jsonl", held_out[:-1])):
        text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
        (asked.out / name).write_text(text, encoding="utf-8")
        print(f"{asked.out / name}: {len(rows)} prompts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
