"""MMLU: four options a question, the answer's letter generated after five solved examples of the subject.

Source: Hendrycks et al. 2021, "Measuring Massive Multitask Language Understanding"; the prompt is also that of
`mmlu_*_generative` in lm-evaluation-harness.
"""

from __future__ import annotations

import csv
import string
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from spa_ray.config.rollout import EvalSampling
from spa_ray.errors import InputError
from spa_ray.evaluation.benchmarks.common import LETTERS, FileConfig, drawn, letter, share
from spa_ray.generation.benchmark import Ask, Benchmark

WHERE = "evaluation.benchmarks: mmlu"
INTRODUCTION = "The following are multiple choice questions (with answers) about {subject}.\n\n"
Question = tuple[str, list[str], str]  # question, options, the right letter


class MMLUConfig(FileConfig):
    sources: ClassVar[frozenset[str]] = FileConfig.sources | {"shots", "subjects"}

    path: str = Field(description="the published folder: `dev/NAME_dev.csv` and `test/NAME_test.csv`")
    subjects: tuple[str, ...] | None = Field(None, description="null: every subject that has a test file")
    shots: int = Field(5, ge=0, description="solved examples before a question, the first of the subject's dev file")
    chat: bool = Field(True, description="ask by the chat template; false: the text as it is, for a base model")
    sampling: EvalSampling = Field(EvalSampling(max_tokens=32), description="of an answer")


class MMLU(Benchmark[MMLUConfig]):
    """`accuracy`: an answer's letter is right, none is wrong; `macro`: its mean over subjects; `exact_match`: the
    answer's first line is the letter and nothing else, as lm-evaluation-harness counts; `answered`: names a letter."""

    Config = MMLUConfig

    def prompts(self) -> Iterator[Mapping[str, Any]]:
        folder = Path(self.config.path).expanduser()
        there = sorted(f.name.removesuffix("_test.csv") for f in (folder / "test").glob("*_test.csv"))
        if not there:
            raise InputError(f"{WHERE}.path: {str(folder)!r} has no test/NAME_test.csv; give the published folder")
        subjects = there if self.config.subjects is None else self.config.subjects
        yield from drawn((row for subject in subjects for row in self._of(folder, subject)), self.config)

    def _of(self, folder: Path, subject: str) -> Iterator[Mapping[str, Any]]:
        shots = read_questions(folder / "dev" / f"{subject}_dev.csv") if self.config.shots else []
        if len(shots) < self.config.shots:
            raise InputError(f"{WHERE}.shots: {folder}/dev/{subject}_dev.csv has {len(shots)} examples")
        before = INTRODUCTION.format(subject=subject.replace("_", " "))
        before += "".join(f"{rendered(shot)} {shot[2]}\n\n" for shot in shots[: self.config.shots])
        for number, question in enumerate(read_questions(folder / "test" / f"{subject}_test.csv")):
            _, options, right = question
            told = {"subject": subject, "options": options, "answer": right}
            yield {"prompt_id": f"{subject}-{number}", "prompt": before + rendered(question), **told}

    async def play(self, row: Mapping[str, Any], ask: Ask) -> Mapping[str, Any]:
        meta, text = row["meta"], row["messages"][0]["content"]
        answer = (await ask(row["messages"] if self.config.chat else text)).text
        found = letter(answer, meta["options"])
        named = None if found is None else LETTERS[found]
        return {"letter": named, "right": named == meta["answer"], "exact": bare(answer) == meta["answer"]}

    def metrics(self, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        subjects = defaultdict(list)
        for row in rows:
            subjects[row["meta"]["subject"]].append(float(row["result"]["right"]))
        return {
            "accuracy": share(row["result"]["right"] for row in rows),
            "macro": sum(sum(right) / len(right) for right in subjects.values()) / len(subjects),
            "exact_match": share(row["result"]["exact"] for row in rows),
            "answered": share(row["result"]["letter"] is not None for row in rows),
        }


def rendered(question: Question) -> str:
    text, options, _ = question
    listed = "".join(f"\n{name}. {option}" for name, option in zip(LETTERS, options, strict=True))
    return f"{text.strip()}{listed}\nAnswer:"


def bare(answer: str) -> str:
    """The first line without punctuation, in capitals."""
    line = answer.partition("\n")[0].strip()
    return line.translate(str.maketrans("", "", string.punctuation)).upper()


def read_questions(file: Path) -> list[Question]:
    """Raises: InputError for a file that is not there, or a row that is no question."""
    if not file.is_file():
        raise InputError(f"{WHERE}: no file {file}")
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.reader(lines))
    for number, row in enumerate(rows, 1):
        if len(row) != 6 or row[5] not in tuple(LETTERS):
            raise InputError(f"{file}: row {number}: no question, four options and a letter (the files have no header)")
    return [(row[0], row[1:5], row[5]) for row in rows]
