"""`spa preview`: a few prompts through one engine, every call as it was sent, and the health of the judge's signal."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from contextlib import closing
from itertools import islice
from typing import Any

import pyarrow as pa

from spa_ray.config.models import Config
from spa_ray.data.left_out import FILE as LEFT_OUT
from spa_ray.data.left_out import ErrorKinds, add_errors, error_lines, write_list
from spa_ray.data.left_out import lines as left_out_lines
from spa_ray.data.prompts import read_prompts
from spa_ray.data.schemas import EPISODES
from spa_ray.engine.cpu_dtype import with_dtype
from spa_ray.evaluation.signal import judge_signal
from spa_ray.generation.episode import RENDER
from spa_ray.generation.preview import preview
from spa_ray.logs import printable
from spa_ray.pipeline.models import fetch_model
from spa_ray.pipeline.plan_prompts import prompt_facts
from spa_ray.pipeline.preflight import prompt_check, thinking_warnings
from spa_ray.pipeline.progress import Progress
from spa_ray.pipeline.recipe import steered
from spa_ray.pipeline.signal import FILE, signal_lines
from spa_ray.pipeline.stages import STAGES
from spa_ray.rollout.chat import open_chat
from spa_ray.steering.asking import conditioning
from spa_ray.steering.guide import Guide
from spa_ray.storage.files import AnyPath, make_folder, write_json, write_text

PROMPTS = 16
IN_FULL = 1  # prompts whose calls are printed
CALLS_FILE = "preview.jsonl"


def preview_prompts(
    config: Config,
    *,
    verbose: bool,
    count: int = PROMPTS,
    every: bool = False,
    out: AnyPath | None = None,
    arms: Mapping[str, Config] | None = None,
) -> dict[str, Any]:
    """The first prompts' episodes without Ray. The calls of the first are printed (`every`: of all), then the signal.
    Of the run's `arms` the signal covers those that would use the episodes of `config`.

    Figures of the first few are told as soon as they are there. With `out`, that folder gets signal.json and every
    call as JSONL; without it nothing is written. Returns: `{"prompts": .., "signal": ..}`.
    """
    config = with_dtype(config)
    arms = sharing(config, arms or {})
    model = fetch_model(config.model)
    chat = None if config.model.own_engine else open_chat(config.model, model)
    notes = thinking_warnings(chat, config)
    check, against = prompt_check(chat, [config]), config.decontaminated_by
    facts = prompt_facts(config.prompts, notes, "prompts", check, against=against)
    dropped = {"prompts": facts.dropped}
    if out is None:
        notes += left_out_lines(dropped)
    else:
        make_folder(out)
        notes += write_list(dropped, out / LEFT_OUT)
    total = facts.count
    rows = list(islice(read_prompts(config.prompts, check=check, against=against), count))
    progress = Progress()
    with closing(progress):
        for line in notes:
            progress.say(f"warning: {line}")

        def first(shown: list[dict[str, Any]]) -> None:
            for line in signal_lines(_signal(shown, config, total, arms)):
                progress.say(line)

        if conditioning(model) is not None:
            guide = Guide(config, model)
            rows = [{**row, RENDER: lambda said, meta=row["meta"]: guide.read(said, meta)[0]} for row in rows]
        progress.say(f"preview    starting an engine with {model}")
        work = preview(config, model, rows, verbose=verbose, on_progress=progress.counter("preview"), on_first=first)
        shown = asyncio.run(work)
        kinds: ErrorKinds = {}
        add_errors(kinds, (prompt["episode"]["error"] for prompt in shown))
        for line in error_lines(kinds, len(shown), where="preview", episodes=None if out is None else out / CALLS_FILE):
            progress.say(f"warning: {line}")
    for prompt in shown if every else shown[:IN_FULL]:
        _print_calls(prompt)
    signal = _signal(shown, config, total, arms)
    print(printable("\n".join(signal_lines(signal))))
    if out is not None:
        make_folder(out)
        write_json(out / FILE, signal)
        write_text(out / CALLS_FILE, "".join(json.dumps(prompt, ensure_ascii=False) + "\n" for prompt in shown))
        print(printable(f"every call: {out / CALLS_FILE}"))
    return {"prompts": shown, "signal": signal}


def sharing(config: Config, arms: Mapping[str, Config]) -> dict[str, Config]:
    """The arms whose episodes of the first iteration are those of `config`."""

    def key(arm: Config) -> str:
        return STAGES["generate"].key(steered(arm, None), {"prompts": arm.prompts.model_dump_json(), "model": ""})

    return {name: arm for name, given in arms.items() if key(arm := with_dtype(given)) == key(config)}


def _signal(shown: list[dict[str, Any]], config: Config, total: int, arms: Mapping[str, Config]) -> dict[str, Any]:
    table = pa.Table.from_pylist([prompt["episode"] for prompt in shown], EPISODES)
    return judge_signal(table, config, prompts=total, arms=arms)


def _print_calls(prompt: dict[str, Any]) -> None:
    print(printable(f"=== {prompt['episode']['prompt_id']}"))
    for call in prompt["calls"]:
        sent = f"--- sent ({call['prompt_tokens']} tokens):\n{call['prompt']}"
        print(printable(f"{sent}\n--- answered: {call['text']}"))
    if prompt["episode"]["error"] is not None:
        print(printable(f"--- error: {prompt['episode']['error']}"))
