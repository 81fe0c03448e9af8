"""One line of advice for each thing that is out of order in a sample of episodes, with the config change that helps.

A rule takes the sample and its signal and returns `Advice` or None. What a change claims is computed on the sample by
the filters themselves; what cannot be computed without asking the model again is not claimed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc

from spa_ray.config.training import method_class
from spa_ray.evaluation.refusals import is_refusal
from spa_ray.evaluation.repetition import repetition

if TYPE_CHECKING:
    from spa_ray.evaluation.signal import Outcome, Sample

Signal = Mapping[str, Any]
Changes = dict[str, Any]

SATURATED = 0.5  # share of an objective's judgements at one end of the scale
TIES = 0.5  # share of prompts whose answers all have the same scores
NOISE = 0.5  # the draws' share of the variance between answers
OFF_SCALE = 0.5  # median probability mass off the scale
UNREADABLE = 0.05  # share of judgements without a score
FILTERED = 0.1  # share of scored prompts that a filter must leave
TOO_CLOSE = 0.5  # share of ordered pairs below delta
FEW_PAIRS, FEW_STEPS = 64, 20
MOST_DRAWS = 16
CUT, REPEATED, REFUSED, LOOPING, EMPTY, FAILED, NO_WEIGHT = 0.1, 0.2, 0.5, 0.2, 0.1, 0.1, 0.3
LOOP = 0.5  # share of repeated 3-grams from which an answer is called repetitive


@dataclass(frozen=True)
class Advice:
    """`change`: overrides as the command line takes them, null where no key helps."""

    code: str
    text: str
    change: str | None = None


def advise(sample: Sample, signal: Signal) -> list[dict[str, str | None]]:
    """The advice of every rule that finds something out of order, what is worst first."""
    return [asdict(advice) for rule in RULES for advice in rule(sample, signal)]


def written(changes: Changes) -> str:
    """As overrides on a command line."""
    return " ".join(
        f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in changes.items()
    )


def _pairs(sample: Sample, outcome: Outcome) -> int:
    return round(sample.expected_pairs(outcome)[0])


def failed(sample: Sample, signal: Signal) -> Iterator[Advice]:
    errors = [row["error"] for row in sample.rows if row["error"] is not None]
    if len(errors) > FAILED * len(sample.rows):
        yield Advice("errors", f"{len(errors)} of {len(sample.rows)} prompts failed, the first: {errors[0]}")


def constant(sample: Sample, signal: Signal) -> Iterator[Advice]:
    for name, found in signal["objectives"].items():
        used = [value for value, count in found["histogram"].items() if count]
        if len(used) == 1 and sum(found["histogram"].values()) > 1 and not found["between_var"]:
            yield Advice("constant", f"{name}: every rating is {used[0]}; the judge does not tell answers apart",
                         _finer(sample))  # fmt: skip


def saturated(sample: Sample, signal: Signal) -> Iterator[Advice]:
    for name, found in signal["objectives"].items():
        for end, word in (("at_high", "top"), ("at_low", "bottom")):
            if found[end][0] < SATURATED or found["between_var"] == 0:
                continue
            mark = sample.config.scoring.scale[end == "at_high"]
            text = f"{name}: {found[end][0]:.0%} of the ratings are {mark}, the {word} of the scale"
            if end == "at_high" and sample.config.denoise.consistency == "strict":
                text += "; no refined answer is rated above a candidate that is there"
            if sample.config.scoring.mode == "expected":
                text += "; a stricter rubric (constitution) spreads them"
            yield Advice("saturated_high" if end == "at_high" else "saturated_low", text, _finer(sample))


def _finer(sample: Sample) -> str | None:
    """The change that makes ratings finer than whole numbers, where it is not made."""
    scoring = sample.config.scoring
    return None if scoring.mode == "expected" or not scoring.judged_by.asks_engine else "scoring.mode=expected"


def ties(sample: Sample, signal: Signal) -> Iterator[Advice]:
    if signal["all_tie"][0] > TIES:
        yield Advice(
            "all_tie",
            f"{signal['all_tie'][0]:.0%} of the prompts have the same ratings for all their answers",
            _finer(sample),
        )


def noisy(sample: Sample, signal: Signal) -> Iterator[Advice]:
    """The variance between answers is the ratings' own plus the draws' over their number."""
    draws = sample.config.scoring.draws
    for name, found in signal["objectives"].items():
        within, between = found["within_var"], found["between_var"]
        if not within or between is None or within / draws <= NOISE * between:
            continue
        own = between - within / draws
        wanted = math.ceil(2 * within / own) if own > 0 else MOST_DRAWS + 1
        chance = min(1.0, within / draws / between) if between else 1.0
        text = f"{name}: chance makes {chance:.0%} of the differences between answers"
        if draws < wanted <= MOST_DRAWS:
            share = (within / wanted) / (own + within / wanted)
            yield Advice(
                "noisy_judge", f"{text}; with {wanted} draws it would be {share:.0%}", f"scoring.draws={wanted}"
            )
        else:
            finer = _finer(sample)
            yield Advice("noisy_judge", f"{text}; probabilities instead of draws have none" if finer else text, finer)


def off_scale(sample: Sample, signal: Signal) -> Iterator[Advice]:
    for name, found in signal["objectives"].items():
        if found["off_scale"] is not None and found["off_scale"] > OFF_SCALE:
            yield Advice(
                "off_scale",
                f"{name}: the judge gives a median of {found['off_scale']:.0%} of its probability to something "
                "that is no rating, so its ratings say little; thinking models need model.chat_template_kwargs",
                "scoring.mode=regex scoring.max_tokens=256",
            )


def unreadable(sample: Sample, signal: Signal) -> Iterator[Advice]:
    scoring = sample.config.scoring
    for at, (name, found) in enumerate(signal["objectives"].items()):
        if found["parse_failures"][0] <= UNREADABLE:
            continue
        kinds = [
            r["score_status"][at].partition(":")[0]
            for row in sample.rows
            for r in row["responses"]
            if r["score_status"]
        ]
        bad = [kind for kind in kinds if kind != "ok"] or ["parse_failure"]
        worst = max(sorted(set(bad)), key=bad.count)
        change = {
            "truncated": f"scoring.max_tokens={2 * scoring.max_tokens}",
            "parse_failure": "scoring.mode=choice"
            if scoring.mode == "regex" and scoring.judged_by.asks_engine
            else None,
        }.get(worst)
        yield Advice("parse_failures", f"{name}: {found['parse_failures'][0]:.0%} of the judgements gave no rating, "
                     f"mostly {worst}", change)  # fmt: skip


def inconsistent(sample: Sample, signal: Signal) -> Iterator[Advice]:
    rule, kept = sample.config.denoise.consistency, signal["kept"]["inconsistent"]
    if rule == "off" or signal["kept"]["too_few_scores"][0] == 0 or kept[0] >= FILTERED:
        return
    milder = ["primary_ge", "off"] if rule == "strict" else ["off"]
    yield _better(
        sample,
        "inconsistent",
        f"denoise.consistency {rule} keeps {kept[0]:.0%} of the scored prompts",
        [{"denoise.consistency": other} for other in milder],
    )


def uninformative(sample: Sample, signal: Signal) -> Iterator[Advice]:
    kept = signal["kept"]
    left = kept["zero_det"][0] + kept["high_det"][0] - 1  # a det is not both 0 and above τ
    if not sample.config.denoise.informativeness or kept["too_few_scores"][0] == 0 or left >= FILTERED:
        return
    flat = 1 - kept["zero_det"][0]
    text = f"denoise.informativeness keeps {max(0.0, left):.0%} of the scored prompts ({flat:.0%} have no spread)"
    yield _better(sample, "uninformative", text, [{"denoise.informativeness": False}])


def _better(sample: Sample, code: str, text: str, options: list[Changes]) -> Advice:
    """Advice for the first, mildest option that at least doubles the pairs of this sample."""
    now = sum(sample.outcome.per_prompt)
    for changes in options:
        changed = sample.under(changes)
        if sum(changed.outcome.per_prompt) > 2 * now:
            more = _pairs(changed, changed.outcome)
            gain = (
                f"with {written(changes)} about {more} pairs are to be expected, now {_pairs(sample, sample.outcome)}"
            )
            return Advice(code, f"{text}; {gain}", written(changes))
    return Advice(code, f"{text}; a milder rule alone gives no more pairs")


def too_close(sample: Sample, signal: Signal) -> Iterator[Advice]:
    if sample.config.pairs.delta == "auto":
        return
    base = (
        sample
        if sample.outcome.kept
        else sample.under({"denoise.consistency": "off", "denoise.informativeness": False})
    )
    now = base.outcome.pairs.num_rows
    any_ = base.under({"pairs.delta": 1e-9}).outcome.pairs.num_rows
    auto = base.under({"pairs.delta": "auto"}).outcome
    if any_ and now < (1 - TOO_CLOSE) * any_ and auto.pairs.num_rows > now:
        yield Advice(
            "delta",
            f"{1 - now / any_:.0%} of the ordered pairs differ by less than pairs.delta {base.outcome.delta:g}; `auto` "
            f"would be {auto.delta:.3g} and keep {auto.pairs.num_rows} of this sample's {any_}, now {now}",
            "pairs.delta=auto",
        )


def too_few(sample: Sample, signal: Signal) -> Iterator[Advice]:
    now = signal["pairs"][0]
    if now >= FEW_PAIRS:
        return
    denoise = sample.config.denoise
    ladder: list[Changes] = []
    soft: Changes = {"denoise.consistency": "primary_ge"} if denoise.consistency == "strict" else {}
    off: Changes = {} if denoise.consistency == "off" else {"denoise.consistency": "off"}
    wide: Changes = {"denoise.informativeness": False} if denoise.informativeness else {}
    auto: Changes = {} if sample.config.pairs.delta == "auto" else {"pairs.delta": "auto"}
    for changes in (soft, soft | wide, soft | wide | auto, off | wide, off | wide | auto):
        if changes and changes not in ladder:
            ladder.append(changes)
    tried = [(_pairs(s := sample.under(c), s.outcome), c) for c in ladder]
    enough = next(((n, c) for n, c in tried if n >= FEW_PAIRS), max(tried, key=lambda t: t[0], default=(0, {})))
    text = f"about {now:.0f} pairs are to be expected of {sample.prompts} prompts"
    if now > 0:
        text += f"; {FEW_PAIRS} need about {math.ceil(FEW_PAIRS * sample.prompts / now)} prompts"
    if enough[0] > now:
        yield Advice("few_pairs", f"{text}; with {written(enough[1])} about {enough[0]}", written(enough[1]))
    else:
        yield Advice("few_pairs", f"{text}; no milder filter gives more")


def too_few_steps(sample: Sample, signal: Signal) -> Iterator[Advice]:
    train, steps = sample.config.train, signal["steps"][0]
    if not 0 < steps < FEW_STEPS or train.max_steps is not None:
        return
    size = train.batch_size
    while size > 4 and sample.under({"train.batch_size": size}).expected_steps(sample.outcome)[0] < FEW_STEPS:
        size = max(4, size // 2)
    changes: Changes = {"train.batch_size": size} if size != train.batch_size else {}
    each = sample.under(changes).expected_steps(sample.outcome)[0] / train.epochs
    if each * train.epochs < FEW_STEPS:
        changes["train.epochs"] = min(4 * train.epochs, math.ceil(FEW_STEPS / each))
    then = sample.under(changes).expected_steps(sample.outcome)[0]
    yield Advice("few_steps", f"about {steps:.0f} optimizer steps are to be expected; with {written(changes)} about "
                 f"{then:.0f}", written(changes))  # fmt: skip


def cut(sample: Sample, signal: Signal) -> Iterator[Advice]:
    for kind, section in (("candidate", "sampling"), ("refined", "refine")):
        ends = [r["finish_reason"] for row in sample.rows for r in row["responses"] if r["kind"] == kind]
        share = ends.count("length") / len(ends) if ends else 0.0
        if share > CUT:
            limit = getattr(sample.config, section).max_tokens
            what = "candidates" if kind == "candidate" else "refined answers"
            lost = sample.under({"pairs.truncated": "allow"}).outcome.pairs.num_rows - sample.outcome.pairs.num_rows
            yield Advice(
                "truncated",
                f"{share:.0%} of the {what} were cut at {section}.max_tokens {limit}; pairs.truncated "
                f"drops {lost} pairs of this sample",
                f"{section}.max_tokens={2 * limit}",
            )


def repeated(sample: Sample, signal: Signal) -> Iterator[Advice]:
    texts = [[r["text"] for r in row["responses"] if r["kind"] == "candidate"] for row in sample.rows]
    total = sum(map(len, texts))
    share = sum(len(t) - len(set(t)) for t in texts) / total if total else 0.0
    if share > REPEATED:
        sampling = sample.config.sampling
        warmer = f"sampling.temperature={min(2.0, round(sampling.temperature + 0.3, 2)):g}"
        change = warmer if sampling.resample_duplicates else "sampling.resample_duplicates=true"
        yield Advice("duplicates", f"{share:.0%} of the candidates repeat another one of their prompt", change)


def of_answers(sample: Sample, signal: Signal) -> Iterator[Advice]:
    """What answers look like: refusals, loops, nothing."""
    answers = [r for row in sample.rows for r in row["responses"]]
    if not answers:
        return
    count = len(answers)
    refused = sum(is_refusal(r["text"]) for r in answers) / count
    looping = sum(repetition(r["token_ids"] or []) > LOOP for r in answers) / count
    empty = sum(not r["text"].strip() for r in answers) / count
    if refused > REFUSED:
        yield Advice("refusals", f"{refused:.0%} of the answers decline; where all do, there is nothing to "
                     "prefer: other prompts, or sampling.system_prompts that ask for help, vary them")  # fmt: skip
    if looping > LOOPING:
        penalty = max(1.1, round(sample.config.sampling.repetition_penalty + 0.1, 2))
        yield Advice(
            "repetitive", f"{looping:.0%} of the answers repeat themselves", f"sampling.repetition_penalty={penalty:g}"
        )
    if empty > EMPTY:
        yield Advice(
            "empty", f"{empty:.0%} of the answers are empty and are in no pair; see sampling.stop and the chat template"
        )


def no_weight(sample: Sample, signal: Signal) -> Iterator[Advice]:
    train, pairs = sample.config.train, sample.outcome.pairs
    if train.gap != "abs_sum" or train.alpha == 0 or not method_class(train.method).weighted or not pairs.num_rows:
        return
    dead = pc.sum(pc.equal(pairs["gap"], 0)).as_py()
    if dead > NO_WEIGHT * pairs.num_rows:
        yield Advice("zero_weight", f"{dead} of the sample's {pairs.num_rows} pairs have no weight, since what one "
                     "objective gains the other loses; with train.gap=l1 all have", "train.gap=l1")  # fmt: skip


Rule = Callable[["Sample", Signal], Iterator[Advice]]
RULES: tuple[Rule, ...] = (
    failed, off_scale, unreadable, constant, saturated, ties, noisy, inconsistent, uninformative, too_close, too_few,
    too_few_steps, no_weight, cut, repeated, of_answers,
)  # fmt: skip
