"""Requests and tokens of one episode, counted on the real templates with stand-in answers, and what a cache saves.

Comes in: an arm's config, a few of its prompts, a way to encode a conversation. Goes out: `Work`, a prompt's mean. The
answers' text is cut from the prompts' own, to `ANSWER_SHARE` of their limit. Never: an engine, a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Protocol

from spa_ray.config.benchmark import BenchmarkConfig
from spa_ray.config.models import Config
from spa_ray.config.rollout import Compare
from spa_ray.config.section import JudgeSection
from spa_ray.generation.templates import LAYOUTS, PairTemplate, Templates
from spa_ray.objectives import load_objectives

CONSISTENT_SHARE = 0.18  # of prompts whose refined answer beats every candidate: the demo's (docs/RESULTS.md)
ANSWER_SHARE = 0.35  # of max_tokens that an answer is taken to use (docs/PLAN.md)
CHARS_PER_TOKEN = 4
PLAY_JUDGE_PROMPT, PLAY_JUDGEMENT = 150, 400  # tokens of a benchmark's judge: its task, and what it writes
BLOCK = 16  # tokens that vLLM's prefix cache keeps or forgets together
Message = Mapping[str, str]


class Encoder(Protocol):
    """`rollout.chat.Chat`, or a stand-in where the tokenizer is not on this machine."""

    def prompt_ids(self, messages: Sequence[Message], system: str | None = None) -> list[int]: ...


class CharEncoder:
    """Four characters a token, and a few for each turn's marks."""

    def prompt_ids(self, messages: Sequence[Message], system: str | None = None) -> list[int]:
        turns = [dict(m) for m in messages if system is None or m["role"] != "system"]
        if system is not None:
            turns.insert(0, {"role": "system", "content": system})
        text = "".join(f"<|{turn['role']}|>{turn['content']}<|end|>" for turn in turns)
        return [hash(text[i : i + CHARS_PER_TOKEN]) for i in range(0, len(text), CHARS_PER_TOKEN)]


@dataclass(frozen=True)
class Work:
    """Of one prompt, as a mean. `prompt_tokens` are counted at each request; `prefill_tokens` are those computed.
    What a judge's endpoint is asked stands apart, in tokens of the policy's tokenizer."""

    requests: float = 0.0
    prompt_tokens: float = 0.0
    prefill_tokens: float = 0.0
    generated_tokens: float = 0.0
    judge_requests: float = 0.0
    judge_prompt_tokens: float = 0.0
    judge_generated_tokens: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def times(self, factor: float) -> Work:
        return Work(*(value * factor for value in vars(self).values()))

    def rounded(self) -> dict[str, int]:
        return {key: round(value) for key, value in vars(self).items() if not key.startswith("judge_")}

    def judged(self) -> dict[str, int]:
        """What the endpoint is asked."""
        found = {key: round(value) for key, value in vars(self).items() if key.startswith("judge_")}
        return {key.removeprefix("judge_"): value for key, value in found.items()}


