"""MMLU (arXiv:2009.03300): questions with four choices in 57 subjects. `answer` is the right choice's number.

A local copy is the folder of CSV files without a header (test/SUBJECT_test.csv, dev/, val/), or one of those files.
"""

import csv
from collections.abc import Iterator
from pathlib import Path

from spa_ray.data.named import DataSet, Values, columns, lettered
from spa_ray.data.readers import Row
from spa_ray.errors import InputError

LETTERS = "ABCD"
_row = columns("text")


def row(values: Values) -> Values:
    return _row({**values, "text": lettered(values["question"], values["choices"])})


def read(path: Path, split: str | None) -> Iterator[Row]:
    folder = path / {"validation": "val"}.get(str(split), str(split))
    files = sorted(folder.glob("*.csv")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{folder}: no CSV files in it; MMLU's data.tar has the folders test, val and dev")
    for file in files:
        subject = file.stem.rpartition("_")[0]
        with file.open(newline="", encoding="utf-8-sig") as lines:
            for number, cells in enumerate(csv.reader(lines), 1):
                yield _of_cells(f"{file}: row {number}", cells, subject)


def _of_cells(place: str, cells: list[str], subject: str) -> Row:
    if len(cells) != 6 or cells[5] not in LETTERS or not cells[5]:
        return Row(place, problem=f"{len(cells)} cells; MMLU has a question, four choices and a letter of {LETTERS}")
    question, *choices, letter = cells
    return Row(place, {"question": question, "choices": choices, "answer": LETTERS.index(letter), "subject": subject})


SET = DataSet(
    page="https://github.com/hendrycks/test",
    hub="hf://cais/mmlu/all",
    splits=("test", "validation", "dev", "auxiliary_train"),
    row=row,
    read=read,
)
