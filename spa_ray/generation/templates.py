"""Judge and refinement prompts: sandboxed Jinja2, rendered to one user message (DESIGN, «Prompt templates»).

Comes in: a config's templates (or the built-in ones) and the objectives. Goes out: rendered text. Templates are checked
by rendering an example before anything starts; an undefined variable is an error, never an empty string.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import ImmutableSandboxedEnvironment

from spa_ray.config.models import Config
from spa_ray.config.rollout import Compare
from spa_ray.errors import InputError
from spa_ray.objectives import Objective

Message = Mapping[str, str]

COMMON_VARIABLES = frozenset({"question", "messages", "objectives", "scale"})
SCORE_VARIABLES = COMMON_VARIABLES | {"answer", "objective"}
REFINE_VARIABLES = COMMON_VARIABLES | {"candidates"}
PAIR_VARIABLES = COMMON_VARIABLES - {"scale"} | {"answer_a", "answer_b", "objective"}

# One question, or a conversation of several turns, the last of which is to be answered.
ASKED = """\
{% if messages|length > 1 %}[Conversation]
{% for m in messages %}{{ m.role|capitalize }}: {{ m.content }}
{% endfor %}{% else %}[Question]
{{ question }}
{% endif %}
"""
OBJECTIVE_FIRST = (
    """\
You are a strict, fair judge. Judge ONLY how {{ objective.name }} the answer is; nothing else may move your mark.

Principle: {{ objective.principle }}
{% if objective.rubric %}Scale: {{ objective.rubric }}
{% endif %}
Neither length nor style earns anything by itself.

"""
    + ASKED
    + """\
[Answer]
{{ answer }}

"""
)
ANSWER_FIRST = (
    """\
You are a strict, fair judge of an answer to a question.

"""
    + ASKED
    + """\
[Answer]
{{ answer }}

Judge ONLY how {{ objective.name }} the answer is; nothing else may move your mark.

Principle: {{ objective.principle }}
{% if objective.rubric %}Scale: {{ objective.rubric }}
{% endif %}
Neither length nor style earns anything by itself.

"""
)
LAYOUTS = {"objective_first": OBJECTIVE_FIRST, "answer_first": ANSWER_FIRST}
NUMBER = "Reply with one whole number from {{ scale[0] }} (worst) to {{ scale[1] }} (best), nothing else."
BRACKETS = (
    "Reply exactly in this form: Rating: [[k]], where k is a whole number from {{ scale[0] }} (worst) to "
    "{{ scale[1] }} (best)."
)
REFINE = (
    """\
Below are a question and several answers to it, each with marks from {{ scale[0] }} (worst) to {{ scale[1] }} (best).
The aims, most important first:
{% for o in objectives %}{{ loop.index }}. {{ o.name }}: {{ o.principle }}
{% endfor %}
"""
    + ASKED.removesuffix("\n")
    + """\
{% for c in candidates %}
[Answer {{ loop.index }}{% for o in objectives %}, {{ o.name }} {{ c.scores[o.name] }}{% endfor %}]
{{ c.text }}
{% endfor %}
Write one better answer to the question. Keep what is good in these answers and leave out what is not. Never give up an
aim for one further down the list. Do not mention the answers above or their marks. Write the answer only."""
)


PAIR = (
    """\
You compare two answers fairly. Decide which of them is better in one respect only: {{ objective.name }}.

Principle: {{ objective.principle }}

Neither the order in which the answers stand, nor length, nor style earns anything by itself.

"""
    + ASKED
    + """\
[Answer A]
{{ answer_a }}

[Answer B]
{{ answer_b }}

