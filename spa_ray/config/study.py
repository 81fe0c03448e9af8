"""A study's tables as data: which arms, which measures, beside which of a paper's numbers.

A study is runs of one config that differ in their seeds, and the tables that are made of them.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from spa_ray.config.section import Section


class PaperTable(Section):
    """The published table that ours is laid beside (`spa_ray.evaluation.published`), and what is compared."""

    table: str = Field(description="its key there")
    turned: bool = Field(False, description="whether the paper's columns are our rows")
    rows: dict[str, str] = Field(default_factory=dict, description="our arm -> the paper's row")
    columns: dict[str, tuple[str, ...]] = Field(
        min_length=1, description="our column -> the paper's columns that it stands for"
    )
    compare: tuple[tuple[str, str], ...] = Field((), description="our arms: is the first above the second?")
    why: str = Field("", description="what is to be said of the comparison, in sentences")


class StudyTable(Section):
    """One table. Arms and families that a run lacks are left out, and a table without any of its own is not made."""

    title: str
    note: str = ""
    arms: tuple[str, ...] = Field((), description="rows, in this order; none: all arms, unless `differences` are given")
    about: tuple[str, ...] = Field((), description="arms without any of which there is no table; none: `arms`")
    differences: tuple[tuple[str, str], ...] = Field((), description="rows: first arm minus second, paired by prompt")
    measures: tuple[str, ...] = Field(min_length=1, description="columns")
    families: tuple[str, ...] = Field((), description="of held-out prompts, a column each; none: the main set")
    categories: bool = Field(False, description="differences of the first measure, a column each category of prompts")
    judge: str = Field("", description="one of `evaluation.judges` in the place of the main one")
    change: str | None = Field(None, description="an arm; a further column each: the measure minus that arm's")
    pairs: bool = Field(False, description="how many of an arm's pairs the evaluation's judge puts in the same order")
    by_seed: bool = Field(False, description="each seed's own values; of differences: a further column")
    paper: PaperTable | None = None

    @model_validator(mode="after")
    def _rows_of_one_kind(self) -> StudyTable:
        if self.arms and self.differences:
            raise ValueError("arms: a table's rows are arms or differences; remove one of them")
        if self.categories and not self.differences:
            raise ValueError("categories: are of differences; give differences")
        return self


class Study(Section):
    """The tables of one config's runs, by key."""

    tables: dict[str, StudyTable] = Field(min_length=1)

    @property
    def judged(self) -> list[str]:
        """Arms whose pairs the evaluation's judge looks at."""
        return list(dict.fromkeys(arm for table in self.tables.values() if table.pairs for arm in table.arms))


class PaperFigure(Section):
    """What is said of a figure."""

    title: str
    note: str = ""
    arms: tuple[str, ...] = Field((), description="none: all")
    families: tuple[str, ...] = Field((), description="none: all")


class Start(Section):
    """Another run's model, of the same seed, in the place of the config's own. Tables call it by the arm's name, and
    see the arms of the run `beside` as well."""

    run: str
    arm: str
    beside: str


class StudyRun(Section):
    """One config, its seeds, its tables."""

    base: str = Field(description="a config beside this file")
    seeds: int = Field(ge=1)
    extended: bool = Field(False, description="left out unless all is asked for")
    of_the_world: bool = Field(False, description="left out of a study on real models")
    config: dict[str, Any] = Field(default_factory=dict, description="sections and keys that differ from the base's")
    start: Start | None = Field(None, description="a run before this one whose model this one starts from; null: none")
    study: Study
    scores: PaperFigure | None = Field(None, description="how to show the spread of scores before and after; null: not")
    funnel: PaperFigure | None = Field(None, description="how to show its arms' funnels side by side; null: not")
    rv: PaperFigure | None = Field(None, description="how to show `evaluation.rv`; null: not")
    win_rates: PaperFigure | None = Field(None, description="how to show `evaluation.pairwise`; null: not")
    sensed: PaperFigure | None = Field(None, description="how to show sensed scores beside true ones; null: not")
    steering: PaperFigure | None = Field(None, description="how to show what asking for a level moves; null: not")
    radar: PaperFigure | None = Field(None, description="how to show the arms' means as a radar chart; null: not")
    costs: PaperFigure | None = Field(None, description="how to show what training took; null: not")
    cases: PaperFigure | None = Field(None, description="two arms, whose answers are shown by the rule; null: not")


class Reproduction(Section):
    """A paper's tables and figures on a world of ours."""

    title: str
    paper: str | None = Field(None, description="whose numbers stand beside ours; null: nobody's")
    judged_by: Literal["judge", "reward"] = Field(
        "judge", description="what a study on real models is given beside a model and data; reward: given answers too"
    )
    intro: str = Field(description="what the page says first")
    runs: dict[str, StudyRun] = Field(min_length=1)
    not_here: dict[str, str] = Field(default_factory=dict, description="a table or figure -> why this world lacks it")
