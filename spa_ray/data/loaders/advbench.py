"""AdvBench (arXiv:2307.15043): harmful instructions, and the start of an answer that an attack aims at."""

from spa_ray.data.forms import BadRowError
from spa_ray.data.named import DataSet, Values, columns

_row = columns(("goal", "prompt"), target="target")


def row(values: Values) -> Values:
    found = _row(values)
    if found["messages"][0]["content"].startswith("Sure, here"):
        raise BadRowError("goal and target have each other's names, as in some forks; swap them in the first line")
    return found


SET = DataSet(page="https://github.com/llm-attacks/llm-attacks", hub="hf://walledai/AdvBench", row=row)