"""
)
VERDICTS = {
    "regex": "First weigh them against each other in a few sentences. Then close with exactly one verdict: [[A]] if "
    "answer A is better, [[B]] if answer B is better, [[C]] if neither is.",
    "choice": "Reply with one letter, nothing else: A if answer A is better, B if answer B is better, C if neither is.",
}


class PairTemplate:
    """The prompt that shows two answers."""

    def __init__(
        self, section: Compare, objectives: Sequence[Objective], *, key: str = "evaluation.pairwise.prompt"
    ) -> None:
        """Compile and try it. Raises: InputError, as `Templates`."""
        variables = PAIR_VARIABLES
        self._objectives = tuple(objectives)
        self._template = _compile(section.prompt or PAIR + VERDICTS[section.mode], key, variables)
        for objective in self._objectives:
            _try(key, partial(self.render, [{"role": "user", "content": "?"}], "!", "!!", objective))

    def render(self, messages: Sequence[Message], a: str, b: str, objective: Objective) -> str:
        asked = {"question": messages[-1]["content"], "messages": list(messages), "objectives": self._objectives}
        return self._template.render(**asked, answer_a=a, answer_b=b, objective=objective)


class Templates:
    """A config's compiled judge and refinement templates, and their system prompts."""

    def __init__(self, config: Config, objectives: Sequence[Objective]) -> None:
        """Compile and try all. Raises: InputError for a syntax error or a variable that does not exist."""
        built_in = LAYOUTS[config.scoring.layout] + (BRACKETS if config.scoring.mode == "regex" else NUMBER)
        self.objectives, self.scale = tuple(objectives), list(config.scoring.scale)
        self._score = _compile(config.scoring.prompt or built_in, "scoring.prompt", SCORE_VARIABLES)
        self._refine = _compile(config.refine.prompt or REFINE, "refine.prompt", REFINE_VARIABLES)
        self._score_system = _compile_optional(config.scoring.system, "scoring.system", SCORE_VARIABLES)
        self._refine_system = _compile_optional(config.refine.system, "refine.system", REFINE_VARIABLES)
        self._try_all()

    def score(self, messages: Sequence[Message], answer: str, objective: Objective) -> str:
        return self._score.render(**self._common(messages), answer=answer, objective=objective)

    def score_system(self, messages: Sequence[Message], answer: str, objective: Objective) -> str | None:
        if self._score_system is None:
            return None
        return self._score_system.render(**self._common(messages), answer=answer, objective=objective)

    def refine(self, messages: Sequence[Message], candidates: Sequence[Mapping[str, Any]]) -> str:
        """`candidates`: each has `text`, `scores` by objective name, and their `total`."""
        return self._refine.render(**self._common(messages), candidates=candidates)

    def refine_system(self, messages: Sequence[Message], candidates: Sequence[Mapping[str, Any]]) -> str | None:
        if self._refine_system is None:
            return None
        return self._refine_system.render(**self._common(messages), candidates=candidates)

    def _common(self, messages: Sequence[Message]) -> dict[str, Any]:
        return {
            "question": messages[-1]["content"],
            "messages": list(messages),
            "objectives": self.objectives,
            "scale": self.scale,
        }

    def _try_all(self) -> None:
        example = [{"role": "user", "content": "?"}]
        scored = [{"text": "!", "scores": {o.name: self.scale[0] for o in self.objectives}, "total": 0.0}]
        for objective in self.objectives:
            _try("scoring.prompt", partial(self.score, example, "!", objective))
            _try("scoring.system", partial(self.score_system, example, "!", objective))
        _try("refine.prompt", partial(self.refine, example, scored))
        _try("refine.system", partial(self.refine_system, example, scored))


def _compile(source: str, key: str, variables: frozenset[str]) -> Template:
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    try:
        used = find_undeclared_variables(environment.parse(source))  # also in branches that no example takes
        template = environment.from_string(source)
    except TemplateError as e:
        raise InputError(f"{key}: not a Jinja2 template ({e})") from e
    for stray in sorted(used - variables):
        raise InputError(f"{key}: there is no variable {stray!r} here; known: {', '.join(sorted(variables))}")
    return template


def _compile_optional(source: str | None, key: str, variables: frozenset[str]) -> Template | None:
    return None if source is None else _compile(source, key, variables)


def _try(key: str, render: Callable[[], object]) -> None:
    try:
        render()
    except (TemplateError, TypeError, ValueError, KeyError, IndexError) as e:
        raise InputError(f"{key}: cannot be rendered ({e})") from e
