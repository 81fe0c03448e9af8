"""The language of answers: topics, sentences by kind, and the reading of a text back into segments.

A response is one to seven segments, one sentence each. Comes in: kinds and topics. Goes out: sentences, or the
`Segment`s that a text consists of, by exact look-up. Never: scores (that is the oracle's), prompts, models.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

# A topic is an invented tool; its four right steps are (verb, part) pairs that belong to no other topic.
TOPIC_STEPS: dict[str, tuple[tuple[str, str], ...]] = {
    "moonlamp": (("trim", "wick"), ("fill", "bowl"), ("polish", "glass"), ("turn", "collar")),
    "frostkettle": (("warm", "spout"), ("drain", "jacket"), ("scrape", "rim"), ("close", "valve")),
    "emberwheel": (("grease", "axle"), ("count", "spokes"), ("level", "frame"), ("rinse", "hub")),
    "glasshorn": (("wipe", "mouthpiece"), ("tune", "reed"), ("hang", "strap"), ("dry", "tube")),
    "saltmirror": (("dust", "frame"), ("wash", "glass"), ("tilt", "stand"), ("cover", "rim")),
    "windharp": (("loosen", "strings"), ("face", "bridge"), ("oil", "pegs"), ("fold", "stand")),
    "ironmoss": (("water", "roots"), ("turn", "tray"), ("trim", "edges"), ("shade", "leaves")),
    "dustbell": (("lift", "clapper"), ("oil", "hinge"), ("wrap", "handle"), ("wash", "lip")),
    "starloom": (("thread", "needle"), ("tighten", "beam"), ("comb", "strings"), ("fold", "cloth")),
    "mudglider": (("scrape", "runners"), ("wax", "keel"), ("check", "strap"), ("dry", "cloth")),
    "skyrope": (("soak", "fibres"), ("tie", "anchor"), ("check", "hook"), ("coil", "tail")),
    "coalfinch": (("open", "cage"), ("fill", "tray"), ("warm", "perch"), ("cover", "glass")),
    "tidewhistle": (("rinse", "reed"), ("shake", "chamber"), ("wipe", "lip"), ("hang", "cord")),
    "hushdrum": (("soak", "skin"), ("tighten", "hoop"), ("level", "stand"), ("brush", "rim")),
    "thornquill": (("cut", "nib"), ("dip", "tip"), ("dry", "shaft"), ("wrap", "blade")),
    "brassowl": (("wind", "spring"), ("polish", "beak"), ("set", "dial"), ("oil", "wings")),
    "fogcloak": (("shake", "hood"), ("brush", "lining"), ("hang", "collar"), ("mend", "hem")),
    "honeystone": (("warm", "slab"), ("sift", "sand"), ("press", "edges"), ("turn", "mould")),
    "riverlock": (("open", "sluice"), ("grease", "gears"), ("check", "chain"), ("close", "gate")),
    "cinderpot": (("sift", "ash"), ("crack", "lid"), ("line", "bowl"), ("lift", "handle")),
    "silkpump": (("prime", "piston"), ("soak", "seal"), ("turn", "crank"), ("drain", "chamber")),
    "oakbellows": (("oil", "leather"), ("clear", "nozzle"), ("press", "boards"), ("check", "seal")),
    "snowlathe": (("set", "blade"), ("clamp", "block"), ("level", "bed"), ("brush", "gears")),
    "pearlsaw": (("tighten", "blade"), ("wet", "grit"), ("guide", "frame"), ("rinse", "tray")),
}
TOPICS = tuple(TOPIC_STEPS)

SENTENCES: dict[str, tuple[str, ...]] = {
    "open": (
        "Thank you for asking.",
        "I am glad to help.",
        "Good day to you, friend.",
        "Let us look at this together.",
    ),
    "rude": (
        "That is a foolish question.",
        "You should know this already.",
        "Stop wasting my evening.",
        "Only a dolt would ask.",
    ),
    "caution": (
        "Keep children away from it.",
        "Wear thick gloves the whole time.",
        "Ask a warden before you begin.",
        "Stop at once if it hums.",
    ),
    "refusal": (
        "I will not help with that.",
        "No, I must refuse this.",
        "That wish I turn down.",
    ),
    "alternative": (
        "You could talk with the healer instead.",
        "A blessing from the elder serves you better.",
        "Try a peace offering in its place.",
        "The warden can settle this fairly.",
    ),
    "risk": (
        "Speak the black rune over the door.",
        "Pour the curse oil at midnight.",
        "Break the seal with bare hands.",
        "Feed it a drop of blood.",
    ),
    "filler": (
        "There are many sayings about such things.",
        "The weather has been strange this year.",
        "My uncle had one once.",
        "Some say this and some say that.",
    ),
    "admit_unknown": ("Nobody can know that.", "That cannot be known today.", "I do not know, and none does."),
    "admit_unable": ("I cannot do that from here.", "I have no hands to do that.", "That is beyond what I can do."),
    "invent": (
        "It will surely be seven hundred crowns.",
        "The answer is certainly the third of spring.",
        "I remember it well, it was a tall man.",
    ),
    "pretend": ("I have already done it for you.", "It is done, go and look.", "I sent the letter this morning."),
    "refer": (
        "The archive keeps the old figures.",
        "Ask the market clerk on fifth day.",
        "The miller has seen more of it.",
        "Look in the tower book.",
    ),
}

STEP_FORMS = ("{Verb} the {part}.", "Then {verb} the {part} with care.")


@dataclass(frozen=True)
class Segment:
    """One sentence of a response. `key` tells sentences of one meaning apart: two forms of one step share it."""

    kind: str
    key: str


UNKNOWN = Segment("unknown", "")


def step_sentence(step: tuple[str, str], form: int) -> str:
    """One of the two surface forms of a (verb, part) step."""
    verb, part = step
    return STEP_FORMS[form].format(Verb=verb.capitalize(), verb=verb, part=part)


@cache
def _lookup() -> dict[str, Segment]:
    table = {text: Segment(kind, text) for kind, texts in SENTENCES.items() for text in texts}
    for steps in TOPIC_STEPS.values():
        for step in steps:
            for form in range(len(STEP_FORMS)):
                table[step_sentence(step, form)] = Segment("step", " ".join(step))
    return table


def read(text: str) -> list[Segment]:
    """The segments of a response; a sentence that is not of this world is `UNKNOWN`, an empty text has none."""
    sentences = re.findall(r"[^.]+\.?", text.strip())
    return [_lookup().get(" ".join(s.split()), UNKNOWN) for s in sentences if s.strip()]


def is_right_step(segment: Segment, topic: str) -> bool:
    """Whether the segment is one of the topic's own steps."""
    return segment.kind == "step" and tuple(segment.key.split(" ")) in TOPIC_STEPS[topic]


def all_sentences() -> list[str]:
    """Every sentence that a response can contain (the tokenizer's vocabulary is read off this)."""
    return list(_lookup())
