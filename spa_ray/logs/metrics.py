"""Metrics on Ray's Prometheus endpoint: what one is, and the Ray object that records it.

Comes in: a `Metric` (name, kind, tags). Goes out: the numbers of this process, which Ray's agent on each node exports
under the name `ray_NAME`. Never: a name that is made up at run time, so that dashboards and tests can know them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Metric:
    """One metric. Counters' names end in `_total`, as Prometheus has it; `bounds` are a histogram's buckets."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    about: str
    tags: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()

    def exported(self) -> tuple[str, ...]:
        """The series that Prometheus sees."""
        parts = ("_bucket", "_sum", "_count") if self.kind == "histogram" else ("",)
        return tuple(f"ray_{self.name}{part}" for part in parts)


class Recorder:
    """Ray's objects for some metrics, with tags that stay the same in this process. Needs a process of Ray's."""

    def __init__(self, metrics: tuple[Metric, ...], fixed: Mapping[str, str]) -> None:
        self._fixed = dict(fixed)
        self._made = {metric.name: _make(metric, tuple(self._fixed)) for metric in metrics}

    def add(self, metric: Metric, amount: float = 1, **tags: str) -> None:
        """Count; an amount of 0 is no news."""
        if amount > 0:
            self._made[metric.name].inc(amount, tags={**self._fixed, **tags})

    def set(self, metric: Metric, value: float, **tags: str) -> None:
        self._made[metric.name].set(value, tags={**self._fixed, **tags})

    def observe(self, metric: Metric, value: float, **tags: str) -> None:
        self._made[metric.name].observe(value, tags={**self._fixed, **tags})


def _make(metric: Metric, fixed: tuple[str, ...]) -> Any:
    from ray.util import metrics as ray_metrics

    keys = (*fixed, *metric.tags)
    if metric.kind == "histogram":
        return ray_metrics.Histogram(metric.name, metric.about, boundaries=list(metric.bounds), tag_keys=keys)
    return {"counter": ray_metrics.Counter, "gauge": ray_metrics.Gauge}[metric.kind](
        metric.name, metric.about, tag_keys=keys
    )
