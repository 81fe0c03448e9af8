"""UltraFeedback (arXiv:2310.01377): instructions, each with four models' answers and ratings of 1-5 as text."""

from typing import Any

from spa_ray.data.forms import check_text
from spa_ray.data.named import Answer, DataSet, Values, columns, rating

RANGE = (1, 5)
ATTRIBUTES = ("instruction_following", "truthfulness", "honesty", "helpfulness")
_row = columns("instruction")


def row(values: Values) -> Values:
    """Without the answers: a prompt's other columns are kept with it through the whole run."""
    return _row({name: value for name, value in values.items() if name != "completions"})


def answers(values: Values) -> list[Answer]:
    """«N/A» is no score. `overall_score` is not read: its tens are mistakes."""
    return [_answer(given, f"`completions`[{number}]") for number, given in enumerate(values.pop("completions"))]


def _answer(given: Any, name: str) -> Answer:
    ratings = {attribute: given["annotations"][attribute]["Rating"] for attribute in ATTRIBUTES}
    scores = {
        attribute: None if value in (None, "N/A") else rating(value, f"{name} {attribute}", *RANGE)
        for attribute, value in ratings.items()
    }
    return Answer(check_text(given["response"], name, "an answer"), scores, given.get("custom_system_prompt"))


SET = DataSet(
    page="https://huggingface.co/datasets/openbmb/UltraFeedback",
    hub="hf://openbmb/UltraFeedback",
    row=row,
    answers=answers,
    shown_by=("completions",),
    ranges=dict.fromkeys(ATTRIBUTES, RANGE),
)
