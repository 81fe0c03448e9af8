"""A training job's metrics on Ray's Prometheus endpoint (docs/OBSERVABILITY.md names them all).

Comes in: the rows of `train_log.jsonl`, as rank 0 writes them. Goes out: gauges, tagged with run and train_job
(`job` is a label of Prometheus' own). Never: torch.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

from spa_ray.logs.metrics import Metric, Recorder

REPEAT_SECONDS = 5.0


def _gauge(name: str, about: str) -> Metric:
    return Metric(f"spa_train_{name}", "gauge", about, ("train_job",))


# A column of the log -> its metric.
COLUMNS = {
    "step": _gauge("step", "optimizer steps done"),
    "steps": _gauge("steps", "optimizer steps of the whole job"),
    "loss": _gauge("loss", "of the last step"),
    "grad_norm": _gauge("grad_norm", "of the last step, before clipping"),
    "learning_rate": _gauge("learning_rate", "of the last step"),
    "rewards/accuracies": _gauge("reward_accuracy", "share of the last step's pairs that are ranked right"),
    "tokens/s": _gauge("tokens_per_second", "of the last step, over all ranks"),
    "pairs/s": _gauge("pairs_per_second", "of the last step, over all ranks"),
    "memory/peak_gib": _gauge("memory_peak_gib", "of rank 0"),
}
METRICS = tuple(COLUMNS.values())


class TrainMetrics:
    """Built in a Ray Train worker, once for all its jobs; rank 0's alone is called.

    Ray forgets a gauge that is not set again within two of its reports (20 s), and a step can take longer: a thread
    says the last row again.
    """

    def __init__(self, *, run: str, every: float = REPEAT_SECONDS) -> None:
        self._record = Recorder(METRICS, {"run": run})
        self._last: Mapping[str, Any] = {}
        self._every = every
        threading.Thread(target=self._repeat, daemon=True, name="train-metrics").start()

    def row(self, logged: Mapping[str, Any]) -> None:
        """A row of a job's log, which carries the job's name as `job`. A column that a method does not log is left."""
        self._last = logged
        self._set(logged)

    def _set(self, logged: Mapping[str, Any]) -> None:
        for column, metric in COLUMNS.items():
            if column in logged:
                self._record.set(metric, float(logged[column]), train_job=str(logged["job"]))

    def _repeat(self) -> None:
        while True:
            time.sleep(self._every)
            self._set(self._last)
