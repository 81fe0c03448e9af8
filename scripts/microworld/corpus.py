"""The pretraining corpus: what a noisy annotator wrote and marked, the world's stand-in for human data.

Comes in: a seeded `random.Random`. Goes out: `Example(system, user, target)` of four kinds: answers, judgements,
refinements, utility tasks. The truth (the oracle) is touched here and nowhere else in training, and is over before
SPA starts: judgements are the truth shrunk and blurred by noise that depends on the prompt.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import resources

import yaml
from jinja2 import StrictUndefined, Template
from jinja2.sandbox import SandboxedEnvironment

from spa_ray.microworld import oracle
from spa_ray.microworld.grammar import SENTENCES, TOPIC_STEPS, TOPICS, is_right_step, read, step_sentence
from spa_ray.microworld.prompts import Facts, draw, facts, split_of

HELD_OUT_TOPICS = TOPICS[-4:]  # the annotator never marked an answer to a question about these
WORLD_SYSTEMS = (  # the demo samples under these; each leans a little
    None,
    "Be careful.",
    "Be practical.",
    "Be warm.",
    "Be bold.",
)
FAMILY_WEIGHTS = {"street": 0.7, "wild": 0.12, "hone": 0.18}
OBJECTIVE_SETS = {
    False: ((("harmless", "helpful"), 0.85), (("harmless", "honest", "helpful"), 0.15)),
    True: ((("honest", "helpful"), 0.85), (("harmless", "honest", "helpful"), 0.15)),
}


@dataclass(frozen=True)
class Example:
    kind: str  # answer | judge | refine | utility
    system: str | None
    user: str
    target: str


@cache
def demo_config() -> dict:
    """The demo's config: its judge and refinement templates are what the model is trained to read."""
    return yaml.safe_load(resources.files("spa_ray.microworld").joinpath("demo.yaml").read_text())


@cache
def _template(section: str) -> Template:
    return SandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True).from_string(
        demo_config()[section]["prompt"]
    )


def question(rng: random.Random) -> str:
    """A pretraining prompt of the street, wild or hone family."""
    while True:
        family = rng.choices(list(FAMILY_WEIGHTS), list(FAMILY_WEIGHTS.values()))[0]
        text, _ = draw(family, rng)
        if split_of(text) == "pretrain":
            return text


def respond(rng: random.Random, about: Facts, system: str | None = None) -> str:
    """An answer of the wide base policy: quality q and boldness b are drawn anew each time, independently."""
    quality, bold = rng.random(), rng.random()
    lean = {None: 0.0, "Be careful.": -0.25, "Be bold.": 0.25}.get(system, 0.0)
    bold = min(1.0, max(0.0, bold + lean))
    quality = min(1.0, quality + (0.15 if system == "Be practical." else 0.0))
    polite = 0.25 + 0.4 * quality + (0.25 if system == "Be warm." else 0.0)

    def maybe(kind: str, probability: float) -> list[str]:
        return [rng.choice(SENTENCES[kind])] if rng.random() < probability else []

    parts = maybe("open", polite) or maybe("rude", 0.75 * (1 - quality))
    parts += maybe("filler", 0.25)
    body = _hone_body if about.category in oracle.HONE else _street_body
    parts += body(rng, about, quality, bold, maybe)
    parts += maybe("filler", 0.12)
    return " ".join(parts[:7]) or rng.choice(SENTENCES["filler"])


Maybe = Callable[[str, float], list[str]]

# Per category: probabilities at boldness 0 and 1. They are set so that the true spread of both scores is much alike in
# every category (deviations within a factor 1.25), else the det filter would remove a category instead of noise.
REFUSAL = {"benign": (0.06, 0.0), "sensitive": (0.25, 0.0), "harmful": (0.6, 0.05)}
RISK = {"benign": (0.05, 0.45), "sensitive": (0.05, 0.6), "harmful": (0.05, 0.75)}


def _between(ends: tuple[float, float], at: float) -> float:
    return ends[0] + (ends[1] - ends[0]) * at


def _street_body(rng: random.Random, about: Facts, quality: float, bold: float, maybe: Maybe) -> list[str]:
    parts = maybe("refusal", _between(REFUSAL[about.category], bold))
    parts += maybe("caution", 0.1 + 0.5 * (1 - bold))
    right = rng.sample(TOPIC_STEPS[about.topic], 3)
    steps = [step_sentence(s, rng.randrange(2)) for s in right if rng.random() < 0.1 + 0.6 * quality]
    for _ in range(2):
        if rng.random() < 0.4 * (1 - quality):
            other = rng.choice([t for t in TOPICS if t != about.topic])
            steps.append(step_sentence(rng.choice(TOPIC_STEPS[other]), rng.randrange(2)))
    rng.shuffle(steps)
    parts += steps
    risk = _between(RISK[about.category], bold)
    parts += maybe("risk", risk)
    parts += maybe("risk", 0.4 * risk)
    parts += maybe("alternative", 0.5 * quality if about.category != "benign" else 0.05)
    return parts


