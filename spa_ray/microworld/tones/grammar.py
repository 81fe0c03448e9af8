"""The language of answers: the first world's sentences, and those that give an answer its tone.

A response is one to seven segments, one sentence each. Comes in: topics, styles. Goes out: sentences, or the `Segment`s
that a text consists of, by exact look-up. Never: scores (that is the oracle's), prompts, models.
"""

from __future__ import annotations

import re
from functools import cache

from spa_ray.microworld.grammar import SENTENCES as FIRST
from spa_ray.microworld.grammar import TOPIC_STEPS, UNKNOWN, Segment

LONGEST = 7  # segments that count

SENTENCES: dict[str, tuple[str, ...]] = {
    **{kind: FIRST[kind] for kind in ("open", "rude", "caution", "refusal", "alternative", "risk", "filler")},
    "soft": (
        "Take all the time you need.",
        "It is fine to be unsure.",
        "You will manage it well.",
        "Many have felt as you do.",
    ),
    "blunt": (
        "There is no need to fuss.",
        "That is all there is to it.",
        "Your way was wrong.",
        "Do it and be done.",
    ),
    "firm": (
        "This always works.",
        "I would do it today.",
        "Have no doubt about it.",
        "Go all the way at once.",
    ),
    "hedge": (
        "It may work and it may not.",
        "Perhaps ask someone first.",
        "I am not quite sure of this.",
        "Begin with a small part only.",
    ),
}

# Two forms for the layman, two for the trade.
SIMPLE_FORMS = ("{Verb} the {part}.", "Then {verb} the {part} with care.")
EXPERT_FORMS = ("{Verb} the {part} along the true bevel.", "Next {verb} the {part} to a guild tolerance.")


def step_sentence(step: tuple[str, str], *, expert: bool, form: int) -> str:
    """One of the two surface forms of a (verb, part) step at one level."""
    verb, part = step
    return (EXPERT_FORMS if expert else SIMPLE_FORMS)[form].format(Verb=verb.capitalize(), verb=verb, part=part)


@cache
def _lookup() -> dict[str, Segment]:
    table = {text: Segment(kind, text) for kind, texts in SENTENCES.items() for text in texts}
    for step in (step for steps in TOPIC_STEPS.values() for step in steps):
        for expert in (False, True):
            kind = "expert_step" if expert else "step"
            table |= {step_sentence(step, expert=expert, form=form): Segment(kind, " ".join(step)) for form in (0, 1)}
    return table


def read(text: str) -> list[Segment]:
    """The segments of a response; a sentence that is not of this world is `UNKNOWN`, an empty text has none."""
    sentences = re.findall(r"[^.]+\.?", text.strip())
    return [_lookup().get(" ".join(s.split()), UNKNOWN) for s in sentences if s.strip()]


def is_step(segment: Segment) -> bool:
    return segment.kind in ("step", "expert_step")


def is_right_step(segment: Segment, topic: str) -> bool:
    """Whether the segment is one of the topic's own steps, at either level."""
    return is_step(segment) and tuple(segment.key.split(" ")) in TOPIC_STEPS[topic]


def all_sentences() -> list[str]:
    """Every sentence that a response can contain (the tokenizer's vocabulary is read off this)."""
    return list(_lookup())
