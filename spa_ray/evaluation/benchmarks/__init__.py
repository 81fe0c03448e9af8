"""From the rows of a benchmark that was played to its measures."""

from __future__ import annotations

import json
from typing import Any

from spa_ray.config.benchmark import BenchmarkConfig
from spa_ray.data.episodes import EpisodeFolder
from spa_ray.errors import InputError
from spa_ray.generation.benchmark import make_benchmark
from spa_ray.storage.files import AnyPath


def benchmark_measures(section: BenchmarkConfig, episodes: AnyPath, *, where: str) -> dict[str, Any]:
    """One model's measures, and of how many prompts: `{benchmark, version, n, errors, measures}`.

    Raises: InputError for measures that JSON cannot hold.
    """
    benchmark = make_benchmark(section)
    table = EpisodeFolder(episodes).table(["prompt_id", "messages", "meta", "error"]).sort_by("prompt_id")
    rows = []
    for row in table.to_pylist():
        if row.pop("error") is None:
            meta = json.loads(row["meta"])
            rows.append({**row, "result": meta.pop("result"), "meta": meta})
    try:
        measures = json.loads(json.dumps(dict(benchmark.metrics(rows)), allow_nan=False))
    except (TypeError, ValueError) as e:
        raise InputError(f"{where}: the measures of {section.benchmark} are no plain JSON values ({e})") from e
    errors = table.num_rows - len(rows)
    about = {"benchmark": section.benchmark, "version": benchmark.version}
    return {**about, "n": len(rows), "errors": errors, "measures": measures}
