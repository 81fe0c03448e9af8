"""Configs, prompts and judges for tests on the scripted engine."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spa_ray.config import arm_configs
from spa_ray.config.models import Config
from spa_ray.engine.scripted import ScriptedEngine
from spa_ray.generation.episode import Episodes
from spa_ray.generation.setup import Task, make_episodes

WEIGHTS = Path(__file__).parent / "data" / "weights"  # a folder that is there; the scripted engine reads its name


def scripted_config(script: Mapping[str, Any] | None = None, **sections: Any) -> Config:
    """A config on the scripted engine; `sections` are merged over small defaults."""
    raw: dict[str, Any] = {
        "model": {"path": "m", "engine": "spa_ray.engine.scripted:ScriptedEngine", "engine_kwargs": dict(script or {})},
        "sampling": {"max_tokens": 60},
        "refine": {"max_tokens": 100},
    }
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section} if isinstance(section, dict) else section
    return arm_configs(raw, [], where="test", stem="test")["main"]


def scripted_episodes(config: Config, task: Task | None = None) -> tuple[Episodes, ScriptedEngine]:
    engine = ScriptedEngine(config.model, WEIGHTS, **config.model.engine_kwargs)
    return make_episodes(config, task or Task(), engine, WEIGHTS), engine


def prompt(text: str = "How do I bake bread?", prompt_id: str | None = None) -> dict[str, Any]:
    return {"prompt_id": prompt_id or text, "messages": [{"role": "user", "content": text}], "meta": "{}"}


def play(config: Config, text: str = "How do I bake bread?", task: Task | None = None) -> dict[str, Any]:
    """One episode's row."""
    episodes, _ = scripted_episodes(config, task)
    return asyncio.run(episodes.run(prompt(text)))


def word_count(messages: Any, meta: Any, answer: str, objective: str) -> float:
    """A judge function: the number of words; it cannot score answers with moss in them."""
    return float("nan") if "moss" in answer else float(len(answer.split()))


def lottery(messages: Any, meta: Any, answer: str, objective: str) -> float:
    """A judge function without sense: a score by the answer's hash, none for one in ten."""
    drawn = int.from_bytes(hashlib.sha256(f"{objective} {answer}".encode()).digest()[:4]) % 100
    return float("nan") if drawn < 10 else 1.0 + drawn % 10


def broken_judge(messages: Any, meta: Any, answer: str, objective: str) -> float:
    raise KeyError(objective)


def flaky_judge(messages: Any, meta: str, answer: str, objective: str) -> float:
    """Fails always at prompts whose meta says `never`, and once where it names a file that is not there yet."""
    told = json.loads(meta)
    if told.get("never"):
        raise RuntimeError("never")
    if "once" in told and not Path(told["once"]).exists():
        Path(told["once"]).touch()
        raise RuntimeError("not yet")
    return 5.0
