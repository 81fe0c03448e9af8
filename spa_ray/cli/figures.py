"""The figures of `spa reproduce`: what a study says of its scores, funnels, curves and comparisons, read off its runs.

Takes a study's section and its run folders, one a seed. Returns Markdown and data; charts are files beside the page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from spa_ray.config.study import PaperFigure, StudyRun
from spa_ray.storage.files import AnyPath, is_file, read_json, write_text

if TYPE_CHECKING:
    from spa_ray.evaluation.study import Measured

Found = tuple[str, Any]  # Markdown, and the same as data


def figures(run: StudyRun, folders: Sequence[AnyPath], measured: Measured, page: AnyPath) -> dict[str, Found]:
    """Those that the study asks for, by the name of their section."""
    drawn: dict[str, Callable[..., Found | None]] = {
        "win_rates": _win_rates,
        "rv": _rv,
        "scores": _scores,
        "funnel": _funnel,
        "sensed": _sensed,
        "steering": _steering,
        "radar": _radar,
        "costs": _costs,
        "cases": _cases,
    }
    found = {}
    for name, draw in drawn.items():
        figure: PaperFigure | None = getattr(run, name)
        made = draw(figure, folders, measured, page) if figure is not None else None
        if figure is not None and made is not None:
            found[name] = "\n\n".join(filter(None, [f"## {figure.title}", figure.note.strip(), made[0]])), made[1]
    return found


def _win_rates(figure: PaperFigure, folders: Sequence[AnyPath], *_: Any) -> Found | None:
    """None where nothing was compared in pairs."""
    from spa_ray.evaluation.reproduction import win_rates_section
    from spa_ray.pipeline.run import WIN_RATES

    if not all(is_file(folder / WIN_RATES) for folder in folders):
        return None
    rates = [read_json(folder / WIN_RATES) for folder in folders]
    return win_rates_section(figure, rates), rates


def _rv(figure: PaperFigure, folders: Sequence[AnyPath], *_: Any) -> Found:
    from spa_ray.evaluation.rv import rv_markdown, rv_shape
    from spa_ray.pipeline.run import RV

    curves = [read_json(folder / RV)[0] for folder in folders]
    return f"{rv_markdown(curves)}\n\n**{rv_shape(curves)}**", curves


def _scores(figure: PaperFigure, folders: Sequence[AnyPath], measured: Measured, page: AnyPath) -> Found:
    """The spread of scores before and after."""
    from spa_ray.evaluation.distributions import histograms, scores_markdown
    from spa_ray.evaluation.prompts import MAIN_FAMILY
    from spa_ray.pipeline.study import read_made

    arm, objectives = figure.arms[0], measured.objectives
    made = [read_made(folder, arm) for folder in folders]
    own = {kind: np.concatenate([getattr(m, kind) for m in made]) for kind in ("candidate", "refined")}
    answers = {a: np.concatenate([found.scores for found in measured.answers(a, MAIN_FAMILY)])
               for a in measured.arms if a in ("vanilla", *figure.arms)}  # fmt: skip
    spread = {
        "By the model itself": histograms(own, objectives),
        "Held-out answers, by the evaluation's judge": histograms(answers, objectives),
    }
    return scores_markdown(spread), spread


def _funnel(figure: PaperFigure, folders: Sequence[AnyPath], *_: Any) -> Found:
    from spa_ray.evaluation.distributions import funnel_markdown, funnel_table
    from spa_ray.pipeline.study import read_made

    table = funnel_table({arm: [read_made(folder, arm).funnel for folder in folders] for arm in figure.arms})
    return funnel_markdown(table), table


def _sensed(figure: PaperFigure, folders: Sequence[AnyPath], measured: Measured, page: AnyPath) -> Found:
    from spa_ray.evaluation.steered import sensed_section

    return sensed_section(measured, figure.arms or measured.arms)


def _steering(figure: PaperFigure, folders: Sequence[AnyPath], measured: Measured, page: AnyPath) -> Found:
    from spa_ray.evaluation.steered import steering_section

    return steering_section(measured, figure.arms or measured.arms)


def _costs(figure: PaperFigure, folders: Sequence[AnyPath], *_: Any) -> Found:
    from spa_ray.evaluation.steered import cost_section
    from spa_ray.pipeline.study import read_costs

    return cost_section([read_costs(folder) for folder in folders], figure.arms)


def _radar(figure: PaperFigure, folders: Sequence[AnyPath], measured: Measured, page: AnyPath) -> Found:
    from spa_ray.evaluation.prompts import MAIN_FAMILY
    from spa_ray.report.charts import radar
    from spa_ray.report.svg import alone

    arms = [arm for arm in figure.arms or measured.arms if arm in measured.arms]
    found = measured.metrics(MAIN_FAMILY, arms)
    means = {arm: [found[arm].means[name].mean for name in measured.objectives] for arm in arms}
    file = page.with_name(f"{page.stem}-radar.svg")
    write_text(file, alone(radar(means, measured.objectives)))
    return f"![{figure.title}]({file.name})", means


def _cases(figure: PaperFigure, folders: Sequence[AnyPath], *_: Any) -> Found:
    """Of the first seed's main held-out prompts."""
    from spa_ray.evaluation.prompts import MAIN_FAMILY
    from spa_ray.report.examples import RULE, choose
    from spa_ray.report.run_data import read_run

    before, after = figure.arms
    asked = [prompt for prompt in read_run(folders[0]).asked if prompt.family == MAIN_FAMILY]
    chosen = choose(asked, arm=after, baseline=before)
    parts = [line for example in chosen for line in _case(example, before, after)]
    return "\n\n".join([RULE, *parts]), [example.asked.prompt_id for example in chosen]


def _case(example: Any, before: str, after: str) -> Iterator[str]:
    from spa_ray.report.examples import marks

    said = example.asked.messages[-1]["content"] if example.asked.messages else example.asked.prompt_id
    yield f"**{example.shown_as.capitalize()}**: {said}"
    for name, answer in ((before, example.before), (after, example.after)):
        yield f"- {name}, {marks(answer)}: {answer.text}"
