"""StrongREJECT (arXiv:2402.10260): 313 forbidden prompts in six categories."""

from spa_ray.data.named import DataSet, columns

SET = DataSet(
    page="https://github.com/alexandrasouly/strongreject",
    hub="hf://walledai/StrongREJECT",
    row=columns(("forbidden_prompt", "prompt")),
)
