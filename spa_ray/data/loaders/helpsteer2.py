"""HelpSteer2 (arXiv:2406.08673): rows of one answer with five ratings of 0-4; two of a prompt follow each other."""

import re

from spa_ray.data.forms import check_text
from spa_ray.data.named import Answer, DataSet, Values, columns, rating
from spa_ray.data.own_pairs import split_turns

RANGE = (0, 4)
ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")  # in prompts of several turns
_row = columns("prompt")


def row(values: Values) -> Values:
    if isinstance(values.get("prompt"), str) and _TURN.search(values["prompt"]):
        return {"messages": split_turns(values.pop("prompt"), _TURN, "prompt"), **values}
    return _row(values)


def answers(values: Values) -> list[Answer]:
    scores = {name: rating(values.pop(name), name, *RANGE) for name in ATTRIBUTES}
    return [Answer(check_text(values.pop("response"), "`response`", "an answer"), scores)]


SET = DataSet(
    page="https://huggingface.co/datasets/nvidia/HelpSteer2",
    hub="hf://nvidia/HelpSteer2",
    splits=("train", "validation"),
    row=row,
    answers=answers,
    shown_by=("response", *ATTRIBUTES),
    ranges=dict.fromkeys(ATTRIBUTES, RANGE),
    reference="response",
)
