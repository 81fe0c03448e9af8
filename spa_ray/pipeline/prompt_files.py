"""The prompts of one command, each source read and checked once: the checks and the run take the same file.

A new command reads its sources again, so that a row that went bad shows at once.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from spa_ray.config.evaluation import Evaluation
from spa_ray.config.models import Config
from spa_ray.data.given import EpisodeCounts, write_episodes
from spa_ray.data.left_out import LeftOut
from spa_ray.data.prompts import Check, PromptCounts, write_prompts
from spa_ray.data.schemas import PROMPTS
from spa_ray.errors import InputError
from spa_ray.evaluation.prompts import EvalPromptCounts, write_eval_prompts
from spa_ray.generation.benchmark import benchmark_prompts


class PromptFiles:
    """Writes a source's prompts to a file of the `PROMPTS` schema; a second time it copies what it wrote, and the
    `check` of that second call is not asked."""

    def __init__(self) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="spa-prompts-")
        self._made: dict[str, tuple[Path, Any]] = {}
        self.dropped: dict[str, LeftOut] = {}  # what was left out of all that was written, by the source's key

    def write(self, config: Config, out: Path, *, skip: int = 0, check: Check | None = None) -> PromptCounts:
        """`config.prompts`, as `data.prompts.write_prompts`. Raises: InputError as it does."""
        prompts, against = config.prompts, config.decontaminated_by
        counts: PromptCounts = self._once(
            f"{skip} {[section.model_dump_json() for section in (prompts, *against)]}",
            out,
            lambda file: write_prompts(prompts, file, skip=skip, check=check, against=against),
        )
        beyond = f", beyond the first {skip:,}" if skip else ""
        self.dropped[f"prompts ({prompts.source}{beyond})"] = counts.dropped
        return counts

    def write_held_out(self, evaluation: Evaluation, out: Path, *, check: Check | None = None) -> EvalPromptCounts:
        """As `evaluation.prompts.write_eval_prompts`. Raises: InputError as it does."""
        sources = evaluation.model_dump_json(include={"prompts", "families"})
        counts: EvalPromptCounts = self._once(
            sources, out, lambda file: write_eval_prompts(evaluation, file, check=check)
        )
        self.dropped |= counts.dropped
        return counts

    def write_benchmark(self, evaluation: Evaluation, name: str, out: Path) -> PromptCounts:
        """The prompts of one of `evaluation.benchmarks`. Raises: InputError as `benchmark_prompts` does."""

        def write(file: Path) -> PromptCounts:
            rows = list(benchmark_prompts(section, where=where))
            pq.write_table(pa.Table.from_pylist(rows, schema=PROMPTS), file)
            return PromptCounts(rows=len(rows))

        section, where = evaluation.benchmarks[name], f"evaluation.benchmarks.{name}"
        counts: PromptCounts = self._once(f"{where} {section.model_dump_json()}", out, write)
        return counts

    def write_episodes(self, config: Config, out: Path) -> EpisodeCounts:
        """As `data.given.write_episodes`. Raises: InputError, also where no attribute is named."""
        section, scores = config.episodes, not config.labels_given
        if section.attributes is None:
            raise InputError("episodes.attributes: missing; name the scores to train on, highest priority first")
        key = f"episodes {scores} {section.model_dump_json()}"
        counts: EpisodeCounts = self._once(key, out, lambda file: write_episodes(section, file, scores=scores))
        self.dropped[f"episodes ({section.source})"] = counts.dropped
        return counts

    def _once(self, key: str, out: Path, write: Callable[[Path], Any]) -> Any:
        if key not in self._made:
            file = Path(self._scratch.name) / f"{len(self._made)}.parquet"
            self._made[key] = (file, write(file))
        file, counts = self._made[key]
        shutil.copyfile(file, out)
        return counts
