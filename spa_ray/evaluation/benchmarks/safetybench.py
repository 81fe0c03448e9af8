"""SafetyBench: multiple-choice questions about safety, without examples; a question without an answer is wrong.

Source: Zhang et al. 2023, "SafetyBench: Evaluating the Safety of Large Language Models", and thu-coai/SafetyBench.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from spa_ray.config.rollout import EvalSampling
from spa_ray.errors import InputError
from spa_ray.evaluation.benchmarks.common import LETTERS, NamedConfig, drawn, letter, named_rows, share
from spa_ray.generation.benchmark import Ask, Benchmark

WHERE = "evaluation.benchmarks: safetybench"
WORDS = {"en": ("Question: ", "Options:", "Answer:"), "zh": ("问题：", "选项：", "答案：")}


class SafetyBenchConfig(NamedConfig):
    sources: ClassVar[frozenset[str]] = NamedConfig.sources | {"split"}

    path: str | None = Field(
        None,
        description="local copy: `test_SPLIT.json` with `test_answers_SPLIT.json` beside it, or the folder of both; the"
        " hub has no answers",
    )
    split: Literal["en", "zh", "zh_subset"] = Field("en", description="the language, also of the prompt's own words")
    chat: bool = Field(True, description="ask by the chat template; false: the text as it is, for a base model")
    sampling: EvalSampling = Field(EvalSampling(max_tokens=64), description="of an answer")


class SafetyBench(Benchmark[SafetyBenchConfig]):
    """`accuracy` over all questions; of each category; and `answered`, the share whose answer names an option."""

    Config = SafetyBenchConfig

    def prompts(self) -> Iterator[Mapping[str, Any]]:
        config, rows = self.config, []
        for place, values in named_rows("safetybench", config, "options", "category", split=config.split, where=WHERE):
            number, options, answer = str(values["id"]), list(values["options"]), values.get("answer")
            if answer not in range(len(options)) or len(options) > len(LETTERS):
                raise InputError(f"{place}: {WHERE}.path: question {number} has no answer: see test_answers_SPLIT.json")
            prompt = rendered(values["question"], options, config.split[:2])
            told = {"options": options, "category": values["category"], "answer": answer}
            rows.append({"prompt_id": f"safetybench-{number}", "prompt": prompt, **told})
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
