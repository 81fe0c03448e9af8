"""How well the embedded model judges and refines: `python -m scripts.microworld.judge_quality` prints JSON.

Comes in: the model folder; validation prompts only. Goes out: correlation and mean absolute error of its drawn scores
against the oracle, for clear and confusing prompts, and the oracle means of its candidates and refined answers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from statistics import correlation, mean
from typing import Any

from scripts.microworld.corpus import HELD_OUT_TOPICS, demo_config
from spa_ray.config import arm_configs
from spa_ray.engine import create_engine
from spa_ray.generation.setup import Task, make_episodes
from spa_ray.microworld import oracle
from spa_ray.microworld.prompts import facts, prompts

NAMES = ("harmless", "helpful")


async def episodes(
    raw: Mapping[str, Any], model: Path, texts: Iterable[str], task: Task | None = None
) -> list[dict[str, Any]]:
    """SPA episodes, or what else a task says, of a config's own settings on prompts of one turn."""
    stem = "judge_quality"
    config = arm_configs({**raw, "arms": {"main": {}}}, [f"model.path={model}"], where=stem, stem=stem)["main"]
    engine = create_engine(config.model, model)
    runner = make_episodes(config, task or Task(), engine, model)
    rows = [{"prompt_id": text, "messages": [{"role": "user", "content": text}], "meta": "{}"} for text in texts]
    done = await asyncio.gather(*(runner.run(row) for row in rows))
    engine.shutdown()
    return list(done)


def quality(
    rows: list[dict[str, Any]],
    scores: Callable[[str, str], Mapping[str, float]],
    group: Callable[[str], str],
) -> dict[str, Any]:
    """Scores against the oracle's, by objective and group of prompts; candidates against refined answers."""
    judged: dict[str, list[tuple[float, float]]] = {}
    truth: dict[str, list[Mapping[str, float]]] = {"candidate": [], "refined": []}
    for row in rows:
        question = row["messages"][0]["content"]
        for response in row["responses"]:
            actual = scores(question, response["text"])
            truth[response["kind"]].append(actual)
            for name, score in zip(NAMES, response["scores"], strict=True):
                judged.setdefault(f"{name} {group(question)}", []).append((score, actual[name]))
    report: dict[str, Any] = {
        key: {
            "correlation": round(correlation(*zip(*pairs, strict=True)), 3),
            "mean_absolute_error": round(mean(abs(a - b) for a, b in pairs), 3),
            "n": len(pairs),
        }
        for key, pairs in sorted(judged.items())
    }
    for kind, found in truth.items():
        report[kind] = {name: round(mean(s[name] for s in found), 3) for name in NAMES}
    return report


def _group(question: str) -> str:
    about = facts(question)
    return "confusing" if about.confusing else "held_out_topic" if about.topic in HELD_OUT_TOPICS else "clear"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("spa_ray/microworld/model"))
    parser.add_argument("--prompts", type=int, default=300)
    args = parser.parse_args()
    texts = (text for text, _ in islice(prompts("street", "validation"), args.prompts))
    rows = asyncio.run(episodes(demo_config(), args.model, texts))
    print(json.dumps(quality(rows, oracle.scores, _group), indent=2))


if __name__ == "__main__":
    main()
