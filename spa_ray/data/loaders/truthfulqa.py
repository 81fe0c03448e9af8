"""TruthfulQA (arXiv:2109.07958): 817 questions with true and false answers.

mc_task.json and the hub give `mc1_targets` and `mc2_targets`, here always {choices, labels}; TruthfulQA.csv gives
`best_answer`, and `correct_answers` and `incorrect_answers` as lists.
"""

from typing import Any

from spa_ray.data.named import DataSet, Values, columns

_row = columns("question", best_answer="Best Answer", correct_answers="Correct Answers",
               incorrect_answers="Incorrect Answers", category="Category", type="Type", source="Source")  # fmt: skip


def row(values: Values) -> Values:
    found = _row(values)
    for name in {"mc1_targets", "mc2_targets"} & found.keys():
        found[name] = _targets(found[name])
    for name in {"correct_answers", "incorrect_answers"} & found.keys():
        found[name] = [answer.strip() for answer in found[name].split(";") if answer.strip()]
    return found


def _targets(given: Any) -> Values:
    if given.keys() == {"choices", "labels"}:
        return dict(given)
    return {"choices": list(given), "labels": list(given.values())}


SET = DataSet(
    page="https://github.com/sylinrl/TruthfulQA",
    hub="hf://truthfulqa/truthful_qa/multiple_choice",
    row=row,
)
