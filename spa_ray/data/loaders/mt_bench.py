"""MT-Bench (arXiv:2306.05685): 80 questions of two turns. The prompt is the first; `turns` has both."""

from spa_ray.data.named import DataSet, Values, columns

_row = columns("first")


def row(values: Values) -> Values:
    """Published as `turns`, and on the hub as a list in `prompt`."""
    turns = values.pop("turns" if "turns" in values else "prompt")
    return {**_row({**values, "first": turns[0]}), "turns": turns}


SET = DataSet(
    page="https://github.com/lm-sys/FastChat/tree/main/fastchat/llm_judge/data/mt_bench",
    hub="hf://HuggingFaceH4/mt_bench_prompts",
    row=row,
)
