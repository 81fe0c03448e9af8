"""The family `utility` as a benchmark: exact tasks that no training shows, the stand-in for general ability."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pydantic import Field

from spa_ray.config.benchmark import BenchmarkConfig
from spa_ray.evaluation.bootstrap import mean_interval
from spa_ray.generation.benchmark import Ask, Benchmark
from spa_ray.microworld.prompts import utility


class UtilityConfig(BenchmarkConfig):
    split: str = Field("test", description="train, validation or test")
    limit: int = Field(300, ge=1, description="take the first N prompts")
    max_tokens: int = Field(80, ge=1, description="of an answer")


class Utility(Benchmark[UtilityConfig]):
    """The share of answers that equal the task's own."""

    Config = UtilityConfig

    def prompts(self) -> Iterator[Mapping[str, Any]]:
        return utility(self.config.split)

    async def play(self, row: Mapping[str, Any], ask: Ask) -> Mapping[str, Any]:
        answer = await ask(row["messages"], temperature=0.0, max_tokens=self.config.max_tokens)
        return {"exact": answer.text.strip() == row["meta"]["answer"]}

    def metrics(self, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        exact = [float(row["result"]["exact"]) for row in rows]
        return {"exact": asdict(mean_interval(exact, resamples=1000, seed=0))}
