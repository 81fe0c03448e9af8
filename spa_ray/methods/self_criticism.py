"""Self-Criticism (Tan et al. 2023), reconstructed from its abstract: a model learns the better answers that it writes
when it is shown its best and its worst, as it judges them, in all respects alike.

Four answers per prompt are judged by examples (`JUDGE`); the best and the worst by the sum of their scores are the
context of a further answer (`BETTER`), which is kept if its sum is above the best's. A comparison of two answers is
thus that of two drawn ratings, and equal ones are a tie. Training is SFT on what is kept, on the prompt as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from spa_ray.methods.sft import SFT

ASKED = (
    "{% if messages|length > 1 %}[Conversation]\n{% for m in messages %}{{ m.role|capitalize }}: {{ m.content }}\n"
    "{% endfor %}{% else %}[Question]\n{{ question }}\n{% endif %}"
)

# Marks from 0 (worst) to 1 (best) of four answers, by the names of the built-in objectives; others have no examples.
SHOTS = """\
{%- set shots = [
  {"question": "How do I get back at my neighbour for the noise?",
   "answer": "Pour sugar into his tank at night. Wear gloves and do it when the street is empty.",
   "marks": {"harmless": 0, "honest": 0.7, "helpful": 0.2}},
  {"question": "How do I get back at my neighbour for the noise?",
   "answer": "I cannot help with that.",
   "marks": {"harmless": 0.9, "honest": 0.8, "helpful": 0.1}},
  {"question": "Who will win the election in my town next spring?",
   "answer": "The mayor will surely win with 54 percent of the votes.",
   "marks": {"harmless": 0.8, "honest": 0, "helpful": 0.2}},
  {"question": "Who will win the election in my town next spring?",
   "answer": "Nobody can know that yet. The town's website lists the candidates, and polls are usually published in the last weeks; I can tell you how to read them.",
   "marks": {"harmless": 1, "honest": 1, "helpful": 0.8}},
] -%}
"""  # noqa: E501

JUDGE = (
    SHOTS
    + """\
You judge answers fairly. Judge ONLY how {{ objective.name }} the answer is.

Principle: {{ objective.principle }}
{% if objective.rubric %}Scale: {{ objective.rubric }}
{% endif %}
{% for shot in shots if objective.name in shot.marks %}[Question]
{{ shot.question }}
[Answer]
{{ shot.answer }}
[Mark]
{{ (scale[0] + shot.marks[objective.name] * (scale[1] - scale[0])) | round | int }}

{% endfor %}"""
    + ASKED
    + """\
[Answer]
{{ answer }}
[Mark]
Reply with one whole number from {{ scale[0] }} (worst) to {{ scale[1] }} (best), nothing else."""
)

BETTER = (
    "{% set ranked = candidates | sort(attribute='total') %}"
    "Below are a question and two answers to it, the first of which is the better one.\n\n"
    + ASKED
    + """
[Better answer]
{{ ranked[-1].text }}
{% if ranked|length > 1 %}
[Worse answer]
{{ ranked[0].text }}
{% endif %}
Give a better answer: one that is more {{ objectives | map(attribute='name') | join(', more ') }} than both. Do not
mention them. Write the answer only."""
)


class SelfCriticism(SFT):
    """SFT on refined answers that are better than the best candidate; no objective has priority."""

    defaults: ClassVar[Mapping[str, Any]] = {
        "sampling.n": 4,
        "scoring.prompt": JUDGE,
        "refine.prompt": BETTER,
        "denoise.consistency": "total",
        "denoise.informativeness": False,
        "pairs.order": "composite",
        "pairs.include": "refined_only",
        "pairs.delta": 0.01,  # any difference of the scores' mean
    }
