"""WildGuardMix (arXiv:2406.18495): vanilla and adversarial prompts with labels of harm, which may be null."""

from spa_ray.data.named import DataSet, columns

SET = DataSet(
    page="https://huggingface.co/datasets/allenai/wildguardmix",
    hub="hf://allenai/wildguardmix/wildguard{split}",
    splits=("train", "test"),
    row=columns("prompt"),
)
