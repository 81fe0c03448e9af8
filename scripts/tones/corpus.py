"""What the model of `tones` is pretrained on: answers of the base policy, judgements, refinements, tasks with scores,
and readings.

Comes in: a seeded `random.Random`. Goes out: the first world's `Example`s. Prompts are of the `pretrain` split. Answers
follow no cue, and no score that their prompt asks for: that is left to fine-tuning. That the model understands both, as
a real one does, comes from the readings, which show no answer. Judgements are the oracle's marks, shrunk and blurred as
the first world's annotator has them.
"""

from __future__ import annotations

import random

from scripts.microworld.corpus import WORLD_SYSTEMS, Example, _template
from spa_ray.methods.sga import BETWEEN, SCORE, SENTENCE
from spa_ray.microworld.prompts import NUMBERS, draw, facts, split_of
from spa_ray.microworld.tones import oracle
from spa_ray.microworld.tones.answers import any_style, respond
from spa_ray.microworld.tones.grammar import is_right_step, is_step, read
from spa_ray.microworld.tones.prompts import ATTRIBUTES, STYLES, Wish, draw_prompt, wish_of

OBJECTIVES = ("harmless", "helpful")  # of SPA in this world
STREET = 0.4  # of questions without any sentence of this world
ASKED = {"sentence": 0.3, "prefix": 0.1, "suffix": 0.1}  # prompts that ask for scores in the words of SGA, CPO, RiC
READER = "What kind of answer is wished?"
READING = {
    "thorough": {-1: "brief", 1: "thorough"},
    "expert": {-1: "simple", 1: "expert"},
    "gentle": {-1: "blunt", 1: "gentle"},
    "bold": {-1: "careful", 1: "bold"},
    "harmless": {-1: "wrong", 1: "safe"},  # where a score names it
}


def question(rng: random.Random) -> str:
    while True:
        text = draw("street", rng)[0] if rng.random() < STREET else draw_prompt(rng)
        if split_of(text) == "pretrain":
            return text


def answer(rng: random.Random, wish: Wish, system: str | None = None) -> str:
    """Of the base policy; a system prompt leans it a little."""
    style = {name: any_style(rng) for name in STYLES}
    if system == "Be warm.":
        style["gentle"] = max(style["gentle"], 0)
    daring = rng.random() + {"Be careful.": -0.25, "Be bold.": 0.25}.get(system or "", 0.0)
    quality = rng.random() + (0.15 if system == "Be practical." else 0.0)
    return respond(rng, wish, style, quality=min(1.0, quality), daring=min(1.0, max(0.0, daring)))


def asking(text: str, scores: dict[str, float]) -> str:
    """The prompt with SGA's sentence."""
    return text + SENTENCE + BETWEEN.join(SCORE.format(name=name, value=value) for name, value in scores.items())


def asked(rng: random.Random, text: str) -> str:
    """The prompt as it is, or with scores that the answer will not heed."""
    names = rng.sample(ATTRIBUTES, rng.randint(1, len(ATTRIBUTES)))
    at, kinds = rng.random(), list(ASKED)
    if at < ASKED["sentence"]:
        return asking(text, {name: float(_unit(rng)) for name in names})
    if at < ASKED["sentence"] + ASKED["prefix"]:
        return "".join(f"< {name}: {rng.choice((0, 0.25, 0.5, 0.75, 1)):g} > " for name in names) + text
    if at < sum(ASKED[kind] for kind in kinds):
        return text + " " + "".join(f"<rm{k}_score> {rng.gauss(0, 1.3):.1f} " for k in range(1, len(ATTRIBUTES) + 1))
    return text


def _unit(rng: random.Random) -> str:
    return f"{rng.randint(0, 100) / 100:.2f}"


def answer_example(rng: random.Random) -> Example:
    text, system = question(rng), rng.choice(WORLD_SYSTEMS) if rng.random() < 0.3 else None
    return Example("answer", system, asked(rng, text), answer(rng, wish_of(text), system))


def annotate(rng: random.Random, text: str, response: str, objective: str) -> int:
    """A noisy mark of 1 to 10, noisier on the first world's confusing prompts."""
    rho, sigma = (0.2, 2.3) if facts(text).confusing else (0.95, 0.7)
    mark = rho * oracle.marks([{"content": text}], "", response, objective) + (1 - rho) * 5.5 + rng.gauss(0, sigma)
    return int(min(10, max(1, round(mark))))


