"""The health of the judge's signal, from a few episodes: whether a run's ratings can give pairs at all.

Takes a table of episodes (a sample) and one arm's config; returns the object that signal.json holds (DESIGN, «Files»).
NumPy and Arrow only. How many pairs and optimizer steps to expect is computed by the filters themselves on the sample.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from spa_ray.config.models import Config
from spa_ray.config.training import Train, method_class
from spa_ray.data.schemas import ranges_of, with_ranges
from spa_ray.evaluation.advice import advise
from spa_ray.evaluation.bootstrap import mean_interval
from spa_ray.preferences import build_pairs, denoise, resolve_delta, resolve_tau

RESAMPLES = 1000
Z = 1.959963984540054  # of a two-sided 95% interval
Row = dict[str, Any]
Triple = list[float]  # [mean or share, low, high]


def judge_signal(
    episodes: pa.Table, config: Config, *, prompts: int, arms: Mapping[str, Config] | None = None
) -> dict[str, Any]:
    """signal.json's object. `episodes`: at least one row of EPISODES; `prompts`: how many the whole run has.

    `arms`: all arms that use these episodes, the first of them with `config`. Where there are several, the object has
    one key more, `arms`, with `kept`, `pairs` and `steps` of each, and the advice covers all of them.

    Shares come with Wilson intervals, numbers of pairs and steps with bootstrap intervals over prompts; both at 95%.
    A variance or median is null where nothing was there to take it of: `within_var` needs `scoring.draws` above 1.
    Raises: ValueError without a row; InputError as `denoise` does.
    """
    sample = Sample.of(episodes, config, prompts)
    of_episodes = {
        "prompts": len(sample.rows),
        "objectives": {name: _objective(sample, at) for at, name in enumerate(config.objectives)},
        "all_tie": _all_tie(sample.rows),
    }
    signal = of_episodes | _of_arm(sample)
    advice = advise(sample, signal)
    if arms is None or len(arms) < 2:
        return signal | {"advice": advice}
    by_arm: dict[str, Row] = {}
    more: dict[str, list[str]] = {}  # advice that the first arm does not call for -> the arms that do
    for name, arm in arms.items():
        own = replace(sample, config=arm)
        by_arm[name] = _of_arm(own)
        for found in advise(own, of_episodes | by_arm[name]):
            if found["code"] not in {known["code"] for known in advice}:
                more.setdefault(json.dumps(found), []).append(name)
    for text, names in more.items():
        found = json.loads(text)
        advice.append({**found, "text": f"arm{'s' * (len(names) > 1)} {', '.join(names)}: {found['text']}"})
    return signal | {"arms": by_arm, "advice": advice}


def _of_arm(sample: Sample) -> Row:
    """What depends on an arm's filters and training."""
    return {
        "kept": _kept(sample),
        "pairs": sample.expected_pairs(sample.outcome),
        "steps": sample.expected_steps(sample.outcome),
    }


@dataclass(frozen=True)
class Outcome:
    """What a config's filters leave of a sample: for each prompt its pairs, and what training makes of them (examples:
    distinct chosen answers for SFT, pairs with weight where the others are dropped)."""

    pairs: pa.Table
    per_prompt: list[int]
    examples: list[int]
    delta: float

    @property
    def kept(self) -> int:
        """Prompts with a pair."""
        return sum(count > 0 for count in self.per_prompt)


@dataclass(frozen=True)
class Sample:
    """A few of a run's episodes, each prompt once, and the config that they are looked at under."""

    episodes: pa.Table
    rows: list[Row]
    config: Config
    prompts: int

    @classmethod
    def of(cls, episodes: pa.Table, config: Config, prompts: int) -> Sample:
        """Of several rows of one prompt the last stays. Raises: ValueError without a row."""
        if not episodes.num_rows:
            raise ValueError("judge_signal: no episode to look at")
        last = {name: row for row, name in enumerate(episodes["prompt_id"].to_pylist())}
        table = episodes.take(pa.array(sorted(last.values())))
        if ranges_of(table.schema) is None and (bounds := config.scoring.ranges) is not None:
            table = table.cast(with_ranges(table.schema, [bounds] * len(config.objectives)))
        return cls(table, table.to_pylist(), config, prompts)

    def under(self, changes: Mapping[str, Any]) -> Sample:
        """The same episodes under a config with other values; keys are `section.key`."""
        config = self.config
        for key, value in changes.items():
            section, _, name = key.partition(".")
            config = config.model_copy(update={section: getattr(config, section).model_copy(update={name: value})})
        return replace(self, config=config)

    @cached_property
    def outcome(self) -> Outcome:
        """What the filters leave. τ and δ are taken of the sample, which estimates those of the run."""
        config, train = self.config, self.config.train
        scores = self.episodes["scores"]
        delta = resolve_delta(scores, config)
        denoised = denoise(self.episodes, config, tau=resolve_tau(scores, config))
        pairs = build_pairs(denoised, config, delta=delta)
        counts = Counter(pairs["prompt_id"].to_pylist())
        used = pairs.filter(pc.greater(pairs["gap"], 0)) if train.drop_dead else pairs
        ends = list(zip(used["prompt_id"].to_pylist(), used["chosen_index"].to_pylist(), strict=True))
        once = "rejected" not in method_class(train.method).sides  # each chosen answer
        found = Counter(name for name, _ in (dict.fromkeys(ends) if once else ends))
        names = [row["prompt_id"] for row in self.rows]
        return Outcome(pairs, [counts[n] for n in names], [found[n] for n in names], delta)

    def expected_pairs(self, outcome: Outcome) -> Triple:
        """[mean, low, high] for all prompts of the run."""
        return self._expected(outcome.per_prompt)

    def expected_steps(self, outcome: Outcome) -> Triple:
        """[mean, low, high] optimizer steps of one training on them."""
        return [float(optimizer_steps(round(n), self.config.train)) for n in self._expected(outcome.examples)]

    def _expected(self, per_prompt: Sequence[int]) -> Triple:
        """The sample's own count, and for the prompts beyond it the mean with its bootstrap interval.

        Where no prompt of the sample has any, as many of the others may as Wilson's bound allows, each with all pairs.
        """
        seen, rest = sum(per_prompt), max(0, self.prompts - len(per_prompt))
        found = mean_interval(per_prompt, resamples=RESAMPLES, seed=self.config.seed)
        high = found.high
        if not seen:
            high = wilson(0, len(per_prompt))[2] * self.config.sampling.n * (self.config.sampling.n + 1) / 2
        return [round(seen + rest * each, 1) for each in (found.mean, found.low, high)]


