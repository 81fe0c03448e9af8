"""Pairs for other trainers: one `pairs.jsonl` in the form that each documents, and what its config needs beside it.

TRL: a conversational preference data set with an explicit prompt. axolotl: `type: chat_template.default` of its DPO.
LLaMA-Factory: `formatting: sharegpt` with `ranking: true`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spa_ray.data.forms import Message
from spa_ray.errors import InputError
from spa_ray.storage.files import AnyPath, make_folder, parquet_dataset, write_text

ROWS = "pairs.jsonl"
COLUMNS = ["prompt", "chosen", "rejected"]
TAGS = {"system": "system", "user": "human", "assistant": "gpt"}
Values = dict[str, Any]


@dataclass(frozen=True)
class Form:
    row: Callable[[list[Message], Message, Message], Values]
    beside: Callable[[Path], Mapping[str, str]] = lambda out: {}  # further files of the folder: name -> text


def trl(prompt: list[Message], chosen: Message, rejected: Message) -> Values:
    return {"prompt": prompt, "chosen": [chosen], "rejected": [rejected]}


def axolotl(prompt: list[Message], chosen: Message, rejected: Message) -> Values:
    return {"messages": prompt, "chosen": chosen, "rejected": rejected}


def axolotl_config(out: Path) -> Mapping[str, str]:
    """The part of its config that reads the file."""
    import yaml

    rows = {"path": str(out / ROWS), "ds_type": "json", "split": "train", "type": "chat_template.default"}
    config = {"rl": "dpo", "chat_template": "tokenizer_default", "datasets": [rows]}
    return {"axolotl.yaml": yaml.safe_dump(config, sort_keys=False)}


def llama_factory(prompt: list[Message], chosen: Message, rejected: Message) -> Values:
    def told(message: Message) -> Values:
        return {"from": TAGS[message["role"]], "value": message["content"]}

    return {"conversations": [told(m) for m in prompt], "chosen": told(chosen), "rejected": told(rejected)}


def llama_factory_info(out: Path) -> Mapping[str, str]:
    """`dataset_dir: OUT, dataset: pairs` reads the file."""
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
    info = {"pairs": {"file_name": ROWS, "formatting": "sharegpt", "ranking": True, "columns": columns}}
    return {"dataset_info.json": json.dumps(info, indent=2) + "\n"}


FORMS = {
    "trl": Form(trl),
    "axolotl": Form(axolotl, axolotl_config),
    "llama_factory": Form(llama_factory, llama_factory_info),
}


def write_pairs(pairs: AnyPath, out: Path, form: str) -> int:
    """Write the folder `out` from a pairs table; returns how many pairs. Raises: InputError, before anything is
    written."""
    if form not in FORMS:
        raise InputError(f"--format {form}: no such form; one of {', '.join(FORMS)}")
    if out.exists():
        raise InputError(f"{out}: exists already; give another --out or remove it")
    count, rows = _rows(pairs)
    make_folder(out)
    with (out / ROWS).open("w", encoding="utf-8") as file:
        for row in rows:
            values = FORMS[form].row(row["prompt"], row["chosen"][0], row["rejected"][0])
            file.write(json.dumps(values, ensure_ascii=False) + "\n")
    for name, text in FORMS[form].beside(out).items():
        write_text(out / name, text)
    return count


def _rows(pairs: AnyPath) -> tuple[int, Iterator[Values]]:
    """How many there are, and each. Raises: InputError for what is no pairs table."""
    try:
        table = parquet_dataset(pairs)
    except FileNotFoundError as e:
        raise InputError(f"{pairs}: no *.parquet in it; give the pairs folder that `spa build` wrote") from e
    if missing := [name for name in COLUMNS if name not in table.schema.names]:
        raise InputError(f"{pairs}: no column {missing[0]!r}; these are no pairs")
    count = table.count_rows()
    if not count:
        raise InputError(f"{pairs}: no pair in it")
    return count, (row for batch in table.to_batches(columns=COLUMNS) for row in batch.to_pylist())
