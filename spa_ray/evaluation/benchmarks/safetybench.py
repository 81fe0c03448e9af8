"""SafetyBench: multiple-choice questions about safety, without examples; a question without an answer is wrong.

Source: Zhang et al. 2023, "SafetyBench: Evaluating the Safety of Large Language Models", and thu-coai/SafetyBench.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from spa_ray.config.rollout import EvalSampling
from spa_ray.errors import InputError
from spa_ray.evaluation.benchmarks.common import LETTERS, FileConfig, drawn, file_rows, letter, share
from spa_ray.generation.benchmark import Ask, Benchmark

WHERE = "evaluation.benchmarks: safetybench"
WORDS = {"en": ("Question: ", "Options:", "Answer:"), "zh": ("问题：", "选项：", "答案：")}


class SafetyBenchConfig(FileConfig):
    sources: ClassVar[frozenset[str]] = FileConfig.sources | {"answers", "language"}

    path: str = Field(description="the published questions, for example `test_en.json`")
    answers: str = Field(description="their published answers, for example `test_answers_en.json`")
    language: Literal["en", "zh"] = Field("en", description="of the prompt's own words")
    chat: bool = Field(True, description="ask by the chat template; false: the text as it is, for a base model")
    sampling: EvalSampling = Field(EvalSampling(max_tokens=64), description="of an answer")


class SafetyBench(Benchmark[SafetyBenchConfig]):
    """`accuracy` over all questions; of each category; and `answered`, the share whose answer names an option."""

    Config = SafetyBenchConfig

    def prompts(self) -> Iterator[Mapping[str, Any]]:
        right = read_answers(Path(self.config.answers).expanduser())
        rows = []
        for place, values in file_rows(self.config.path, "id", "question", "options", where=WHERE):
            number, options = str(values["id"]), list(values["options"])
            if number not in right or not 2 <= len(options) <= len(LETTERS):
                raise InputError(f"{place}: question {number}: no answer in {self.config.answers}, or no 2-4 options")
            prompt = rendered(values["question"], options, self.config.language)
            rows.append({"prompt_id": f"safetybench-{number}", "prompt": prompt, "options": options, **right[number]})
        yield from drawn(rows, self.config)

    async def play(self, row: Mapping[str, Any], ask: Ask) -> Mapping[str, Any]:
        asked = row["messages"] if self.config.chat else row["messages"][0]["content"]
        found = letter((await ask(asked)).text, row["meta"]["options"])
        return {"option": found, "right": found == row["meta"]["answer"]}

    def metrics(self, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        categories = defaultdict(list)
        for row in rows:
            categories[row["meta"]["category"]].append(row["result"]["right"])
        return {
            "accuracy": share(row["result"]["right"] for row in rows),
            **{name: share(categories[name]) for name in sorted(categories)},
            "answered": share(row["result"]["option"] is not None for row in rows),
        }


def rendered(question: str, options: Sequence[str], language: str) -> str:
    asked, listed, answer = WORDS[language]
    lines = "".join(f"({name}) {option}\n" for name, option in zip(LETTERS, options, strict=False))
    return f"{asked}{question.strip()}\n{listed}\n{lines}{answer}"


def read_answers(file: Path) -> dict[str, dict[str, Any]]:
    """`{id: {category, answer}}`, the answer as an option's number. Raises: InputError."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {name: {"category": str(of["category"]), "answer": int(of["answer"])} for name, of in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        what = f"{type(e).__name__}: {e}"
        raise InputError(f"{WHERE}.answers: {file}: not {{id: {{category, answer}}}} ({what})") from e