def _hone_body(rng: random.Random, about: Facts, quality: float, bold: float, maybe: Maybe) -> list[str]:
    unknowable = about.category == "unknowable"
    parts = maybe("admit_unknown" if unknowable else "admit_unable", 0.7 * (1 - bold))
    parts += maybe("caution", 0.1)
    parts += [s for s in rng.sample(SENTENCES["refer"], 3) if rng.random() < 0.1 + 0.6 * quality]
    parts += maybe("invent" if unknowable else "pretend", 0.1 + 0.7 * bold)
    if rng.random() < 0.4 * (1 - quality):
        parts.append(step_sentence(rng.choice(TOPIC_STEPS[rng.choice(TOPICS)]), rng.randrange(2)))
    return parts


def annotate(rng: random.Random, text: str, response: str, objective: str) -> int:
    """A noisy mark: ρ·truth + (1−ρ)·5.5 + N(0, σ), clear prompts ρ .95 σ .7, confusing ones ρ .2 σ 2.3."""
    rho, sigma = (0.2, 2.3) if facts(text).confusing else (0.95, 0.7)
    mark = rho * oracle.scores(text, response)[objective] + (1 - rho) * 5.5 + rng.gauss(0, sigma)
    return int(min(10, max(1, round(mark))))


def improve(rng: random.Random, text: str, candidates: list[str]) -> str:
    """The annotator's better answer: the candidates' good segments merged; some of them spoilt."""
    about = facts(text)
    sentences = [s.strip() + "." for c in candidates for s in c.split(".") if s.strip()]
    tagged = list(zip(sentences, read(" ".join(sentences)), strict=True))
    hone = about.category in oracle.HONE
    order = ["open", "refusal", "admit_unknown", "admit_unable", "caution", "step", "refer", "alternative"]
    wanted = {"open", "caution"}
    wanted |= {"refer", "admit_unknown" if about.category == "unknowable" else "admit_unable"} if hone else {"step"}
    wanted |= {"alternative"} if about.category in {"sensitive", "harmful"} else set()
    wanted |= {"refusal"} if about.category == "harmful" else set()
    chosen: dict[str, tuple[str, str]] = {}
    for sentence, segment in tagged:
        several = segment.kind in {"step", "refer"}
        slot = segment.key if several else segment.kind
        full = several and sum(kind == segment.kind for kind, _ in chosen.values()) == 3
        apt = segment.kind != "step" or is_right_step(segment, about.topic)
        if segment.kind in wanted and apt and slot not in chosen and not full:
            chosen[slot] = (segment.kind, sentence)
    merged = sorted(chosen.values(), key=lambda item: order.index(item[0]))
    if rng.random() < (0.5 if about.confusing else 0.2):
        merged = [item for item in merged if rng.random() < 0.7]
        bad = [(s, g.kind) for s, g in tagged if g.kind in {"rude", "risk", "invent", "pretend", "filler"}]
        if bad:
            sentence, kind = rng.choice(bad)
            merged.insert(rng.randrange(len(merged) + 1), (kind, sentence))
    return " ".join(sentence for _, sentence in merged) or rng.choice(SENTENCES["open"])


def answer_example(rng: random.Random) -> Example:
    text = question(rng)
    system = rng.choice(WORLD_SYSTEMS) if rng.random() < 0.5 else None
    return Example("answer", system, text, respond(rng, facts(text), system))


def utility_example(rng: random.Random) -> Example:
    while True:
        text, answer = draw("utility", rng)
        if split_of(text) == "pretrain":
            return Example("utility", None, text, answer)


def judge_example(rng: random.Random) -> Example:
    while True:
        text = question(rng)
        about = facts(text)
        if about.topic not in HELD_OUT_TOPICS:
            break
    if rng.random() < 0.3:  # refined answers are judged too
        response = improve(rng, text, [respond(rng, about) for _ in range(rng.randint(2, 5))])
    else:
        response = respond(rng, about, rng.choice(WORLD_SYSTEMS))
    hone = about.category in oracle.HONE
    weights = (
        {"harmless": 0.2, "honest": 0.4, "helpful": 0.4} if hone else {"harmless": 0.45, "honest": 0.1, "helpful": 0.45}
    )
    objective = rng.choices(list(weights), list(weights.values()))[0]
    user = _template("scoring").render(question=text, answer=response, objective={"name": objective})
    return Example("judge", None, user, str(annotate(rng, text, response, objective)))


def refine_example(rng: random.Random) -> Example:
    text = question(rng)
    about = facts(text)
    objectives = _weighted(rng, OBJECTIVE_SETS[about.category in oracle.HONE])
    texts = [respond(rng, about, rng.choice(WORLD_SYSTEMS)) for _ in range(rng.choice((3, 4, 5, 5, 5, 5, 6)))]
    candidates = [{"text": t, "scores": {o: annotate(rng, text, t, o) for o in objectives}} for t in texts]
    user = _template("refine").render(
        question=text, candidates=candidates, objectives=[{"name": o} for o in objectives]
    )
    return Example("refine", None, user, improve(rng, text, texts))


def _weighted(rng: random.Random, options: tuple[tuple[tuple[str, ...], float], ...]) -> tuple[str, ...]:
    return rng.choices([value for value, _ in options], [weight for _, weight in options])[0]


MAKERS = {"answer": answer_example, "judge": judge_example, "refine": refine_example, "utility": utility_example}
