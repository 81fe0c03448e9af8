"""Who answers in `tones`: a wide base policy that follows no cue, and annotated models that follow them more or less.

A style is -1, 0 or 1 on each axis. Labels are the oracle's scores with noise, on a grid of quarters: the world's
stand-in for human annotation.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from statistics import median
from typing import Any

from spa_ray.microworld.grammar import TOPIC_STEPS, TOPICS
from spa_ray.microworld.prompts import draw, facts
from spa_ray.microworld.tones import oracle
from spa_ray.microworld.tones.grammar import LONGEST, SENTENCES, step_sentence
from spa_ray.microworld.tones.prompts import ATTRIBUTES, CUES, STYLES, Wish, prompts, wish_of

Style = Mapping[str, int]
Maybe = Callable[[str, float], list[str]]
LABEL_NOISE, GRID = 0.08, 4


@dataclass(frozen=True)
class Annotated:
    """`follows`: how probable it is that a cue is followed; else the style is drawn as if there were none."""

    follows: float
    quality: tuple[float, float]  # between which an answer's is drawn
    open_styles: float  # how probable an uncued style is a neutral one


MODELS = (
    Annotated(0.6, (0.0, 0.7), 0.8),
    Annotated(0.8, (0.3, 0.9), 0.9),
    Annotated(0.9, (0.5, 1.0), 1.0),
    Annotated(0.9, (0.6, 1.0), 1.0),
)
REFERENCE = MODELS[1]


def any_style(rng: random.Random, neutral: float = 1 / 3) -> int:
    return 0 if rng.random() < neutral else rng.choice((-1, 1))


def respond(rng: random.Random, wish: Wish, style: Style, *, quality: float, daring: float) -> str:
    """An answer of one style; `daring` moves it from refusal to risk."""

    def maybe(kind: str, probability: float) -> list[str]:
        return [rng.choice(SENTENCES[kind])] if rng.random() < probability else []

    def several(kind: str, count: int) -> list[str]:
        return rng.sample(SENTENCES[kind], count)

    parts: list[str] = []
    if style["gentle"] > 0:
        parts += [*maybe("open", 0.8), *several("soft", 1)]
    elif style["gentle"] < 0:
        parts += maybe("rude", 0.6 * (1 - quality)) or several("blunt", 1)
    else:
        parts += maybe("open", 0.15)
    parts += several("firm", rng.choice((1, 1, 2))) if style["bold"] > 0 else []
    parts += several("hedge", rng.choice((1, 1, 2))) if style["bold"] < 0 else []
    parts += maybe("filler", 0.35 * (1 - quality))
    parts += _body(rng, wish, style, quality, daring, maybe)
    parts += maybe("soft", 0.5) if style["gentle"] > 0 else maybe("caution", 0.1 + 0.25 * (style["bold"] < 0))
    return " ".join(parts[:LONGEST])


STEPS = {-1: ((1, 2), (0.95, 0.05)), 0: ((2, 3), (0.8, 0.2)), 1: ((3, 4), (0.1, 0.9))}
REFUSAL = {"benign": (0.04, 0.0), "sensitive": (0.15, 0.0), "harmful": (0.75, 0.05)}
RISK = {"benign": (0.02, 0.25), "sensitive": (0.03, 0.35), "harmful": (0.03, 0.7)}


def _body(rng: random.Random, wish: Wish, style: Style, quality: float, daring: float, maybe: Maybe) -> list[str]:
    parts = maybe("refusal", _between(REFUSAL[wish.category], daring))
    parts += maybe("risk", _between(RISK[wish.category], daring))
    if wish.category != "benign":
        parts += maybe("alternative", 0.1 + 0.5 * quality * (1 - daring))
    count = max(0, rng.choices(*STEPS[style["thorough"]])[0] - len(parts) // 2)
    rights = rng.sample(TOPIC_STEPS[wish.topic], min(count, 4))
    expert = {-1: [False], 0: [False, True], 1: [True]}[style["expert"]]  # which levels the steps take in turn
    first = rng.randrange(2)
    for number, right in enumerate(rights, first):
        step = right
        if rng.random() > 0.45 + 0.55 * quality:
            step = rng.choice(TOPIC_STEPS[rng.choice([t for t in TOPICS if t != wish.topic])])
        parts.append(step_sentence(step, expert=expert[number % len(expert)], form=rng.randrange(2)))
    return parts


def _between(ends: tuple[float, float], at: float) -> float:
    return ends[0] + (ends[1] - ends[0]) * at


def base_answer(rng: random.Random, wish: Wish) -> str:
    """Of the base policy: every style, quality and daring, whatever the prompt says."""
    style = {name: any_style(rng) for name in STYLES}
    return respond(rng, wish, style, quality=rng.random(), daring=rng.random())


def annotated_answer(rng: random.Random, wish: Wish, model: Annotated) -> str:
    """Of an annotated model, which follows each cue by itself."""
    style = {}
    for name, sign in wish.styles.items():
        followed = sign != 0 and rng.random() < model.follows
        style[name] = sign if followed else any_style(rng, 1 / 3 if sign else model.open_styles)
    daring = 0.25 + 0.2 * style["bold"] * rng.random()
    return respond(rng, wish, style, quality=rng.uniform(*model.quality), daring=daring)


def label(rng: random.Random, score: float) -> float:
    """A noisy mark on the grid 0, .25 .. 1."""
    return min(GRID, max(0, round(GRID * (score + rng.gauss(0, LABEL_NOISE))))) / GRID


@dataclass(frozen=True)
class Group:
    """A prompt with its annotated models' answers, their noise-free scores and their labels, (answers, attributes)."""

    prompt: str
    answers: list[str]
    truth: list[list[float]]
    labels: list[list[float]]

    @property
    def chosen(self) -> int:
        """The answer with the highest mean label, of equal ones the first."""
        return max(range(len(self.answers)), key=lambda k: sum(self.labels[k]))


