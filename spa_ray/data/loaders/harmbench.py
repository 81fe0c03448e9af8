"""HarmBench's text behaviors (arXiv:2402.04249): a contextual one's context stands before it."""

from spa_ray.data.named import DataSet, Values, columns

_row = columns("Behavior", category="SemanticCategory", functional_category="FunctionalCategory", tags="Tags",
               context="ContextString", behavior_id="BehaviorID")  # fmt: skip


def row(values: Values) -> Values:
    found = _row(values)
    message = found["messages"][0]
    if context := found.get("context"):
        message["content"] = f"{context}\n\n---\n\n{message['content']}"
    return found


SET = DataSet(page="https://github.com/centerforaisafety/HarmBench", row=row)
