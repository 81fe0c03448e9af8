"""How well the model of `tones` answers, judges and refines: `python -m scripts.tones.judge_quality` prints JSON.

Validation prompts only. Of its answers: the share that has nothing but sentences of this world, the oracle's means, and
what they owe to the prompt: correlation of each cue, and of each score that is asked for, with the oracle's score. Both
should be near 0 before fine-tuning.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
from itertools import islice
from pathlib import Path
from statistics import correlation, fmean
from typing import Any

import yaml

from scripts.microworld.judge_quality import episodes, quality
from scripts.tones.corpus import asking
from spa_ray.generation.setup import Task
from spa_ray.microworld.prompts import facts
from spa_ray.microworld.tones import oracle
from spa_ray.microworld.tones.grammar import UNKNOWN, read
from spa_ray.microworld.tones.prompts import ATTRIBUTES, STYLES, prompts, wish_of

CONFIG = Path("spa_ray/microworld/tones/spa.yaml")


def answers(rows: list[dict[str, Any]], asked: list[dict[str, float]]) -> dict[str, Any]:
    """Of the answers to plain prompts, the first half of the rows, and to the same ones that ask for scores."""
    found = [(row["messages"][0]["content"], row["responses"][0]["text"]) for row in rows]
    truth = [oracle.scores(text, answer) for text, answer in found]
    plain, conditioned = truth[: len(asked)], truth[len(asked) :]
    styles = [wish_of(text).styles for text, _ in found[: len(asked)]]
    cues = {name: [(s[name], t[name]) for s, t in zip(styles, plain, strict=True) if s[name]] for name in STYLES}
    told = {name: [(a[name], t[name]) for a, t in zip(asked, conditioned, strict=True)] for name in ATTRIBUTES}
    return {
        "well_formed": round(fmean(UNKNOWN not in read(answer) for _, answer in found), 3),
        "means": {name: round(fmean(t[name] for t in plain), 3) for name in plain[0]},
        "correlation_with_cue": {name: _r(pairs) for name, pairs in cues.items()},
        "correlation_with_score_asked_for": {name: _r(pairs) for name, pairs in told.items()},
        "n": len(asked),
    }


def _r(pairs: list[tuple[float, float]]) -> float:
    return round(correlation(*zip(*pairs, strict=True)), 3)


def marks(question: str, response: str) -> dict[str, float]:
    """The oracle's scores on SPA's scale of 1 to 10."""
    return {name: 1 + 9 * score for name, score in oracle.scores(question, response).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=CONFIG.with_name("model"))
    parser.add_argument("--prompts", type=int, default=300, help="to judge and refine; five times as many to answer")
    args = parser.parse_args()
    raw = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    rng = random.Random(0)
    texts = list(islice(prompts("validation"), 5 * args.prompts))
    asked = [{name: rng.randint(0, 4) / 4 for name in ATTRIBUTES} for _ in texts]

    async def both() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        spoken = [*texts, *(asking(text, scores) for text, scores in zip(texts, asked, strict=True))]
        answered = await episodes(raw, args.model, spoken, Task("answer", scored=False))
        return answered, await episodes(raw, args.model, texts[: args.prompts])

    answered, judged = asyncio.run(both())
    report = quality(judged, marks, lambda text: "confusing" if facts(text).confusing else "clear")
    print(json.dumps({"answers": answers(answered, asked), **report}, indent=2))


if __name__ == "__main__":
    main()
