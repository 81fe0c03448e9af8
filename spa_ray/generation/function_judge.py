"""A judge that is a function of the user's, `(messages, meta, response, objective) -> number`, or a class."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from spa_ray.config.faults import explain
from spa_ray.config.judge import Function
from spa_ray.config.plugs import load_dotted
from spa_ray.config.section import Section
from spa_ray.errors import InputError
from spa_ray.generation.calls import Calls, check_signature, number_of, shown
from spa_ray.generation.judging import Item, Judgement, Parts, together
from spa_ray.logs import printable
from spa_ray.objectives import Objective

PARAMETERS = ("messages", "meta", "response", "objective")  # of a judge function


class FunctionJudge:
    """At most `concurrency` calls run at a time. What the function raises becomes the error of the prompt's row."""

    def __init__(
        self, function: Callable[..., Any], name: str, scale: Sequence[int], *, concurrency: int, timeout_s: float
    ) -> None:
        self._calls = Calls(function, name, concurrency=concurrency, timeout_s=timeout_s)
        self._name, self._scale = name, scale

    @classmethod
    def of(cls, section: Function, parts: Parts) -> FunctionJudge | ClassJudge:
        found, limits = load_judge(section, where="judge"), parts.config.generation
        bounds: Any = {"concurrency": limits.judge_concurrency, "timeout_s": limits.judge_timeout_s}
        kind = ClassJudge if isinstance(found, Judge) else cls
        return kind(found, section.name, parts.config.scoring.scale, **bounds)

    @staticmethod
    def check(section: Function, where: str) -> None:
        """Raises: InputError for a dotted path that leads to no judge."""
        load_judge(section, where=where)

    async def score(self, item: Item) -> list[Judgement]:
        return await together([self._judge(item, objective) for objective in item.objectives])

    async def _judge(self, item: Item, objective: Objective) -> Judgement:
        return self.read(await self._calls.call(item.messages, item.meta, item.response, objective.name))

    def read(self, value: Any) -> Judgement:
        """A returned value as a judgement. Of a `Judgement` the score, the text and a failure's reason are kept."""
        if isinstance(value, Judgement):
            text = printable(str(value.text))
            if value.score is None:
                why = "no reason given" if value.status == "ok" else printable(str(value.status))
                return Judgement(None, f"failed: {why}", text)
            return replace(self.read(value.score), text=text)
        number, (low, high) = number_of(value), self._scale
        if number is None or not low <= number <= high:  # NaN is on no scale
            what = "" if number is not None else f"a {type(value).__name__}, "
            why = f"parse_failure: {self._name} returned {what}{shown(value)}; a number on the scale [{low}, {high}]"
            return Judgement(None, f"{why} is needed", shown(value))
        return Judgement(float(number), text=json.dumps(number))


class Judge:
    """A judge as a class: derive from it and give `judge: my_file:MyJudge`, or `{kind: function, name: my_file:MyJudge,
    config: {..}}` where its `Config` has keys of its own."""

    Config: type[Section] = Section

    def __init__(self, config: Any) -> None:
        """`config` is its `Config`."""
        self.config = config

    async def score(self, item: Item) -> Mapping[str, float | Judgement] | Sequence[float | Judgement]:
        """A number on the scale, or a `Judgement`, for each of the item's objectives: by name, or in their order. May
        be a plain method as well."""
        raise NotImplementedError


class ClassJudge(FunctionJudge):
    """A `Judge` of the user's own, asked once for all objectives of an answer."""

    def __init__(self, judge: Judge, name: str, scale: Sequence[int], *, concurrency: int, timeout_s: float) -> None:
        super().__init__(judge.score, name, scale, concurrency=concurrency, timeout_s=timeout_s)

    async def score(self, item: Item) -> list[Judgement]:
        found, names = await self._calls.call(item), [objective.name for objective in item.objectives]
        if isinstance(found, list | tuple) and len(found) == len(names):
            found = dict(zip(names, found, strict=True))
        if not isinstance(found, Mapping):
            raise TypeError(
                f"{self._name} returned {shown(found)}; a mapping of objective to number, or one number for each of "
                f"{', '.join(names)}, is needed"
            )
        return [self.read(found.get(name)) for name in names]


def load_judge(section: Function, *, where: str) -> Any:
    """The function, or an instance of the class, that a section names.

    Raises: InputError when there is none, it is neither, or it does not take a judge's arguments.
    """
    found = load_dotted(section.name, where=where)
    if isinstance(found, type) and issubclass(found, Judge):
        try:
            return found(found.Config.model_validate(section.config))
        except ValidationError as e:
            raise InputError(f"{where}.config: {explain(e, found.Config)}") from e
        except Exception as e:  # whatever a constructor of the user's raises is about that file
            raise InputError(f"{where}: {section.name} cannot be made ({type(e).__name__}: {e})") from e
    if not callable(found) or section.config:
        what = "takes no config" if section.config else "a judge is a function, or a class derived from spa_ray.Judge"
        raise InputError(f"{where}: {section.name!r} is a {type(found).__name__}; {what}")
    check_signature(found, PARAMETERS, where=f"{where}: {section.name!r}")
    return found
