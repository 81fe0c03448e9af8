"""Exported pairs as axolotl and LLaMA-Factory read them, run by the interpreter of `scripts/interop.sh`; prints JSON.

    python interop_trainers.py axolotl|llama_factory FOLDER MODEL_FOLDER

Gives every pair as the trainer has it: `prompt`, `chosen` and `rejected` as text (axolotl, by the model's chat
template) or as messages (LLaMA-Factory). Both are installed without what training needs.
"""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any


def axolotl(folder: Path, model: str) -> list[dict[str, Any]]:
    import yaml
    from axolotl.prompt_strategies.dpo import load
    from datasets import load_dataset
    from transformers import AutoTokenizer

    config = yaml.safe_load((folder / "axolotl.yaml").read_text())
    (section,) = config["datasets"]
    rows = load_dataset(section["ds_type"], data_files=section["path"], split=section["split"])
    transform, _ = load(section["type"], config, dataset_idx=0)
    tokenizer = AutoTokenizer.from_pretrained(model)
    return [transform(row, tokenizer=tokenizer) for row in rows]


def llama_factory(folder: Path, model: str) -> list[dict[str, Any]]:
    sound = sys.modules["torchaudio"] = ModuleType("torchaudio")  # imported for sounds, of which there are none
    sound.__spec__ = ModuleSpec("torchaudio", None)
    from datasets import load_dataset
    from llamafactory.data.converter import align_dataset
    from llamafactory.data.parser import get_dataset_list

    (found,) = get_dataset_list(["pairs"], str(folder))
    rows = load_dataset("json", data_files=str(folder / found.dataset_name), split="train")
    settings = SimpleNamespace(streaming=False, preprocessing_num_workers=1, overwrite_cache=True)
    table = align_dataset(rows, found, settings, SimpleNamespace(local_process_index=0))
    return [
        {
            "prompt": row["_prompt"],
            "system": row["_system"],
            "chosen": row["_response"][0],
            "rejected": row["_response"][1],
        }
        for row in table
    ]


if __name__ == "__main__":
    name, out, tokenizer_of = sys.argv[1:]
    print(json.dumps({"axolotl": axolotl, "llama_factory": llama_factory}[name](Path(out), tokenizer_of)))
