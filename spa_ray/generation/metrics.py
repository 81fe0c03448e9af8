"""An engine's metrics on Ray's Prometheus endpoint (docs/OBSERVABILITY.md names them all).

Comes in: calls of the engine's actor, a handful a prompt and one a second. Goes out: counters, gauges and a histogram,
tagged with run, stage and engine. Never: text, prompt ids (a series each), anything that slows an episode.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from spa_ray.logs.metrics import Metric, Recorder

STARTED = Metric("spa_prompts_started_total", "counter", "prompts whose episode began")
DONE = Metric("spa_prompts_done_total", "counter", "prompts whose episode ended well")
FAILED = Metric("spa_prompts_failed_total", "counter", "prompts whose episode became an error row", ("error",))
PROMPT_TOKENS = Metric("spa_prompt_tokens_total", "counter", "tokens read by the engine, of finished episodes")
GENERATED_TOKENS = Metric("spa_generated_tokens_total", "counter", "tokens written by the engine, of finished episodes")
JUDGEMENTS = Metric("spa_judgements_total", "counter", "judgements of finished episodes, by status", ("status",))
SECONDS = Metric(
    "spa_episode_seconds",
    "histogram",
    "from the start of a prompt's episode to its end",
    bounds=(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500),
)
IN_FLIGHT = Metric("spa_prompts_in_flight", "gauge", "prompts inside the engine")
BUSY = Metric("spa_engine_busy_ratio", "gauge", "share of the last interval that the engine was at work, 0 to 1")
REQUESTS = Metric("spa_requests_total", "counter", "requests that the engine answered")

METRICS = (STARTED, DONE, FAILED, PROMPT_TOKENS, GENERATED_TOKENS, JUDGEMENTS, SECONDS, IN_FLIGHT, BUSY, REQUESTS)

_KIND = re.compile(r"[a-z][a-z_]{0,31}")


class EngineMetrics:
    """Built inside the engine's actor; any thread may call."""

    def __init__(self, *, run: str, stage: str, engine: str) -> None:
        self._record = Recorder(METRICS, {"run": run, "stage": stage, "engine": engine})
        self._requests = 0

    def started(self) -> None:
        """An episode begins."""
        self._record.add(STARTED)

    def finished(self, row: Mapping[str, Any], seconds: float) -> None:
        """An episode ended `seconds` after it began, in this row of EPISODES."""
        record = self._record
        if row["error"] is None:
            record.add(DONE)
        else:
            record.add(FAILED, error=kind_of(row["error"]))
        record.add(PROMPT_TOKENS, row["prompt_tokens"])
        record.add(GENERATED_TOKENS, row["generated_tokens"])
        record.observe(SECONDS, seconds)
        statuses = Counter(kind_of(s) for response in row["responses"] or () for s in response["score_status"] or ())
        for status, count in statuses.items():
            record.add(JUDGEMENTS, count, status=status)

    def engine(self, busy: float, in_flight: int, requests: int = 0) -> None:
        """Once in a while: the share of the time since the last call that the engine worked (0 to 1), the prompts that
        are inside, and how many requests it has answered since it was loaded."""
        self._record.set(BUSY, min(max(busy, 0.0), 1.0))
        self._record.set(IN_FLIGHT, in_flight)
        self._record.add(REQUESTS, requests - self._requests)
        self._requests = requests


def kind_of(text: str) -> str:
    """What stands before the colon of an error or a judgement's status; a tag must not take ever new values."""
    kind = text.partition(":")[0]
    return kind if _KIND.fullmatch(kind) else "other"
