"""Do-Not-Answer (arXiv:2308.13387): 939 questions that a model should not answer, without the six models' answers."""

from spa_ray.data.named import DataSet, Values, columns

THEIRS = ("_response", "_harmful", "_action")  # columns of the models' answers and their labels
_row = columns(("question", "prompt"), category="risk_area")


def row(values: Values) -> Values:
    return _row({name: value for name, value in values.items() if not name.endswith(THEIRS)})


SET = DataSet(page="https://github.com/Libr-AI/do-not-answer", hub="hf://LibrAI/do-not-answer", row=row)
