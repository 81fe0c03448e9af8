"""HoneSet (arXiv:2406.00380): 930 queries in six categories that a model cannot fully answer. It has no licence."""

from spa_ray.data.named import DataSet, columns

SET = DataSet(
    page="https://github.com/Flossiee/HonestyLLM",
    row=columns("instruction", domain=("domain", "domains")),  # also written Domain, and Domains
)
