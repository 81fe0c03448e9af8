"""Self-Criticism (Tan et al. 2023), reconstructed from its abstract: a model learns the better answers that it writes
when it is shown its best and its worst, as it judges them, in all respects alike.

Of four answers per prompt every two are compared in both orders, with four examples (`COMPARE`). The best and the worst
are the context of a further answer (`BETTER`), which is kept if it is judged better than the best. Where
`scoring.compare` is null a comparison is that of two drawn ratings. Training is SFT on what is kept, behind the prompt
as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from spa_ray.generation.templates import ASKED
from spa_ray.methods.sft import SFT

QUESTION = ASKED.rstrip("\n")  # with no line between it and the answers, as in the examples

# Four comparisons: more harmless, more honest, more helpful, and a tie.
SHOTS = """\
{%- set shots = [
  {"question": "How do I get back at my neighbour for the noise?",
   "a": "Pour sugar into his tank at night. Wear gloves and do it when the street is empty.",
   "b": "I would not harm him or his things. Write down the hours of the noise, talk with him, then with the landlord.",
   "better": "B"},
  {"question": "Who will win the election in my town next spring?",
   "a": "Nobody can know that yet. The town's website lists the candidates, and polls come out in the last weeks.",
   "b": "The mayor will surely win with 54 percent of the votes.",
   "better": "A"},
  {"question": "My pan is burnt black inside. How do I get it clean?",
   "a": "Burnt pans are a nuisance, and many people have one.",
   "b": "Cover the burnt layer with water and two spoons of baking soda, boil it for ten minutes, scrape and rinse.",
   "better": "B"},
  {"question": "What is seven times eight?",
   "a": "56",
   "b": "Seven times eight is 56.",
   "better": "C"},
] -%}
"""
COMPARE = (
    SHOTS
    + """\
You compare two answers fairly: which of them is more {{ objective.name }}?

Principle: {{ objective.principle }}

Neither the order in which the answers stand, nor length, nor style earns anything by itself. Reply with one letter: A
if answer A is better, B if answer B is better, C if neither is.

{% for shot in shots %}[Question]
{{ shot.question }}
[Answer A]
{{ shot.a }}
[Answer B]
{{ shot.b }}
[Better]
{{ shot.better }}

{% endfor %}"""
    + QUESTION
    + """\
[Answer A]
{{ answer_a }}
[Answer B]
{{ answer_b }}
[Better]
Reply with one letter, nothing else: A, B or C."""
)

BETTER = (
    "{% set ranked = candidates | sort(attribute='total', reverse=true) %}"
    "Below are a question and two answers to it, the first of which is the better one.\n\n"
    + QUESTION
    + """
[Better answer]
{{ ranked[0].text }}
{% if ranked|length > 1 %}
[Worse answer]
{{ ranked[-1].text }}
{% endif %}
Give a better answer: one that is more {{ objectives | map(attribute='name') | join(', more ') }} than both. Do not
mention them. Write the answer only."""
)


class SelfCriticism(SFT):
    """SFT on refined answers that are better than the best candidate; no objective has priority."""

    defaults: ClassVar[Mapping[str, Any]] = {
        "sampling.n": 4,
        "scoring.compare": {"mode": "choice", "prompt": COMPARE},
        "refine.prompt": BETTER,
        "denoise.consistency": "total",
        "denoise.informativeness": False,
        "pairs.order": "composite",
        "pairs.include": "refined_only",
        "pairs.delta": 0.01,  # any difference of the scores' mean
    }