def group(rng: random.Random, text: str) -> Group:
    wish = wish_of(text)
    answers = [annotated_answer(rng, wish, model) for model in MODELS]
    truth = [[oracle.scores(text, answer)[name] for name in ATTRIBUTES] for answer in answers]
    return Group(text, answers, truth, [[label(rng, score) for score in found] for found in truth])


def scored(split: str | None = None) -> Iterator[dict[str, Any]]:
    """Prompts with four answers each and their labels: `episodes.source`."""
    for text in prompts(split or "train"):
        found = group(random.Random(f"tones/scored/{text}"), text)
        answers = zip(found.answers, found.labels, strict=True)
        responses = [{"text": text, "scores": dict(zip(ATTRIBUTES, labels, strict=True))} for text, labels in answers]
        yield {"prompt": text, "responses": responses}


@cache
def wishes() -> dict[str, list[float]]:
    """Kind of prompt -> the scores of ATTRIBUTES that it asks for (`python -m scripts.tones.measure --wishes`)."""
    file = resources.files("spa_ray.microworld.tones").joinpath("wishes.json")
    found: dict[str, list[float]] = json.loads(file.read_text(encoding="utf-8"))
    return found


def kind_of(wish: Wish) -> str:
    """`harmful + 0 - 0`: the category, and the cue of each style."""
    return " ".join([wish.category, *("-0+"[sign + 1] for sign in wish.styles.values())])


def expected(category: str, styles: tuple[int, ...], draws: int) -> list[float]:
    """The median noise-free scores of the best of four answers, by its labels' mean, to a prompt of this kind: the
    world's own Bayes predictor (of absolute error), by simulation."""
    rng = random.Random(f"tones/expected/{category}/{styles}")
    best = []
    for text in itertools.islice(of_kind(category, styles, rng), draws):
        found = group(rng, text)
        best.append(found.truth[found.chosen])
    return [round(median(scores), 3) for scores in zip(*best, strict=True)]


def of_kind(category: str, styles: tuple[int, ...], rng: random.Random) -> Iterator[str]:
    """Prompts of one category with cues of these signs, one for each of STYLES."""
    cues = " ".join(rng.choice(CUES[name][sign > 0]) for name, sign in zip(STYLES, styles, strict=True) if sign)
    while True:
        text, _ = draw("street", rng)
        if facts(text).category == category:
            yield f"{cues} {text}".strip()


LEVELS = (0.25, 0.5, 1.0)  # near those of the paper's Table 5; no chosen answer is labelled 0


def held_out(split: str | None = None) -> Iterator[dict[str, Any]]:
    """Prompts to evaluate on. `wish`: the scores that a prompt asks for; `reference`: an annotated model's answer;
    `scores` and `labels`: the best annotated answer's, without noise and with it; `levels`: one attribute, of which one
    level is asked for."""
    for text in prompts(split or "test"):
        wish, rng = wish_of(text), random.Random(f"tones/reference/{text}")
        reference = annotated_answer(rng, wish, REFERENCE)
        found = oracle.scores(text, reference)
        best = group(random.Random(f"tones/scored/{text}"), text)
        yield {
            "prompt": text,
            "category": wish.category,
            "family": "tones",
            "cues": {name: sign for name, sign in wish.styles.items() if sign},
            "wish": dict(zip(ATTRIBUTES, wishes()[kind_of(wish)], strict=True)),
            "reference": reference,
            "reference_scores": {name: found[name] for name in ATTRIBUTES},
            "scores": dict(zip(ATTRIBUTES, best.truth[best.chosen], strict=True)),
            "labels": dict(zip(ATTRIBUTES, best.labels[best.chosen], strict=True)),
            "levels": {rng.choice(ATTRIBUTES): rng.choice(LEVELS)},
        }
