"""What does sensing cost beside generation, and which way of sensing is the better one?

`python benchmarks/sensing.py [--model FOLDER]` prints one JSON object. The same prompts are sensed by transformers (the
actor that passes use) and by vLLM's pooling engine, and answered by vLLM; each in a process of its own, in turn. `ms`
are milliseconds per prompt once the side is loaded, `startup_seconds` what loading takes.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
import sensing_work as work

EMBEDDED = Path(__file__).parents[1] / "spa_ray" / "microworld" / "model"
NAMES = ["helpfulness", "correctness", "coherence", "complexity", "verbosity"]


def with_head(model: Path, out: Path, seed: int) -> Path:
    """The model folder with a random head of the paper's widths beside it."""
    import shutil

    from transformers import AutoConfig

    from spa_ray.config.training import train_section
    from spa_ray.training.method import method_of
    from spa_ray.training.own_modules import Beside

    shutil.copytree(model, out)
    train = train_section({"method": "sga_sft", "head_seed": seed})
    state = {"objectives": NAMES, "ranges": [[0.0, 4.0]] * len(NAMES)}
    config = AutoConfig.from_pretrained(model)
    head = method_of(train, state).modules(type("Model", (), {"config": config})())
    assert head is not None
    Beside(state, dict(head.state_dict())).write(out, train)
    return out


def make_prompts(folder: Path, count: int, seed: int) -> list[list[int]]:
    """Random prompts of the lengths of preference data, rendered to the end of the last message."""
    from spa_ray.config.models import Model
    from spa_ray.rollout.chat import open_chat

    rng, chat = np.random.default_rng(seed), open_chat(Model(path=str(folder)), folder)
    median, sigma, *bounds = harness.PROMPTS
    sizes = harness.log_normal(rng, count, median, sigma, *bounds)
    words = [f"w{k}" for k in range(50)]
    return [chat.message_ids([{"role": "user", "content": " ".join(rng.choice(words, size // 3))}]) for size in sizes]


def measure(folder: Path, args: argparse.Namespace, prompts: list[list[int]]) -> dict[str, Any]:
    generation = partial(work.time_generation, tokens=args.tokens, at_once=args.at_once)
    sides: dict[str, Any] = {"transformers": work.time_transformers, "pooling": work.time_pooling}
    sides["generation"] = generation
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for repeat in range(args.repeats):
        for side, run in sides.items():
            found[side].append(harness.in_fresh_process(run, folder, args.dtype, prompts))
            harness.progress(f"{repeat + 1}/{args.repeats} {side} {found[side][-1]['seconds']:.2f} s")
    return {side: figures(runs, len(prompts)) for side, runs in found.items()}


def figures(runs: list[dict[str, float]], prompts: int) -> dict[str, Any]:
    ms = [1000 * run["seconds"] / prompts for run in runs]
    startup = statistics.median(run["startup_seconds"] for run in runs)
    return {"ms": statistics.median(ms), "all_ms": ms, "startup_seconds": startup}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=EMBEDDED, help="folder; a random head is put beside a copy")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--at-once", type=int, default=128, help="answers in flight")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = with_head(args.model, Path(scratch) / "model", args.seed)
        prompts = make_prompts(folder, args.prompts, args.seed)
        environment = harness.in_fresh_process(harness.environment)
        sides = measure(folder, args, prompts)
        ways = (work.sensed_scores, work.pooled_scores)
        ours, theirs = (np.array(harness.in_fresh_process(way, folder, args.dtype, prompts[:64])) for way in ways)
    tokens = [len(ids) for ids in prompts]
    harness.report(
        environment=environment,
        settings=vars(args),
        work={"prompts": len(prompts), "tokens_a_prompt": statistics.mean(tokens), "tokens_an_answer": args.tokens},
        sides=sides,
        sensing_over_generation={way: sides[way]["ms"] / sides["generation"]["ms"] for way in list(sides)[:2]},
        largest_difference=float(np.abs(ours - theirs).max()),
    )


if __name__ == "__main__":
    main()
