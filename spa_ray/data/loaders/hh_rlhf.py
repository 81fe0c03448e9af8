"""HH-RLHF (arXiv:2204.05862): whole transcripts in `chosen` and `rejected`. The prompt is the chosen one's."""

from spa_ray.data.named import DataSet, Values
from spa_ray.data.own_pairs import TRANSCRIPT, split_turns

ANSWER = "\n\nAssistant:"


def row(values: Values) -> Values:
    prompt, _, chosen = values["chosen"].rpartition(ANSWER)
    rejected = values["rejected"].rpartition(ANSWER)[2]
    answers = {"chosen": chosen.strip(), "rejected": rejected.strip()}
    return {**values, **answers, "messages": split_turns(prompt, TRANSCRIPT, "chosen")}


SET = DataSet(
    page="https://huggingface.co/datasets/Anthropic/hh-rlhf",
    hub="hf://Anthropic/hh-rlhf",
    splits=("train", "test"),
    row=row,
)
