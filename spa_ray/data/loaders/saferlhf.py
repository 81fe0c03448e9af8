"""PKU-SafeRLHF (arXiv:2406.15513): questions, harmful and not, each row with two answers and their safety labels."""

from spa_ray.data.named import DataSet, columns

SET = DataSet(
    page="https://huggingface.co/datasets/PKU-Alignment/PKU-SafeRLHF",
    hub="hf://PKU-Alignment/PKU-SafeRLHF",
    splits=("train", "test"),
    row=columns("prompt"),
)
