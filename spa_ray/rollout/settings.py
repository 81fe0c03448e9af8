"""How a run renders its chats: what the template is given, what it sees as today, and what becomes of thinking.

`ChatSettings` travels from the config to every place that renders a prompt, so that all of them render alike.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from spa_ray.config.models import Model
from spa_ray.config.section import Section

DATE_STRING = "%d %b %Y"  # how Llama's templates write a date


class ChatSettings(Section):
    """`kwargs` are the template's variables. `date` is what `strftime_now` returns; with `date_given`, which is said of
    a date that the user's config names, templates get it as `date_string` too, although they may have a fixed date."""

    kwargs: dict[str, Any] = Field(default_factory=dict)
    date: dt.date
    date_given: bool = False
    think: Literal["strip", "mask"] = "strip"

    @classmethod
    def of(cls, model: Model, *, day: dt.date | None = None, kwargs: Mapping[str, Any] | None = None) -> ChatSettings:
        """A config's settings. `day` stands in where the config names no date, today where it is null; `kwargs` takes
        the place of the model's (a judge's or the refinement's)."""
        return cls(
            kwargs=dict(model.chat_template_kwargs if kwargs is None else kwargs),
            date=model.date or day or today(),
            date_given=model.date is not None,
            think=model.think,
        )

    def given(self, template: str) -> dict[str, Any]:
        """The variables that a template is rendered with."""
        found = dict(self.kwargs)
        if "strftime_now" in template:
            found["strftime_now"] = dt.datetime(self.date.year, self.date.month, self.date.day).strftime
        if "date_string" in template and (self.date_given or not _has_own_date(template)):
            found.setdefault("date_string", self.date.strftime(DATE_STRING))
        return found

    def key(self, template: str) -> dict[str, Any]:
        """What of these settings can change a rendered prompt, for a stage's hash: the date only where the template
        asks for one."""
        dated = self.given(template).keys() & {"strftime_now", "date_string"}
        return {"kwargs": self.kwargs, "think": self.think, **({"date": self.date.isoformat()} if dated else {})}


def today() -> dt.date:
    """By this machine's clock and time zone."""
    return dt.datetime.now().astimezone().date()


def _has_own_date(template: str) -> bool:
    """Whether the template sets `date_string` itself where it is given none, as Llama-3.1's does."""
    return "set date_string" in template
