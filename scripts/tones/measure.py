"""What the world `tones` is like, before anything is trained on it: `python -m scripts.tones.measure` prints Markdown.

`--wishes` writes the file of what each kind of prompt asks for.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from spa_ray.microworld.tones import answers, oracle
from spa_ray.microworld.tones.answers import MODELS, Group, base_answer, expected, group, kind_of, of_kind, wishes
from spa_ray.microworld.tones.prompts import ATTRIBUTES, CUES, HOW_MANY, STYLES, Wish, prompts, wish_of

CATEGORIES = ("benign", "sensitive", "harmful")
DRAWS = 1000  # of a kind of prompt, for its wish
MEAN_DRAWS = 200  # for its mean label
WORDS = sorted({word for ends in CUES.values() for cues in ends for cue in cues for word in cue.lower().split()})


def write_wishes(out: Path) -> None:
    """Every category, with cues about at most three styles."""
    found = {}
    for category, styles in itertools.product(CATEGORIES, itertools.product((-1, 0, 1), repeat=len(STYLES))):
        if sum(map(abs, styles)) <= max(HOW_MANY[0]):
            kind = kind_of(Wish("", category, dict(zip(STYLES, styles, strict=True))))
            found[kind] = expected(category, styles, DRAWS)
    out.write_text(json.dumps(found, indent=0).replace("\n", " ").replace("], ", "],\n") + "\n", encoding="utf-8")


def measure(count: int = 4000) -> dict[str, Any]:
    """Of training prompts' groups and, for the ridge, of as many others."""
    texts = list(itertools.islice(prompts("train"), 2 * count))
    rng = random.Random("tones/measure")
    groups, others = [group(rng, text) for text in texts[:count]], [group(rng, text) for text in texts[count:]]
    asked = [wish_of(g.prompt) for g in groups]
    cued = np.array([wish.cued for wish in asked])
    truth, labels = _chosen(groups)
    bayes = np.array([wishes()[kind_of(wish)] for wish in asked])
    ridge = _ridge(others, groups)
    mean_label = {kind: _mean_label(kind) for kind in {kind_of(wish) for wish in asked}}
    squares = np.array([mean_label[kind_of(wish)] for wish in asked])
    constant = np.median(_chosen(others)[0], axis=0)
    base = np.array(
        [
            [oracle.scores(g.prompt, base_answer(rng, w))[a] for a in ATTRIBUTES]
            for g, w in zip(groups, asked, strict=True)
        ]
    )
    everything = np.array([row for g in groups for row in g.truth])
    return {
        "no cue": 1 - cued.mean(),
        "gain": {
            "Bayes predictor, noise-free scores": _gain(truth, bayes, constant, cued),
            "Bayes predictor, noisy labels": _gain(labels, bayes, constant, cued),
            "mean label of each kind of prompt, noise-free scores": _gain(truth, squares, constant, cued),
            "ridge on the prompt's words, noise-free scores": _gain(truth, ridge, constant, cued),
            "ridge on the prompt's words, noisy labels": _gain(labels, ridge, constant, cued),
            "ridge on the prompt's words, wishes": _gain(bayes, ridge, np.median(bayes, axis=0), cued),
        },
        "follows": {f"annotated model {k + 1}, p {model.follows}": _correlation(asked, [g.truth[k] for g in groups])
                    for k, model in enumerate(MODELS)} | {"base policy": _correlation(asked, base)},
        "scores": {name: [everything[:, k].mean(), everything[:, k].std(), everything[:, k].max(), truth[:, k].mean()]
                   for k, name in enumerate(ATTRIBUTES)},
        "highest mean of the five": everything.mean(axis=1).max(),
        "highest of the lowest of the five": everything.min(axis=1).max(),
        "ties": np.mean([sum(g.labels[g.chosen]) == min(map(sum, g.labels)) for g in groups]),
        "correlation bold, harmless": np.corrcoef(everything[:, -1], everything[:, 0])[0, 1],
    }  # fmt: skip


def _chosen(groups: list[Group]) -> tuple[np.ndarray, np.ndarray]:
    """(prompts, attributes) each: noise-free scores and labels of the chosen answers."""
    return np.array([g.truth[g.chosen] for g in groups]), np.array([g.labels[g.chosen] for g in groups])


def _mean_label(kind: str) -> np.ndarray:
    """(attributes,): the least squared error that labels can teach, which is not the least absolute error."""
    category, *signs = kind.split()
    rng = random.Random(f"tones/mean label/{kind}")
    texts = of_kind(category, tuple("-0+".index(sign) - 1 for sign in signs), rng)
    mean: np.ndarray = _chosen([group(rng, text) for text in itertools.islice(texts, MEAN_DRAWS)])[1].mean(axis=0)
    return mean


def _gain(actual: np.ndarray, predicted: np.ndarray, constant: np.ndarray, cued: np.ndarray) -> float:
    """The share of the constant's absolute error that the predictor saves, on cued prompts."""
    return float(1 - np.abs(actual - predicted)[cued].mean() / np.abs(actual - constant)[cued].mean())


def _ridge(train: list[Group], test: list[Group], strength: float = 10.0) -> np.ndarray:
    """Learnt from the labels of the chosen answers."""

    def features(groups: list[Group]) -> np.ndarray:
        split = [g.prompt.lower().split() for g in groups]
        return np.array([[1.0, *(word in words for word in WORDS)] for words in map(set, split)])

    x = features(train)
    weights = np.linalg.solve(x.T @ x + strength * np.eye(x.shape[1]), x.T @ _chosen(train)[1])
    predicted: np.ndarray = features(test) @ weights
    return predicted


def _correlation(asked: list[Wish], scores: Any) -> list[float]:
    """Of each style's cue with its score, over the prompts that have a cue about it."""
    found = []
    for k, name in enumerate(STYLES, 1):
        pairs = [(wish.styles[name], row[k]) for wish, row in zip(asked, scores, strict=True) if wish.styles[name]]
        found.append(float(np.corrcoef(*zip(*pairs, strict=True))[0, 1]))
    return found


def markdown(found: dict[str, Any]) -> str:
    lines = ["| | " + " | ".join(STYLES) + " |", "| --- |" + " ---: |" * len(STYLES)]
    lines += [f"| {who} | " + " | ".join(f"{r:.2f}" for r in rs) + " |" for who, rs in found["follows"].items()]
    lines += ["", "| | mean | deviation | highest | chosen's mean |", "| --- | ---: | ---: | ---: | ---: |"]
    lines += [f"| {name} | " + " | ".join(f"{v:.2f}" for v in row) + " |" for name, row in found["scores"].items()]
    lines += ["", "| of a constant's absolute error on cued prompts | saved |", "| --- | ---: |"]
    lines += [f"| {who} | {100 * gain:.0f} % |" for who, gain in found["gain"].items()]
    told = {"prompts without a cue": "no cue", "ties of chosen and rejected": "ties"}
    lines += ["", *(f"- {what}: {100 * found[key]:.1f} %" for what, key in told.items())]
    told = ("highest mean of the five", "highest of the lowest of the five", "correlation bold, harmless")
    return "\n".join([*lines, *(f"- {key}: {found[key]:.2f}" for key in told)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wishes", action="store_true", help="write wishes.json and nothing else")
    args = parser.parse_args()
    if args.wishes:
        write_wishes(Path(answers.__file__).with_name("wishes.json"))
    else:
        print(markdown(measure()))


if __name__ == "__main__":
    main()
