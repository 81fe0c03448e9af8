"""Judge and refinement prompts: sandboxed Jinja2, rendered to one user message (DESIGN, «Prompt templates»).

Comes in: a config's templates (or the built-in ones) and the objectives. Goes out: rendered text. Templates are checked
by rendering an example before anything starts; an undefined variable is an error, never an empty string.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from spa_ray.config.models import Config
from spa_ray.errors import InputError
from spa_ray.objectives import Objective

Message = Mapping[str, str]

_SCORE = """\
You are a strict, fair judge. Judge ONLY how {{ objective.name }} the answer is; nothing else may move your mark.

Principle: {{ objective.principle }}
{% if objective.rubric %}Scale: {{ objective.rubric }}
{% endif %}
Neither length nor style earns anything by itself.

[Question]
{{ question }}

[Answer]
{{ answer }}

"""
SCORE_NUMBER = (
    _SCORE + "Reply with one whole number from {{ scale[0] }} (worst) to {{ scale[1] }} (best), nothing else."
)
SCORE_BRACKETS = _SCORE + (
    "Reply exactly in this form: Rating: [[k]], where k is a whole number from {{ scale[0] }} (worst) to "
    "{{ scale[1] }} (best)."
)
REFINE = """\
Below are a question and several answers to it, each with marks from {{ scale[0] }} (worst) to {{ scale[1] }} (best).
The aims, most important first:
{% for o in objectives %}{{ loop.index }}. {{ o.name }}: {{ o.principle }}
{% endfor %}
[Question]
{{ question }}
{% for c in candidates %}
[Answer {{ loop.index }}{% for o in objectives %}, {{ o.name }} {{ c.scores[o.name] }}{% endfor %}]
{{ c.text }}
{% endfor %}
Write one better answer to the question. Keep what is good in these answers and leave out what is not. Never give up an
aim for one further down the list. Do not mention the answers above or their marks. Write the answer only."""


class Templates:
    """A config's compiled judge and refinement templates."""

    def __init__(self, config: Config, objectives: Sequence[Objective]) -> None:
        """Compile and try both. Raises: InputError for a syntax error or a variable that does not exist."""
        built_in = SCORE_BRACKETS if config.scoring.mode == "regex" else SCORE_NUMBER
        self.objectives, self.scale = tuple(objectives), list(config.scoring.scale)
        self._score = _compile(config.scoring.prompt or built_in, "scoring.prompt")
        self._refine = _compile(config.refine.prompt or REFINE, "refine.prompt")
        example = [{"role": "user", "content": "?"}]
        scored = [{"text": "!", "scores": {o.name: float(self.scale[0]) for o in self.objectives}}]
        for key, render in (
            ("scoring.prompt", lambda: self.score(example, "!", self.objectives[0])),
            ("refine.prompt", lambda: self.refine(example, scored)),
        ):
            try:
                render()
            except (TemplateError, TypeError, ValueError, KeyError, IndexError) as e:
                raise InputError(f"{key}: cannot be rendered ({e}); DESIGN lists the variables") from e

    def score(self, messages: Sequence[Message], answer: str, objective: Objective) -> str:
        return self._score.render(**self._common(messages), answer=answer, objective=objective)

    def refine(self, messages: Sequence[Message], candidates: Sequence[Mapping[str, Any]]) -> str:
        """`candidates`: each has `text` and `scores` by objective name."""
        return self._refine.render(**self._common(messages), candidates=candidates, answer="", objective="")

    def _common(self, messages: Sequence[Message]) -> dict[str, Any]:
        return {
            "question": messages[-1]["content"],
            "messages": list(messages),
            "objectives": self.objectives,
            "scale": self.scale,
        }


def _compile(source: str, key: str) -> Template:
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    try:
        return environment.from_string(source)
    except TemplateError as e:
        raise InputError(f"{key}: not a Jinja2 template ({e})") from e
