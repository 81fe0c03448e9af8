"""`make real`: the whole loop on a real instruct model that somebody else trained, on this machine.

    python scripts/real.py [key=value ...]

Fetches the model, then plans, previews and runs `configs/real.yaml` through the ordinary commands, and shows what came
out as it came out: tables, the health of the judge's signal, three answers before and after, the time of every stage,
and whether the trained folder answers alike in vLLM and transformers. Run it again to resume.

With `--judge-endpoint` it plays `configs/real-judge.yaml`: 16 prompts of a public set, and every judgement asked of the
same model behind vLLM's own OpenAI server on loopback. That tests plumbing, not judgement.

With `--sga` it trains SGA with adapters on the same scored episodes, in the same run folder, and says how well that
model senses scores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import real_sga
from alike import Alike, compare_greedy
from served_model import served_model

from spa_ray.config import load_config
from spa_ray.logs.noise import hush
from spa_ray.report.examples import of_run, print_examples
from spa_ray.report.run_data import read_run

ROOT = Path(__file__).resolve().parents[1]
SPA = str(Path(sys.executable).parent / "spa")
SMALLEST = "smollm2-135m"
CONFIG, BY_ENDPOINT = "configs/real.yaml", "configs/real-judge.yaml"
JUDGE_PORT, JUDGE_CONTEXT = 8155, 2048  # the port is part of the stages' keys
HELD_OUT = "configs/real/held_out.jsonl"
FEWEST_PAIRS = 16
CHECKED = 8  # held-out prompts whose greedy answers are compared
CHECKED_TOKENS = 32


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMALLEST, help="a name that scripts/real_model.py knows")
    parser.add_argument("--preview", type=int, default=4, help="prompts that are previewed; 0 for none")
    parser.add_argument("--judge-endpoint", action="store_true", help="judge by vLLM's server, on 16 prompts")
    parser.add_argument("--sga", action="store_true", help="SGA on the same episodes, in the place of SPA")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    asked = parser.parse_args()
    if asked.judge_endpoint and asked.model != SMALLEST:
        parser.error(f"--judge-endpoint is for {SMALLEST}, which {BY_ENDPOINT} names")
    hush()
    folder = Path(".cache/real") / asked.model
    settings = [f"model.path={folder}", *asked.overrides]
    laps: dict[str, float] = {}
    with lap("the model's folder", laps):
        play([sys.executable, "scripts/real_model.py", asked.model, str(folder)])
    config = BY_ENDPOINT if asked.judge_endpoint else CONFIG
    if asked.sga:
        return sga([*settings, *real_sga.SETTINGS], laps)
    with lap("spa plan", laps):
        play([SPA, "plan", config, *settings])
    with judge_server(folder, asked.model, laps) if asked.judge_endpoint else nullcontext():
        result = chain(config, settings, preview=asked.preview, laps=laps)
    run = Path(result["run_dir"])
    print_examples(of_run(read_run(run)))
    trained = Path(result["arms"]["spa"]["iterations"][-1]["model"])
    with lap("vLLM beside transformers", laps):
        print_alike(trained, alike(trained))
    print("seconds: " + ", ".join(f"{name} {seconds:.0f}" for name, seconds in laps.items()))
    print(f"in all {sum(laps.values()) / 60:.1f} minutes; what each stage took stands in {run / 'manifest.json'}")
    if asked.judge_endpoint:
        print("the judge was this small model itself: that tests plumbing, not judgement")
    return 0


def sga(settings: list[str], laps: dict[str, float]) -> int:
    """The run up to its trained model and its answers, and what that model senses of held-out prompts."""
    with lap("spa run", laps):
        result = json.loads(play([SPA, "run", CONFIG, "--json", *settings]))
    run, (done,) = Path(result["run_dir"]), result["arms"][real_sga.ARM]["iterations"]
    scored = run / "held_out_scored"
    with lap("held-out prompts' own answers, scored", laps):
        play([SPA, "generate", CONFIG, "--prompts", HELD_OUT, "--out", str(scored), *settings])
    with lap("spa sense", laps):
        play([SPA, "sense", done["model"], "--prompts", HELD_OUT, "--out", str(run / "sensed"), "model.dtype=float32"])
    sensed, pairs = pq.read_table(run / "sensed" / "scores"), pq.read_table(done["pairs"])
    config = load_config(CONFIG, settings)[real_sga.ARM]
    real_sga.print_sensing(*real_sga.sensing(config, sensed, pairs, scored / "episodes"))
    print_examples(of_run(read_run(run)))
    print("seconds: " + ", ".join(f"{name} {seconds:.0f}" for name, seconds in laps.items()))
    print(f"what each stage took stands in {run / 'manifest.json'}")
    return 0


def chain(config: str, settings: list[str], *, preview: int, laps: dict[str, float]) -> dict[str, Any]:
    """Preview, then run to the pairs and to the end. Returns: the run's `--json` object."""
    if preview:
        with lap("spa preview", laps):
            play([SPA, "preview", config, "--prompts", str(preview), *settings])
    with lap("spa run --until build", laps):
        built = json.loads(play([SPA, "run", config, "--until", "build", "--json", *settings]))
    with lap("spa run", laps):
        found: dict[str, Any] = json.loads(play([SPA, "run", config, "--json", *settings, *loosened(built)]))
    return found


