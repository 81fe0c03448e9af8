"""Pairs tables and jobs for the training tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from spa_ray.config.training import train_section
from spa_ray.data.schemas import PAIRS
from spa_ray.training.job import TrainJob

WORDS = ["ward", "charm", "rune", "kettle", "lamp", "river", "salt", "moon", "brass", "owl"]


OBJECTIVES, RANGES = ("harmless", "helpful"), ([1.0, 10.0], [1.0, 10.0])  # of `pair_rows`


def pair_rows(n: int, *, vocab: int = 265, seed: int = 0, longest: int = 24) -> list[dict[str, Any]]:
    """Rows of the pairs schema with random scores and random response ids of very unequal lengths."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        scores = rng.integers(1, 11, size=(2, 2)).astype(float)
        ids = [rng.integers(8, vocab, size=int(k)).tolist() for k in rng.integers(1, longest, size=2)]
        question = " ".join(rng.choice(WORDS, size=int(rng.integers(1, 8))))
        rows.append(
            {
                "pair_id": f"p{i // 2:05d}:{i % 2}:5",
                "prompt_id": f"p{i // 2:05d}",
                "prompt": [{"role": "user", "content": question}],
                "chosen": [{"role": "assistant", "content": "c"}],
                "rejected": [{"role": "assistant", "content": "r"}],
                "chosen_index": i % 2,
                "rejected_index": 5,
                "chosen_ids": ids[0],
                "rejected_ids": ids[1],
                "chosen_scores": scores[0].tolist(),
                "rejected_scores": scores[1].tolist(),
                "margin": float(np.abs(scores[0] - scores[1]).sum()),
                "gap": float(abs(scores[0].sum() - scores[1].sum())),
                "decided_by": "harmless",
                "kind": "candidate",
            }
        )
    return rows


def write_pairs(path: Path, rows: list[dict[str, Any]], **metadata: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = PAIRS.with_metadata({name: json.dumps(value) for name, value in metadata.items()})
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return path


def make_job(folder: Path, model: Path, pairs: Path, *, name: str = "job", seed: int = 0, **train: Any) -> TrainJob:
    """A job in float32 with a learning rate at which a tiny model moves."""
    settings = {"lr": 2e-4, "dtype": "float32", "max_length": 128, "batch_size": 8, "zero_stage": 2, **train}
    return TrainJob(
        name=name,
        pairs=pairs,
        model=model,
        out=folder / name / "model",
        work=folder / name / "work",
        train=train_section(settings),
        seed=seed,
    )
