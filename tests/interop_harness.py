"""One task of lm-evaluation-harness on local files, run by the interpreter of `scripts/interop.sh`; prints JSON.

    python interop_harness.py MODEL_FOLDER FILE_OF_THE_TASK DATA_FOLDER CHANGES

Gives per document, in order, the text that the model was asked (`prompt`), what the harness read (`filtered`) and its
measures. `CHANGES` is JSON of the task; `chat` and `multiturn` in it are the harness's own arguments.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any


def run(model: str, task: str, data: Path, changes: dict[str, Any]) -> list[dict[str, Any]]:
    import lm_eval
    import yaml
    from lm_eval.tasks import TaskManager

    chat, multiturn = changes.pop("chat", False), changes.pop("multiturn", True)
    base = Path(lm_eval.__file__).parent / "tasks" / f"{task}.yaml"
    files = {file.stem: str(file) for file in data.glob("*.jsonl")}
    here = {
        "include": str(base), "task": "local", "dataset_path": "json", "dataset_name": None,
        "dataset_kwargs": {"data_files": files}, **changes,
    }  # fmt: skip
    with TemporaryDirectory() as folder:
        (Path(folder) / "local.yaml").write_text(yaml.safe_dump(here))
        found = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": model, "dtype": "float32", "device": "cpu"},
            tasks=["local"],
            batch_size=1,
            task_manager=TaskManager(include_path=folder, include_defaults=False),
            apply_chat_template=chat,
            fewshot_as_multiturn=multiturn,
            log_samples=True,
            bootstrap_iters=0,
        )
    samples = sorted(found["samples"]["local"], key=lambda sample: sample["doc_id"])
    return [
        {
            "prompt": first_argument(s["arguments"]),
            "filtered": s["filtered_resps"],
            **{m: float(s[m]) for m in s["metrics"]},
        }
        for s in samples
    ]


def first_argument(arguments: Any) -> str:
    """Of the first request of a document, in each form that the harness logs."""
    first = next(iter(arguments.values())) if isinstance(arguments, dict) else arguments[0]
    return next(iter(first.values())) if isinstance(first, dict) else first[0]


if __name__ == "__main__":
    folder, name, rows, with_changes = sys.argv[1:]
    print(json.dumps(run(folder, name, Path(rows), json.loads(with_changes))))
