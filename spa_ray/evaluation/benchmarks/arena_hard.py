"""Arena-Hard: the model's answers against a baseline's, compared by a judge in both orders (our own words).

Source: Li et al. 2024, "From Crowdsourced Data to High-Quality Benchmarks: Arena-Hard", and lmarena/arena-hard-auto:
five verdicts, a clear win counts three times, a tie half for each.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

from pydantic import Field

from spa_ray.config.rollout import EvalSampling
from spa_ray.errors import InputError
from spa_ray.evaluation.benchmarks.common import drawn, file_rows, named_rows
from spa_ray.evaluation.benchmarks.judged import JudgedConfig, compared, judged
from spa_ray.evaluation.bootstrap import ratio_interval
from spa_ray.generation.benchmark import Ask, Benchmark
from spa_ray.generation.judging import together

WHERE = "evaluation.benchmarks: arena_hard"
VERDICT = re.compile(r"\[\[(A>>B|A>B|A=B|B>A|B>>A)\]\]")
CLEAR = 3  # how often a clear win counts
FIRST_WINS = {"A>>B": 1.0, "A>B": 1.0, "A=B": 0.5, "B>A": 0.0, "B>>A": 0.0}
NAMES = {"a": "A>B", "b": "B>A", "tie": "A=B"}  # what a judge says that does not tell clear from slight
TASK = """\
Compare the answers of two assistants, A and B, to the prompt below. First work out your own answer. Then \
compare both answers with yours: find what is wrong or missing, and ask whether each is helpful, to the point and no \
longer than it needs to be. The order of the answers must not matter. End with one verdict, in this form:
[[A>>B]] A is clearly better
[[A>B]] A is slightly better
[[A=B]] they are about as good
[[B>A]] B is slightly better
[[B>>A]] B is clearly better"""


class ArenaHardConfig(JudgedConfig):
    sources: ClassVar[frozenset[str]] = JudgedConfig.sources | {"baseline"}

    baseline: str = Field(description="the baseline's published answers, for v0.1 `gpt-4-0314.jsonl`")
    sampling: EvalSampling = Field(EvalSampling(max_tokens=4096), description="of an answer")


class ArenaHard(Benchmark[ArenaHardConfig]):
    """`win_rate` against the baseline (0.5: as good), and `unjudged`, verdicts that could not be read."""

    Config = ArenaHardConfig
    judgements = 2
    judged = "compare"

    def prompts(self) -> Iterator[Mapping[str, Any]]:
        baseline = read_answers(self.config.baseline)
        rows = []
        for place, values in named_rows("arena_hard", self.config, where=WHERE):
            name = str(values.get("uid", values.get("question_id")))  # the hub's name of it
            if name not in baseline:
                raise InputError(f"{place}: {WHERE}.baseline: {self.config.baseline} has no answer to {name}")
            rows.append({"prompt_id": f"arena_hard-{name}", "messages": values["messages"], "baseline": baseline[name]})
        yield from drawn(rows, self.config)

    async def play(self, row: Mapping[str, Any], ask: Ask) -> Mapping[str, Any]:
        question, other = row["messages"][-1]["content"], row["meta"]["baseline"]
        ours = (await ask(row["messages"])).text
        orders = [(other, ours), (ours, other)]
        if not self.config.writes_text:
            return {"verdicts": await together([compared(ask, row["messages"], pair, NAMES) for pair in orders])}
        asked = [judge_prompt(question, a, b) for a, b in orders]
        return {"verdicts": await together([judged(ask, text, verdict, self.config) for text in asked])}

    def metrics(self, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        found = [[judgement["verdict"] for judgement in row["result"]["verdicts"]] for row in rows]
        tallies = [tally for tally in map(wins, found) if tally[1]]
        rate = ratio_interval(*zip(*tallies, strict=True), resamples=1000, seed=0) if tallies else None
        return {
            "win_rate": None if rate is None else asdict(rate),
            "unjudged": sum(value is None for verdicts in found for value in verdicts),
        }


def judge_prompt(question: str, a: str, b: str) -> str:
    return f"{TASK}\n\n## Prompt\n{question}\n\n## Answer of A\n{a}\n\n## Answer of B\n{b}"


def verdict(text: str) -> str | None:
    """The only verdict of a judgement."""
    found = set(VERDICT.findall(text))
    return found.pop() if len(found) == 1 else None


def wins(verdicts: Sequence[str | None]) -> tuple[float, float]:
    """Weighted wins of the model, and the weight of all comparisons: it is B in the first, A in the second."""
    won = weight = 0.0
    for name, ours in zip(verdicts, "BA", strict=True):
        if name is not None:
            counts = CLEAR if ">>" in name else 1
            first = FIRST_WINS[name]
            won, weight = won + counts * (first if ours == "A" else 1 - first), weight + counts
    return won, weight


def read_answers(path: str) -> dict[str, str]:
    """Answers by question, from the published forms of v0.1 (`choices`) and v2.0 (`messages`)."""
    found = {}
    for place, values in file_rows(path, where=f"{WHERE}.baseline"):
        try:
            if "choices" in values:
                answer = values["choices"][0]["turns"][0]["content"]
            else:
                answer = values["messages"][-1]["content"]
            found[str(values.get("question_id", values.get("uid")))] = str(
                answer["answer"] if isinstance(answer, Mapping) else answer
            )
        except (KeyError, IndexError, TypeError) as e:
            raise InputError(f"{place}: {WHERE}.baseline: no published answer ({type(e).__name__}: {e})") from e
    return found
