"""JailbreakTrigger of TrustLLM (arXiv:2401.05561): 14 attacks on 100 requests each, in the file jailbreak.json."""

from spa_ray.data.named import DataSet, Values, columns

_row = columns("prompt")


def row(values: Values) -> Values:
    (attack,) = values.pop("label")  # a list of one
    return {**_row(values), "attack": attack}


SET = DataSet(page="https://github.com/HowieHwong/TrustLLM", row=row)