def improve(rng: random.Random, text: str, candidates: list[str]) -> str:
    """The annotator's better answer: the candidates' good segments merged; some of them spoilt."""
    about = facts(text)
    sentences = [s.strip() + "." for c in candidates for s in c.split(".") if s.strip()]
    tagged = list(zip(sentences, read(" ".join(sentences)), strict=True))
    order = ["open", "refusal", "caution", "step", "alternative", "soft"]
    wanted = {"open", "caution", "step", "soft"} | ({"alternative"} if about.category != "benign" else set())
    wanted |= {"refusal"} if about.category == "harmful" else set()
    chosen: dict[str, tuple[str, str]] = {}
    for sentence, segment in tagged:
        kind = "step" if is_step(segment) else segment.kind
        slot = segment.key if kind == "step" else kind
        full = kind == "step" and sum(k == "step" for k, _ in chosen.values()) == 3
        apt = kind != "step" or is_right_step(segment, about.topic)
        if kind in wanted and apt and slot not in chosen and not full:
            chosen[slot] = (kind, sentence)
    merged = sorted(chosen.values(), key=lambda item: order.index(item[0]))
    if rng.random() < (0.5 if about.confusing else 0.2):
        merged = [item for item in merged if rng.random() < 0.7]
        if bad := [(s, g.kind) for s, g in tagged if g.kind in {"rude", "risk", "blunt", "filler"}]:
            sentence, kind = rng.choice(bad)
            merged.insert(rng.randrange(len(merged) + 1), (kind, sentence))
    return " ".join(sentence for _, sentence in merged) or "Thank you for asking."


def judge_example(rng: random.Random) -> Example:
    text, objective = question(rng), rng.choice(OBJECTIVES)
    wish = wish_of(text)
    response = answer(rng, wish, rng.choice(WORLD_SYSTEMS))
    if rng.random() < 0.3:  # refined answers are judged too
        response = improve(rng, text, [answer(rng, wish) for _ in range(rng.randint(2, 5))])
    user = _template("scoring").render(question=text, answer=response, objective={"name": objective})
    return Example("judge", None, user, str(annotate(rng, text, response, objective)))


def refine_example(rng: random.Random) -> Example:
    text = question(rng)
    wish = wish_of(text)
    texts = [answer(rng, wish, rng.choice(WORLD_SYSTEMS)) for _ in range(rng.choice((3, 4, 5, 5, 5)))]
    candidates = [{"text": t, "scores": {o: annotate(rng, text, t, o) for o in OBJECTIVES}} for t in texts]
    names = [{"name": o} for o in OBJECTIVES]
    user = _template("refine").render(question=text, candidates=candidates, objectives=names)
    return Example("refine", None, user, improve(rng, text, texts))


def number_example(rng: random.Random) -> Example:
    """What a score is: which of two is higher, and in which quarter one is."""
    first, second = _unit(rng), _unit(rng)
    if rng.random() < 0.5:
        told = "equal" if first == second else "the first" if first > second else "the second"
        return Example("number", None, f"Which score is higher: {first} or {second}?", told)
    quarter = min(4, int(float(first) * 4) + 1)
    return Example("number", None, f"Which quarter of one is the score {first}?", NUMBERS[quarter])


def reading_example(rng: random.Random) -> Example:
    """Which kind of answer a prompt wishes, in one word a style; asked before the prompt or behind it."""
    text = question(rng)
    told = " ".join(READING[name].get(sign, "any") for name, sign in wish_of(text).styles.items())
    if rng.random() < 0.5:
        return Example("reading", READER, text, told)
    return Example("reading", None, f"{text} {READER}", told)


def told_example(rng: random.Random) -> Example:
    """The same of a prompt that says scores in words: what they name goes before its cues. No answer is seen."""
    text, names = question(rng), rng.sample(ATTRIBUTES, rng.randint(1, len(ATTRIBUTES)))
    values = {name: rng.choice((rng.random(), rng.randint(0, 4) / 4)) for name in names}
    if rng.random() < 0.7:
        said = asking(text, values)
    else:
        said = "".join(f"< {name}: {value:.2f} > " for name, value in values.items()) + text
    signs = {name: (value > 0.6) - (value < 0.4) for name, value in values.items()}
    styles = {**wish_of(text).styles, **signs}
    told = [READING[name].get(styles[name], "any") for name in READING if name in styles]
    return Example("told", None, f"{said} {READER}", " ".join(told))


MAKERS = {
    "answer": answer_example,
    "judge": judge_example,
    "refine": refine_example,
    "number": number_example,
    "reading": reading_example,
    "told": told_example,
}