@contextmanager
def judge_server(folder: Path, name: str, laps: dict[str, float]) -> Iterator[None]:
    """The model behind vLLM's own server, where `configs/real-judge.yaml` asks it."""
    log = folder.with_name(f"{name}-server.log")
    with ExitStack() as stack:
        with lap("vLLM's server", laps):
            server = served_model(folder, port=JUDGE_PORT, name=name, context=JUDGE_CONTEXT, log=log)
            url = stack.enter_context(server)
        print(f"\nthe judge: {name} behind {url}/v1 ({log})", flush=True)
        yield


@contextmanager
def lap(name: str, laps: dict[str, float]) -> Iterator[None]:
    """Note how long what is inside takes."""
    began = time.perf_counter()
    yield
    laps[name] = time.perf_counter() - began


def play(command: list[str]) -> str:
    """Run a command, its output shown as it comes; returns its last line. Ends this script where it fails."""
    print(f"\n$ {' '.join(command).replace(SPA, 'spa')}", flush=True)
    last = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        for line in running.stdout:
            if not line.startswith("{"):  # the JSON object of --json is for this script
                print(line, end="", flush=True)
            last = line if line.strip() else last
    if running.returncode != 0:
        raise SystemExit(running.returncode)
    return last


def loosened(built: dict[str, Any]) -> list[str]:
    """The override without which too few pairs would be trained on, said loudly; none where there are enough."""
    pairs = built["arms"]["spa"]["iterations"][0]["funnel"]["pairs"]
    if pairs >= FEWEST_PAIRS:
        return []
    print(
        f"\n*** ONLY {pairs} PAIRS passed the consistency criterion, fewer than {FEWEST_PAIRS}: it is switched OFF "
        "from here on (denoise.consistency=off). What follows shows the machinery, not its worth. ***",
        flush=True,
    )
    return ["denoise.consistency=off"]


def alike(folder: Path) -> Alike:
    """Greedy answers of vLLM to held-out prompts, from the trained folder, beside transformers' logits."""
    from spa_ray.config.models import Model
    from spa_ray.engine import Request, create_engine
    from spa_ray.rollout.chat import Chat

    lines = (ROOT / HELD_OUT).read_text(encoding="utf-8").split("\n")[:CHECKED]
    questions = [json.loads(line)["prompt"] for line in lines]
    engine = create_engine(Model(path=str(folder), dtype="float32", max_model_len=1024), folder)
    try:
        chat = Chat(engine.tokenizer, model=str(folder))
        prompts = [chat.prompt_ids([{"role": "user", "content": question}]) for question in questions]

        async def ask() -> list[list[int]]:
            how = {"max_tokens": CHECKED_TOKENS, "temperature": 0.0, "seed": 0}
            works = [engine.generate(Request(prompt_ids=ids, **how)) for ids in prompts]
            return [completion.token_ids for completion in await asyncio.gather(*works)]

        answers = asyncio.run(ask())
    finally:
        engine.shutdown()
    return compare_greedy(folder, list(zip(prompts, answers, strict=True)), dtype="float32", device="cpu")


def print_alike(folder: Path, found: Alike) -> None:
    others = f", the others at most {found.worst:.2g} of a logit below it" if found.differ else ""
    print(
        f"{folder}: vLLM answered {CHECKED} held-out prompts greedily; of its {found.tokens} tokens "
        f"{found.tokens - found.differ} are transformers' own first choice{others}"
    )


if __name__ == "__main__":
    sys.exit(main())
