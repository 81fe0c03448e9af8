"""MT-Bench: questions of two turns, each answer rated 1 to 10 by a judge (the single-v1 protocol in our own words).

Source: Zheng et al. 2023, "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena", and lm-sys/FastChat: temperatures,
which categories have reference answers, one judgement a turn, the second with the whole conversation.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

from pydantic import Field

from spa_ray.config.rollout import EvalSampling
from spa_ray.errors import InputError
from spa_ray.evaluation.benchmarks.common import drawn, file_rows, named_rows
from spa_ray.evaluation.benchmarks.judged import JudgedConfig, judged, rated
from spa_ray.evaluation.bootstrap import ratio_interval
from spa_ray.generation.benchmark import Ask, Benchmark
from spa_ray.generation.judging import together

WHERE = "evaluation.benchmarks: mt_bench"
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}  # others 0
WITH_REFERENCE = ("math", "reasoning", "coding")
RATING = re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]")
TASK = """\
You rate the answer of an assistant to {what}. Judge as a fair expert would: whether it is correct, relevant, helpful, \
deep, creative and detailed enough for what was asked.{compare} First explain your view in a few sentences. Then end \
with a rating from 1 to 10 in this form: Rating: [[5]]"""
COMPARE = " A reference answer is given: compare with it, and name the mistakes in the assistant's."


class MTBenchConfig(JudgedConfig):
    sources: ClassVar[frozenset[str]] = JudgedConfig.sources | {"references"}

    references: str | None = Field(
        None, description="`reference_answer_gpt-4.jsonl`, for math, reasoning and coding; null: the questions' own"
    )
    sampling: EvalSampling = Field(EvalSampling(), description="of an answer; the category sets the temperature")


class MTBench(Benchmark[MTBenchConfig]):
    """`score`: the mean of all ratings; of each turn and category; and `unjudged`, ratings that could not be read."""

    Config = MTBenchConfig
    questions = judgements = 2
    judged = "rate"

    def prompts(self) -> Iterator[Mapping[str, Any]]:
        given = {} if self.config.references is None else read_references(self.config.references)
        rows = []
        for place, values in named_rows("mt_bench", self.config, "category", "turns", where=WHERE):
            category, number = str(values["category"]), str(values.get("question_id", values.get("prompt_id")))
            reference = list(given.get(number) or values.get("reference") or []) if category in WITH_REFERENCE else []
            if len(values["turns"]) != 2 or (category in WITH_REFERENCE and len(reference) != 2):
                raise InputError(
                    f"{place}: {WHERE}: two turns, and for {category} two reference answers, are needed; see references"
                )
            told = {"category": category, "turns": list(values["turns"]), "reference": reference}
            rows.append({"prompt_id": f"mt_bench-{number}", "prompt": values["turns"][0], **told})
        yield from drawn(rows, self.config)

    async def play(self, row: Mapping[str, Any], ask: Ask) -> Mapping[str, Any]:
        meta, messages, answers = row["meta"], [], []
        for turn in meta["turns"]:
            messages.append({"role": "user", "content": turn})
            answer = await ask(messages, temperature=TEMPERATURES.get(meta["category"], 0.0))
            answers.append(answer.text)
            messages.append({"role": "assistant", "content": answer.text})
        if not self.config.writes_text:
            return {"ratings": await together([rated(ask, messages[: 2 * k]) for k in (1, 2)])}
        asked = [judge_prompt(meta["turns"][:k], answers[:k], meta["reference"][:k]) for k in (1, 2)]
        return {"ratings": await together([judged(ask, text, rating, self.config) for text in asked])}

    def metrics(self, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        found = {row["prompt_id"]: [judgement["verdict"] for judgement in row["result"]["ratings"]] for row in rows}
        categories = defaultdict(list)
        for row in rows:
            categories[row["meta"]["category"]].append(found[row["prompt_id"]])
        every = list(found.values())
        return {
            "score": mean_rating(every),
            **{f"turn {k + 1}": mean_rating([[ratings[k]] for ratings in every]) for k in range(2)},
            **{name: mean_rating(categories[name]) for name in sorted(categories)},
            "unjudged": sum(value is None for ratings in every for value in ratings),
        }


def judge_prompt(turns: Sequence[str], answers: Sequence[str], reference: Sequence[str]) -> str:
    """What the judge is asked of the last of these turns."""
    what = "the question below" if len(turns) == 1 else "the second question of the conversation below"
    parts = [TASK.format(what=what, compare=COMPARE if reference else "")]
    for k, (turn, answer) in enumerate(zip(turns, answers, strict=True)):
        parts.append(f"## Question {k + 1}\n{turn}")
        if reference:
            parts.append(f"## Reference answer {k + 1}\n{reference[k]}")
        parts.append(f"## The assistant's answer {k + 1}\n{answer}")
    return "\n\n".join(parts)


def rating(text: str) -> float | None:
    """The only rating from 1 to 10 in a judgement."""
    found = {float(value) for value in RATING.findall(text)}
    value = found.pop() if len(found) == 1 else 0.0
    return value if 1 <= value <= 10 else None


def mean_rating(questions: Sequence[Sequence[float | None]]) -> dict[str, float] | None:
    """The mean of all ratings, with an interval over questions; None without one."""
    read = [r for r in ([value for value in ratings if value is not None] for ratings in questions) if r]
    sums = [sum(ratings) for ratings in read]
    return asdict(ratio_interval(sums, [len(r) for r in read], resamples=1000, seed=0)) if read else None


def read_references(path: str) -> dict[str, list[str]]:
    rows = file_rows(path, "question_id", "choices", where=f"{WHERE}.references")
    return {str(values["question_id"]): list(values["choices"][0]["turns"]) for _, values in rows}
