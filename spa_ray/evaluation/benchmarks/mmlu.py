"""MMLU: four options a question, the answer's letter generated after five solved examples of the subject.

Source: Hendrycks et al. 2021, "Measuring Massive Multitask Language Understanding"; the prompt is also that of
`mmlu_*_generative` in lm-evaluation-harness, as plain text and, with `chat: turns`, by a chat template.
"""

from __future__ import annotations

import string
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from spa_ray.config.rollout import EvalSampling
from spa_ray.errors import InputError
from spa_ray.evaluation.benchmarks.common import LETTERS, NamedConfig, drawn, letter, named_rows, share
from spa_ray.generation.benchmark import Ask, Benchmark

WHERE = "evaluation.benchmarks: mmlu"
COLUMNS = ("question", "choices", "answer", "subject")
INTRODUCTION = "The following are multiple choice questions (with answers) about {subject}.\n\n"
BEHIND = {"system": "", "user": " ", "assistant": "\n\n"}  # each turn, where all are one text
Values = Mapping[str, Any]
Turns = list[dict[str, str]]


class MMLUConfig(NamedConfig):
    sources: ClassVar[frozenset[str]] = NamedConfig.sources | {"shots", "subjects"}

    subjects: tuple[str, ...] | None = Field(None, description="null: all")
    shots: int = Field(5, ge=0, description="solved examples before a question, the first of the subject's dev split")
    chat: bool | Literal["turns"] = Field(
        True,
        description="ask by the chat template, in one user message; turns: the introduction as the system message, each"
        " example as two turns; false: the text as it is, for a base model",
    )
    sampling: EvalSampling = Field(EvalSampling(max_tokens=32), description="of an answer")


class MMLU(Benchmark[MMLUConfig]):
    """`accuracy`: an answer's letter is right, none is wrong; `macro`: its mean over subjects; `exact_match`: the
    answer's first line is the letter and nothing else, as lm-evaluation-harness counts; `answered`: names a letter."""

    Config = MMLUConfig

    def prompts(self) -> Iterator[Mapping[str, Any]]:
        before = self._before() if self.config.shots else {}
        numbers: Counter[str] = Counter()
        rows: list[Mapping[str, Any]] = []
        for place, values in named_rows("mmlu", self.config, *COLUMNS, split="test", where=WHERE):
            subject = str(values["subject"])
            if self.config.subjects is not None and subject not in self.config.subjects:
                continue
            if len(before.get(subject, ())) < 2 * self.config.shots:
                raise InputError(f"{place}: {WHERE}.shots: the dev split has fewer examples of {subject}")
            introduction = {"role": "system", "content": INTRODUCTION.format(subject=subject.replace("_", " "))}
            turns = [introduction, *before.get(subject, ()), {"role": "user", "content": rendered(values)}]
            told = {"subject": subject, "options": list(values["choices"]), "answer": LETTERS[values["answer"]]}
            asked = turns if self.config.chat == "turns" else one_message(turns)
            rows.append({"prompt_id": f"{subject}-{numbers[subject]}", "messages": asked, **told})
            numbers[subject] += 1
        if unknown := set(self.config.subjects or ()) - numbers.keys():
            raise InputError(f"{WHERE}.subjects: there are no questions about {min(unknown)}")
        yield from drawn(rows, self.config)

    def _before(self) -> dict[str, Turns]:
        """The solved examples of each subject."""
        if self.config.path is not None and Path(self.config.path).expanduser().is_file():
            raise InputError(f"{WHERE}.path: give the folder of dev/ and test/, or shots: 0 with one file")
        found: dict[str, Turns] = defaultdict(list)
        for _, values in named_rows("mmlu", self.config, *COLUMNS, split="dev", where=WHERE):
            turns = found[str(values["subject"])]
            if len(turns) < 2 * self.config.shots:
                turns += [
                    {"role": "user", "content": rendered(values)},
                    {"role": "assistant", "content": LETTERS[values["answer"]]},
                ]
        return found

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


def rendered(values: Values) -> str:
    listed = "".join(f"\n{name}. {option}" for name, option in zip(LETTERS, values["choices"], strict=True))
    return f"{values['question'].strip()}{listed}\nAnswer:"


def one_message(turns: Turns) -> Turns:
    text = "".join(turn["content"] + BEHIND[turn["role"]] for turn in turns)
    return [{"role": "user", "content": text.removesuffix(BEHIND["user"])}]


def bare(answer: str) -> str:
    """The first line without punctuation, in capitals."""
    line = answer.partition("\n")[0].strip()
    return line.translate(str.maketrans("", "", string.punctuation)).upper()
