"""SafetyBench (arXiv:2309.07045): 11,435 questions with options, in English and in Chinese.

`answer` is the right option's number. The hub has none; a local test_SPLIT.json gets them from test_answers_SPLIT.json
beside it, where that is there.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from spa_ray.config.prompts import Prompts
from spa_ray.data.named import DataSet, Values, columns, lettered
from spa_ray.data.readers import Row, read_rows
from spa_ray.errors import InputError

_row = columns("text")


def row(values: Values) -> Values:
    return _row({**values, "text": lettered(values["question"], values["options"], "({}) {}")})


def read(path: Path, split: str | None) -> Iterator[Row]:
    file = path / f"test_{split}.json" if path.is_dir() else path
    beside = file.with_name(file.name.replace("test_", "test_answers_", 1))
    answers = _answers(beside) if beside != file and beside.is_file() else {}
    for found in read_rows(Prompts(source=str(file.absolute()))):
        answer = answers.get(str((found.values or {}).get("id")), {})
        yield Row(found.place, {**found.values, **answer}) if found.values is not None else found


def _answers(file: Path) -> Values:
    """Raises: InputError."""
    try:
        found = json.loads(file.read_bytes())
    except ValueError as e:
        raise InputError(f"{file}: no JSON ({e})") from e
    if not isinstance(found, dict) or not all(isinstance(answer, dict) for answer in found.values()):
        raise InputError(f"{file}: not {{id: {{category, answer}}}}")
    return found


SET = DataSet(
    page="https://huggingface.co/datasets/thu-coai/SafetyBench",
    hub="hf://thu-coai/SafetyBench/test",
    splits=("en", "zh", "zh_subset"),
    row=row,
    read=read,
)
