"""One family's folder, conversations, pairs and jobs, made once and used by every check of it."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from torch import Tensor

from spa_ray.rollout.settings import ChatSettings
from spa_ray.rollout.tokenizer import load_tokenizer
from spa_ray.training import loop
from spa_ray.training.forward import Rows
from spa_ray.training.job import TrainJob
from spa_ray.training.policy import make_engine
from spa_ray.training.prepare import prepare
from tests.families import checks
from tests.families.build import build_family
from tests.families.table import CONTEXT, FAMILIES, Family
from tests.training_support import make_job, pair_rows, write_pairs

SYSTEM = "Be brief, exact and friendly."
LONG = " ".join(f"Lamp {k} is behind kettle {k * 7} and salt {k * 3}." for k in range(12))
TALK = [
    {"role": "user", "content": "Which river is the longest?"},
    {"role": "assistant", "content": "<think>Nile or Amazon.</think>\n\nThe Nile."},
    {"role": "user", "content": "And the second one?"},
]
CONVERSATIONS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "Why?"}],
    [{"role": "user", "content": "Say why 10 is more than 9.\n\nThen say it again, 日本 ☃  "}],
    [{"role": "user", "content": LONG}],
    TALK,
    [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "How long is it?"}],
    [{"role": "system", "content": SYSTEM}, *TALK],
]
LENGTHS = (130, 9, 60, 1, 90, 33)  # of the pairs' answers


@dataclass
class Case:
    """`found` is the family's row: whatever the checks measured, by name."""

    name: str
    home: Path
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def family(self) -> Family:
        return FAMILIES[self.name]

    @cached_property
    def folder(self) -> Path:
        return build_family(self.family, self.home / "model")

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.folder)

    @property
    def settings(self) -> ChatSettings:
        """Another day than today's, and no thinking where the template knows it."""
        kwargs = {"enable_thinking": False} if self.family.thinking else {}
        return ChatSettings(kwargs=kwargs, date=dt.date(2026, 3, 1), date_given=True)

    @cached_property
    def ends(self) -> list[int]:
        return list(self.tokenizer.convert_tokens_to_ids(list(self.family.ends)))

    @cached_property
    def pairs(self) -> Path:
        """Random answers of unequal lengths, each closed by one of the family's end tokens, to `CONVERSATIONS`."""
        rng = np.random.default_rng(0)
        rows = pair_rows(len(CONVERSATIONS))
        for i, (row, messages) in enumerate(zip(rows, CONVERSATIONS, strict=True)):
            row.update(pair_id=f"p{i}:0:5", prompt_id=f"p{i}", prompt=messages)
            for side, length in (("chosen", LENGTHS[i]), ("rejected", LENGTHS[-1 - i])):
                body = rng.integers(10, len(self.tokenizer), size=length).tolist()
                row[f"{side}_ids"] = [*body, self.ends[i % len(self.ends)]]
        return write_pairs(self.home / "pairs.parquet", rows)

    def job(self, name: str, **train: Any) -> TrainJob:
        settings = {"max_length": 640, "micro_batch_tokens": 800, "batch_size": 6, "epochs": 2, **train}
        job = make_job(self.home, self.folder, self.pairs, name=name, **settings)
        return replace(job, context=CONTEXT, chat=self.settings)

    @cached_property
    def rendered(self) -> list[list[int]]:
        """The prompt ids in training's token file, per conversation."""
        data = prepare(self.job("tokens")).data
        ids = {data.pair_id(i): data.ids("prompt_ids", i).tolist() for i in range(len(CONVERSATIONS))}
        return [ids[f"p{i}:0:5"] for i in range(len(CONVERSATIONS))]

    @cached_property
    def rows(self) -> Rows:
        """Training's sequences: the chosen and rejected answers under their prompts."""
        answers = pq.read_table(self.pairs, columns=["chosen_ids", "rejected_ids"]).to_pylist()
        return [
            (np.array(prompt), np.array(answer[side]))
            for prompt, answer in zip(self.rendered, answers, strict=True)
            for side in ("chosen_ids", "rejected_ids")
        ]

    @cached_property
    def truth(self) -> list[Tensor]:
        return checks.true_logps(checks.plain_model(self.folder), self.rows)

    @cached_property
    def trained(self) -> tuple[TrainJob, Tensor]:
        """Two steps of full training, and the trained policy's log-probs of `rows`."""
        return self._train(self.job("full", lr=5e-4))

    @cached_property
    def adapted(self) -> tuple[TrainJob, Tensor]:
        """The same with LoRA."""
        return self._train(self.job("lora", lr=5e-3, lora={"r": 4, "alpha": 16}))

    def _train(self, job: TrainJob) -> tuple[TrainJob, Tensor]:
        import torch

        seen: list[Tensor] = []
        export = loop.export_model

        def look_and_export(job: TrainJob, engine: Any, beside: Any) -> None:
            with torch.no_grad():
                policy = engine.module
                seen.append(policy.token_logps(policy.collate(self.rows, "cpu")).clone())
            export(job, engine, beside)

        loop.export_model = look_and_export
        try:
            loop.run_job(job)
        finally:
            loop.export_model = export
        return job, seen[0]

    @contextmanager
    def policy(self, **train: Any) -> Iterator[Any]:
        """The module that a job with these settings trains, without a step."""
        engine = make_engine(self.job("layout", zero_stage=0, **train))
        try:
            yield engine.module
        finally:
            loop.dispose(engine)
