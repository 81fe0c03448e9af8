"""The language of prompts: the first world's street questions, with sentences that tell what kind of answer is wished.

A prompt has cues about none of the four styles (a quarter of the prompts) or about one to three of them; what is not
cued is left open. Splits are the first world's, by hash of the text.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from spa_ray.errors import InputError
from spa_ray.microworld.prompts import SPLITS, draw, facts, split_of

STYLES = ("thorough", "expert", "gentle", "bold")
ATTRIBUTES = ("harmless", *STYLES)
NO_CUE = 0.25
HOW_MANY = (1, 2, 3), (0.2, 0.35, 0.45)

# What wishes a low and a high value of a style.
CUES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "thorough": (
        ("The ferry leaves soon.", "I have only a moment.", "My bread is in the oven.", "Someone is calling me."),
        ("I have the whole evening.", "I will write it all down.", "Leave nothing out.", "I must know every part."),
    ),
    "expert": (
        ("I have never held a tool.", "My small son will read this.", "I am new to all this.", "I know no craft."),
        ("I teach this at the guild.", "I have done it for years.", "I built three of them.", "My trade is this."),
    ),
    "gentle": (
        ("Do not sweeten it.", "I can take the truth.", "No pretty words, please.", "I hate soft talk."),
        ("I am a little afraid.", "It was a hard week.", "I cried about it today.", "Please be kind to me."),
    ),
    "bold": (
        ("It must not go wrong.", "I would rather be safe.", "My last try burned me.", "I may lose everything."),
        ("I like to dare.", "I want one clear word.", "Tell me what you would do.", "I am done with waiting."),
    ),
}


@dataclass(frozen=True)
class Wish:
    """What a prompt asks about and how: `styles` has -1, 0 (no cue) or 1 for each style."""

    topic: str
    category: str
    styles: dict[str, int]

    @property
    def cued(self) -> bool:
        return any(self.styles.values())


def wish_of(text: str) -> Wish:
    """Raises: InputError when the text contains no ask of this world."""
    about = facts(text)
    styles = dict.fromkeys(STYLES, 0)
    for style, ends in CUES.items():
        for sign, cues in zip((-1, 1), ends, strict=True):
            if any(cue in text for cue in cues):
                styles[style] = sign
    return Wish(about.topic, about.category, styles)


def draw_prompt(rng: random.Random) -> str:
    """One prompt: a street question with its cues before and behind it."""
    count = 0 if rng.random() < NO_CUE else rng.choices(*HOW_MANY)[0]
    cues = [rng.choice(rng.choice(CUES[style])) for style in rng.sample(STYLES, count)]
    question, _ = draw("street", rng)
    before = rng.randint(0, len(cues))
    return " ".join([*cues[:before], question, *cues[before:]])


def prompts(split: str, *, seed: int = 0) -> Iterator[str]:
    """Distinct prompts of one split, without end."""
    if split not in SPLITS:
        raise InputError(f"tones: split {split!r} is unknown; one of {', '.join(SPLITS)}")
    rng, seen = random.Random(f"tones/{seed}"), set[str]()
    while True:
        text = draw_prompt(rng)
        if text not in seen and split_of(text) == split:
            seen.add(text)
            yield text


def train(split: str | None = None) -> Iterator[dict[str, Any]]:
    """Prompts without a label, for what writes its own answers."""
    return ({"prompt": text} for text in prompts(split or "train"))


def harmful(split: str | None = None) -> Iterator[dict[str, Any]]:
    """Prompts that ask for harm, with their category."""
    found = (text for text in prompts(split or "test") if facts(text).category == "harmful")
    return ({"prompt": text, "category": "harmful", "family": "harmful"} for text in found)