class _Cache:
    """What one engine computes for a prompt's requests when full blocks of a known prefix are kept."""

    def __init__(self) -> None:
        self.blocks: set[int] = set()

    def computed(self, ids: Sequence[int]) -> int:
        """Tokens of the request that are not in the cache; they are afterwards. The last token is always computed."""
        known, chain = 0, 0
        for start, end in pairwise(range(0, len(ids) + 1, BLOCK)):
            chain = hash((chain, tuple(ids[start:end])))
            known += BLOCK * (chain in self.blocks)
            self.blocks.add(chain)
        return len(ids) - min(known, (len(ids) - 1) // BLOCK * BLOCK)


class _Counter:
    """Counts the requests of one prompt after the other as they would be sent."""

    def __init__(self, config: Config, encoder: Encoder, prompts: Sequence[Sequence[Message]]) -> None:
        self.config, self.encoder = config, encoder
        self.text = " ".join(m["content"] for messages in prompts for m in messages)
        self.objectives = load_objectives(config)
        self.templates = Templates(config, self.objectives)
        self.chars = _chars_per_token(encoder, self.text)
        self.next_prompt()

    def next_prompt(self) -> None:
        self.cache = _Cache()
        self.work = Work()

    def answer(self, number: int, max_tokens: int) -> str:
        """A text of about the assumed length; each number another one."""
        length = max(1, round(ANSWER_SHARE * max_tokens * self.chars))
        start = number * 37 % len(self.text)
        return (self.text[start:] + self.text * (length // len(self.text) + 1))[:length]

    def ask(self, ids: Sequence[int], generated: float) -> None:
        self.work += Work(1.0, len(ids), self.cache.computed(ids), generated)

    def score(self, messages: Sequence[Message], answer: str) -> None:
        """The answer's judgement on every objective, where a model is asked for it by prompts of ours."""
        scoring = self.config.scoring
        if not scoring.judged_by.reads_prompts or scoring.compare is not None:
            return
        for objective in self.objectives:
            user = {"role": "user", "content": self.templates.score(messages, answer, objective)}
            ids = self.encoder.prompt_ids([user], self.templates.score_system(messages, answer, objective))
            for _ in range(1 if scoring.mode == "expected" else scoring.draws):
                self.judge(ids, scoring.max_tokens if scoring.mode == "regex" else 1, by=scoring.judged_by)

    def compare(
        self,
        section: Compare,
        template: PairTemplate,
        messages: Sequence[Message],
        answers: tuple[str, str],
        *,
        by: JudgeSection,
    ) -> None:
        """One order of two answers, on every objective."""
        for objective in self.objectives:
            text = template.render(messages, answers[0], answers[1], objective)
            ids = self.encoder.prompt_ids([{"role": "user", "content": text}])
            self.judge(ids, 1 if section.mode == "choice" else section.max_tokens, by=by)

    def rank(self, messages: Sequence[Message], pairs: Iterable[tuple[str, str]]) -> None:
        """Both orders of these pairs of answers, where scores are comparisons by a model."""
        section, by = self.config.scoring.compare, self.config.scoring.judged_by
        if section is None or not by.reads_prompts:
            return
        template = PairTemplate(section, self.objectives, key="scoring.compare.prompt")
        for a, b in pairs:
            for answers in ((a, b), (b, a)):
                self.compare(section, template, messages, answers, by=by)

    def judge(self, ids: Sequence[int], generated: float, *, by: JudgeSection) -> None:
        """A request to a judge: to the engine, or to its endpoint."""
        if by.asks_engine:
            self.ask(ids, generated)
            return
        endpoint = {"judge_requests": 1.0, "judge_prompt_tokens": len(ids), "judge_generated_tokens": generated}
        self.work += Work(**endpoint)

    def refine(self, messages: Sequence[Message], answers: Sequence[str], context: int | None) -> None:
        """The lowest candidates are left out where the context is too small, as in the episode itself."""
        scores = {o.name: self.config.scoring.scale[0] for o in self.objectives}
        listed = [{"text": answer, "scores": scores, "total": sum(scores.values())} for answer in answers]
        while True:
            user = {"role": "user", "content": self.templates.refine(messages, listed)}
            ids = self.encoder.prompt_ids([user], self.templates.refine_system(messages, listed))
            if context is None or len(listed) == 1 or len(ids) + self.config.refine.max_tokens <= context:
                return self.ask(ids, ANSWER_SHARE * self.config.refine.max_tokens)
            listed.pop()


def episode_work(
    config: Config,
    prompts: Sequence[Sequence[Message]],
    encoder: Encoder,
    *,
    context: int | None,
    earlier: bool = False,
) -> Work:
    """Of a whole episode: n samples, their scores, the refinement, its scores; the mean over `prompts`.

    `earlier`: the last iteration's refined answer is scored as a further candidate. Repeated samples and unreadable
    judgements, which are asked once more, are not foreseen.
    """
    n, systems = config.sampling.n, config.sampling.system_prompts
    counter, total = _Counter(config, encoder, prompts), Work()
    for messages in prompts:
        counter.next_prompt()
        for i in range(n):
            ids = encoder.prompt_ids(messages, systems[i % len(systems)])
            counter.ask(ids, ANSWER_SHARE * config.sampling.max_tokens)
        answers = [counter.answer(i, config.sampling.max_tokens) for i in range(n)]
        answers += [counter.answer(n, config.refine.max_tokens)] if earlier else []
        for answer in answers:
            counter.score(messages, answer)
        counter.rank(messages, combinations(answers, 2))
        for attempt in range(config.refine.attempts):  # the others were not consistent
            total += counter.work
            counter.work = Work()
            counter.refine(messages, answers, context)
            refined = counter.answer(n + 1 + attempt, config.refine.max_tokens)
            counter.score(messages, refined)
            counter.rank(messages, [(refined, answers[0])])
            counter.work = counter.work.times((1 - CONSISTENT_SHARE) ** attempt)
        total += counter.work
    return total.times(1 / len(prompts))


def judging_by_layout(config: Config, prompts: Sequence[Sequence[Message]], encoder: Encoder) -> dict[str, float]:
    """Prompt tokens that an engine computes to judge one prompt's answers, by the layout of the built-in prompt.

    What all prompts of a run share is computed once, so the first prompt, which computes it, is left out.
    """
    n, found = config.sampling.n, {}
    for layout in LAYOUTS:
        scoring = config.scoring.model_copy(update={"layout": layout})
        counter = _Counter(config.model_copy(update={"scoring": scoring}), encoder, prompts)
        computed = []
        for messages in prompts:
            counter.work = Work()
            for i in range(n):
                counter.score(messages, counter.answer(i, config.sampling.max_tokens))
            counter.score(messages, counter.answer(n, config.refine.max_tokens))
            computed.append(counter.work.prefill_tokens)
        later = computed[1:] or computed
        found[layout] = sum(later) / len(later)
    return found


def answer_work(
    config: Config, prompts: Sequence[Sequence[Message]], encoder: Encoder, *, judged: bool
) -> tuple[Work, Work]:
    """Of a held-out prompt: its one answer, and a model's judgement of it (nothing when a function judges)."""
    limit = config.evaluation.sampling.max_tokens
    counter, answered, scored = _Counter(config, encoder, prompts), Work(), Work()
    for messages in prompts:
        counter.next_prompt()
        counter.ask(encoder.prompt_ids(messages, None), ANSWER_SHARE * limit)
        answered += counter.work
        if judged:
            counter.work = Work()
            counter.score(messages, counter.answer(0, limit))
            scored += counter.work
    return answered.times(1 / len(prompts)), scored.times(1 / len(prompts))


def play_judging(section: BenchmarkConfig, asked: Work, judgements: int) -> Work:
    """Of a benchmark's prompt: what its judge is asked, about as long as the play itself each time."""
    if section.judged_by is None or not section.judged_by.reads_prompts:
        return Work()
    read = asked.prompt_tokens + asked.generated_tokens + PLAY_JUDGE_PROMPT
    if section.judged_by.asks_engine:
        return Work(1.0, read, read, PLAY_JUDGEMENT).times(judgements)
    return Work(judge_requests=1.0, judge_prompt_tokens=read, judge_generated_tokens=PLAY_JUDGEMENT).times(judgements)


def compare_work(config: Config, prompts: Sequence[Sequence[Message]], encoder: Encoder) -> Work:
    """Of a held-out prompt: the verdicts on two answers to it, where a model is asked by prompts of ours."""
    section, limit = config.evaluation.pairwise, config.evaluation.sampling.max_tokens
    if section is None or not section.judged_by.reads_prompts:
        return Work()
    counter, total = _Counter(config, encoder, prompts), Work()
    template = PairTemplate(section, counter.objectives)
    for messages in prompts:
        counter.next_prompt()
        first, second = (counter.answer(k, limit) for k in range(2))
        for a, b in ((first, second), (second, first))[: 1 + section.both_orders]:
            counter.compare(section, template, messages, (a, b), by=section.judged_by)
        total += counter.work
    return total.times(1 / len(prompts))


def mean_tokens(prompts: Sequence[Sequence[Message]], encoder: Encoder) -> float:
    """Tokens of a rendered prompt, as a mean."""
    return sum(len(encoder.prompt_ids(messages)) for messages in prompts) / len(prompts)


def _chars_per_token(encoder: Encoder, text: str) -> float:
    """Of the prompts' own text; the template's marks are counted out by encoding it once and twice."""
    piece = text[:2000]
    once, twice = (len(encoder.prompt_ids([{"role": "user", "content": t}])) for t in (piece, f"{piece} {piece}"))
    return (len(piece) + 1) / max(1, twice - once)