def optimizer_steps(examples: int, train: Train) -> int:
    """Steps that training takes over so many examples, as `spa_ray.training.batches.order_pairs` cuts them."""
    if not examples:
        return 0
    if train.max_steps is not None:
        return train.max_steps
    n = min(examples, train.max_pairs or examples)
    whole, part = divmod(train.epochs, 1)
    return int(whole) * math.ceil(n / train.batch_size) + math.ceil(math.ceil(part * n - 1e-9) / train.batch_size)


def wilson(hits: int, of: int) -> Triple:
    """A share with its 95% Wilson score interval: [share, low, high]; [0, 0, 1] of nothing."""
    if not of:
        return [0.0, 0.0, 1.0]
    share, wide = hits / of, Z * Z / of
    middle = (share + wide / 2) / (1 + wide)
    half = Z * math.sqrt(share * (1 - share) / of + wide / (4 * of)) / (1 + wide)
    return [round(x, 4) for x in (share, max(0.0, middle - half), min(1.0, middle + half))]


def is_scored(response: Mapping[str, Any]) -> bool:
    scores = response["scores"]
    return bool(scores) and all(s is not None and math.isfinite(s) for s in scores)


def _objective(sample: Sample, at: int) -> Row:
    """One objective's judgements: one a response, the mean of its draws."""
    low, high = sample.config.scoring.scale
    judged = [r for row in sample.rows for r in row["responses"] if r["scores"]]
    scores = [r["scores"][at] for r in judged if r["scores"][at] is not None]
    bins = Counter(min(max(round(s), low), high) for s in scores)
    off = [r["off_scale"][at] for r in judged if r["off_scale"] and r["off_scale"][at] is not None]
    return {
        "histogram": {str(k): bins[k] for k in range(low, high + 1)},
        "at_low": wilson(bins[low], len(scores)),
        "at_high": wilson(bins[high], len(scores)),
        "within_var": _mean_variance([_draws(r, at) for r in judged]),
        "between_var": _mean_variance(
            [[r["scores"][at] for r in row["responses"] if is_scored(r)] for row in sample.rows]
        ),
        "off_scale": round(float(np.median(off)), 4) if off else None,
        "parse_failures": wilson(len(judged) - len(scores), len(judged)),
    }


def _draws(response: Mapping[str, Any], at: int) -> list[float]:
    drawn = (response["score_draws"] or {at: []})[at] or []
    return [d for d in drawn if d is not None]


def _mean_variance(groups: Sequence[Sequence[float]]) -> float | None:
    """Mean over the groups of two or more of the variance inside each (ddof 1)."""
    found = [float(np.var(g, ddof=1)) for g in groups if len(g) > 1]
    return round(float(np.mean(found)), 4) if found else None


def _all_tie(rows: Sequence[Row]) -> Triple:
    """Share of the prompts whose responses, two or more, all have the same scores on every objective."""
    vectors = [[tuple(r["scores"]) for r in row["responses"] if is_scored(r)] for row in rows]
    counted = [v for v in vectors if len(v) > 1]
    return wilson(sum(len(set(v)) == 1 for v in counted), len(counted))


def _kept(sample: Sample) -> dict[str, Triple]:
    """Shares that each criterion keeps, by the funnel's names: `error` of all prompts, `too_few_scores` of those
    without error, the others, each taken alone, of the scored prompts; `all`: prompts with a pair, of all.

    `high_det` is an estimate until τ is known.
    """
    config, total = sample.config, len(sample.rows)
    informative = config.denoise.informativeness
    alone = {"denoise.informativeness": False, "denoise.on_inconsistent": "drop_prompt"}
    reasons = denoise(sample.episodes, sample.under(alone).config, tau=None)
    dropped: dict[str | None, int] = defaultdict(int, Counter(reasons["drop_reason"].to_pylist()))
    sound = total - dropped["error"]
    scored = sound - dropped["too_few_scores"]
    tau = resolve_tau(sample.episodes["scores"], config)
    why = reasons["drop_reason"].to_pylist()
    det = [
        d
        for d, reason in zip(reasons["det"].to_pylist(), why, strict=True)
        if reason not in ("error", "too_few_scores")
    ]
    return {
        "error": wilson(sound, total),
        "too_few_scores": wilson(scored, sound),
        "inconsistent": wilson(scored - dropped["inconsistent"], scored),
        "zero_det": wilson(sum(d > 0 for d in det) if informative else scored, scored),
        "high_det": wilson(sum(tau is None or d <= tau for d in det), scored),
        "all": wilson(sample.outcome.kept, total),
    }
