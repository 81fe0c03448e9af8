"""A folder of plugs, each one file outside the package (docs/examples), and a config that names all of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from spa_ray.cli.demo import demo_config

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
PLUGS = (
    "slic",
    "plain_words",
    "questions",
    "transformers_engine",
    "on_topic",
)  # method, judge, source, engine, benchmark


def plug_config(home: Path, **resources: Any) -> dict[str, Any]:
    """Copies the files to `home` and writes `home/c.yaml`. Returns: the config."""
    for name in PLUGS:
        shutil.copy(EXAMPLES / f"{name}.py", home)
    demo = demo_config(full=False)
    raw = {
        **{key: demo[key] for key in ("objectives", "scoring", "refine")},
        "model": {**demo["model"], "engine": "transformers_engine:TransformersEngine"},
        "prompts": {"source": "questions:questions", "limit": 4},
        "sampling": {**demo["sampling"], "max_tokens": 40},
        "denoise": {"consistency": "off", "informativeness": False},
        "pairs": {"delta": 1},
        "train": {
            "method": "slic:SLiC",
            "margin": 0.5,
            "dtype": "float32",
            "batch_size": 4,
            "max_length": 256,
            "lr": 1e-4,
        },
        "evaluation": {
            "prompts": {"source": "questions:questions", "split": "test", "limit": 3},
            "judge": "plain_words:judge",
            "sampling": {"max_tokens": 40},
            "benchmarks": {"topic": {"benchmark": "on_topic:OnTopic", "sampling": {"max_tokens": 40}}},
        },
        "resources": {"concurrency": 4, **resources},
        "run_dir": str(home / "run"),
    }
    (home / "c.yaml").write_text(json.dumps(raw))
    return raw
