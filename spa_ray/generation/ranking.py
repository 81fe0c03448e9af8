"""Scores by comparison (`scoring.compare`): every two candidates of a prompt are compared in both orders on each
objective, and a score says how many others an answer beats. A further answer is compared with the best of them.

With n candidates a win is 1 point and a tie half of one; points -1 to n are spread over the scale, so that a further
answer which beats the best, or loses to it, is a point above or below it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations

from spa_ray.generation.judging import Compared, Judgement, together
from spa_ray.generation.pairwise import ORDERS, VALUES, Comparer, Question, Verdict
from spa_ray.objectives import Objective

ALONE = "missing: there is no other answer to compare it with"


@dataclass(frozen=True)
class Duel:
    """Two answers on one objective: 1 the first is better in both orders, -1 the second, 0 a tie; None where a verdict
    failed."""

    value: float | None
    status: str
    text: str
    prompt_tokens: int
    generated_tokens: int

    @classmethod
    def of(cls, verdicts: Sequence[Verdict]) -> Duel:
        """From the verdicts by order; the answers of the second are turned round."""
        text = " | ".join(verdict.text for verdict in verdicts)
        tokens = sum(v.prompt_tokens for v in verdicts), sum(v.generated_tokens for v in verdicts)
        for verdict in verdicts:
            if verdict.winner is None:
                return cls(None, verdict.status, text, *tokens)
        first, second = (VALUES[v.winner] * sign for v, sign in zip(verdicts, (1, -1), strict=True) if v.winner)
        return cls(first if first == second else 0.0, "ok", text, *tokens)


class Ranker:
    """Scores of a prompt's answers by a pairwise judge."""

    def __init__(self, judge: Comparer, objectives: Sequence[Objective], scale: Sequence[int]) -> None:
        self._judge, self._objectives, self._scale = judge, tuple(objectives), scale

    async def rank(self, asked: Compared, answers: Mapping[int, str]) -> dict[int, list[Judgement]]:
        """Judgements by the answers' indices, in objective order."""
        pairs = list(combinations(answers, 2))
        duels = await together([self._duel(asked, i, j, answers[i], answers[j]) for i, j in pairs])
        found: dict[int, list[Judgement]] = {}
        for index in answers:
            mine = [(i, j, of_pair) for (i, j), of_pair in zip(pairs, duels, strict=True) if index in (i, j)]
            found[index] = [
                self._judgement(index, [(i, j, of_pair[k]) for i, j, of_pair in mine], len(answers))
                for k in range(len(self._objectives))
            ]
        return found

    async def place(
        self, asked: Compared, index: int, answer: str, best: int, of_best: str, scores: Sequence[float], n: int
    ) -> list[Judgement]:
        """Judgements of a further answer, from those of the best of `n`: a point above, below, or the same."""
        duels = await self._duel(asked, index, best, answer, of_best)
        step = (self._scale[1] - self._scale[0]) / (n + 1)
        return [
            Judgement(
                None if duel.value is None else score + duel.value * step,
                duel.status,
                f"against {best}: {duel.text}",
                prompt_tokens=duel.prompt_tokens,
                generated_tokens=duel.generated_tokens,
            )
            for duel, score in zip(duels, scores, strict=True)
        ]

    def _judgement(self, index: int, duels: Sequence[tuple[int, int, Duel]], n: int) -> Judgement:
        """Of one answer on one objective; a failed comparison leaves both answers without a score."""
        text = "\n".join(f"against {j if i == index else i}: {duel.text}" for i, j, duel in duels)
        spent = [duel for i, _, duel in duels if i == index]  # each comparison counts once
        tokens = sum(d.prompt_tokens for d in spent), sum(d.generated_tokens for d in spent)
        values = [duel.value if i == index or duel.value is None else -duel.value for i, _, duel in duels]
        status = next((duel.status for _, _, duel in duels if duel.value is None), "ok" if duels else ALONE)
        score = None
        if status == "ok":
            low, high = self._scale
            points = sum((1 + value) / 2 for value in values if value is not None)
            score = low + (high - low) * (points + 1) / (n + 1)
        return Judgement(score, status, text, prompt_tokens=tokens[0], generated_tokens=tokens[1])

    async def _duel(self, asked: Compared, i: int, j: int, first: str, second: str) -> list[Duel]:
        """Objective by objective, in both orders."""
        works = []
        for objective in self._objectives:
            for place, order in enumerate(ORDERS):
                seed_of = partial(asked.seed_of, i, objective.name, 2 * j + place)
                item = Question(asked.messages, asked.meta, objective, seed_of)
                works.append(self._judge.compare(item, *((first, second) if order == "ab" else (second, first))))
        verdicts = await together(works)
        return [Duel.of(verdicts[k : k + 2]) for k in range(0, len(verdicts), 2)]
