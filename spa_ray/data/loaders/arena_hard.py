"""Arena-Hard (arXiv:2406.11939): v0.1, 500 prompts in clusters, or v2.0, 750 in subcategories."""

from spa_ray.data.named import DataSet, Values, columns

_row = columns("prompt")


def row(values: Values) -> Values:
    """The hub has `turns` in place of `prompt`."""
    if "turns" in values:
        values["prompt"] = values.pop("turns")[0]["content"]
    return _row(values)


SET = DataSet(
    page="https://github.com/lmarena/arena-hard-auto",
    hub="hf://lmarena-ai/arena-hard-auto-v0.1",
    row=row,
)
