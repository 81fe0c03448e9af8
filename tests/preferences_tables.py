"""Small episode tables for the tests of `spa_ray.preferences`: by hand, and drawn by hypothesis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from hypothesis import strategies as st

from spa_ray.config.load import arm_configs
from spa_ray.config.models import Config
from spa_ray.data.schemas import EPISODES, with_metadata

OBJECTIVES = ("harmless", "helpful", "honest", "brief")
Row = dict[str, Any]
Scores = Sequence[float | None] | None


def make_config(k: int = 2, **overrides: Any) -> Config:
    """A config of k objectives; dotted keys are written with __ (denoise__tau=3)."""
    raw: Row = {"model": {"path": "none"}, "objectives": list(OBJECTIVES[:k])}
    for key, value in overrides.items():
        section, _, name = key.partition("__")
        raw.setdefault(section, {})[name] = value
    return arm_configs(raw, (), where="test", stem="test")["main"]


def make_row(candidates: Sequence[Scores], refined: Scores = (), *, prompt_id: str = "p", **changes: Any) -> Row:
    """One episode; `refined=()` leaves the refined answer out. Every answer has its own text and token ids."""
    scores = [*candidates, *([refined] if refined != () else [])]
    responses = [
        {
            "index": i,
            "kind": "candidate" if i < len(candidates) else "refined",
            "text": f"answer {i} to {prompt_id}",
            "token_ids": [100 + i, 7, 2],
            "scores": None if s is None else list(s),
        }
        for i, s in enumerate(scores)
    ]
    row = {
        "prompt_id": prompt_id,
        "messages": [{"role": "user", "content": f"question {prompt_id}"}],
        "responses": responses,
        "scores": [r["scores"] for r in responses],
        "error": None,
        "attempt": 1,
    }
    return row | changes


def make_episodes(rows: Sequence[Row], config: Config) -> pa.Table:
    schema = with_metadata(EPISODES, objectives=config.objectives, model="m", config_hash="h")
    return pa.Table.from_pylist(list(rows), schema)


# Enough answers share a text or token ids, and enough scores tie or are missing, for every rule to bite.
_TEXTS = ("a", "b", "c", "d", "e", "f", "g", "")
_IDS = ((5, 2), (5, 2, 2), (6,), (7, 2), (8, 2), (9, 2), (), None)


@st.composite
def configs(draw: st.DrawFn) -> Config:
    k = draw(st.integers(2, 4))
    thresholds = draw(st.dictionaries(st.sampled_from(OBJECTIVES[:k]), st.sampled_from([2.0, 3.0]), max_size=2))
    return make_config(
        k,
        sampling__n=draw(st.integers(k + 1, 6)),
        denoise__consistency=draw(st.sampled_from(["strict", "primary_ge", "off"])),
        denoise__on_inconsistent=draw(st.sampled_from(["drop_prompt", "drop_refined"])),
        denoise__informativeness=draw(st.booleans()),
        denoise__ddof=draw(st.sampled_from([0, 1])),
        denoise__tau_over=draw(st.sampled_from(["positive", "all"])),
        denoise__tau_quantile=draw(st.sampled_from([0.32, 0.9, None])),
        pairs__delta=draw(st.sampled_from([0.5, 1, 2, 4])),
        pairs__order=draw(st.sampled_from(["lex", "pareto"])),
        pairs__include=draw(st.sampled_from(["all", "refined_only", "candidates_only"])),
        pairs__thresholds=thresholds,
        pairs__score_grid=draw(st.sampled_from([None, None, 1.0, 0.5])),
        pairs__keep_system=draw(st.booleans()),
    )


@st.composite
def rows(draw: st.DrawFn, config: Config, *, prompt_id: str | None = None, halves: bool | None = None) -> Row:
    """One episode. Scores are integers or halves, so that sums and products of two are exact in float64."""
    k, n = len(config.objectives), config.sampling.n
    step = 0.5 if (draw(st.booleans()) if halves is None else halves) else 1.0
    score = st.integers(2, 8).map(lambda x: x * step)
    failing = st.one_of(score, score, score, st.none()) if draw(st.integers(0, 3)) == 0 else score
    scores: list[Any] = [draw(st.lists(failing, min_size=k, max_size=k)) for _ in range(n)]
    best = [max((c[o] for c in scores if c[o] is not None), default=1.0) for o in range(k)]
    fate = draw(st.integers(0, 9))
    if fate < 6:
        scores.append([b + step for b in best])
    elif fate < 9:
        scores.append(draw(st.lists(failing, min_size=k, max_size=k)))
    kinds = ["candidate"] * n + ["refined"] * (len(scores) - n)
    texts = draw(st.permutations(_TEXTS)) if draw(st.booleans()) else [draw(st.sampled_from(_TEXTS)) for _ in scores]
    responses = [
        {
            "index": i,
            "kind": kind,
            "text": texts[i],
            "token_ids": draw(st.sampled_from(_IDS)) if draw(st.integers(0, 5)) == 0 else [30 + i, 2],
            "system": draw(st.sampled_from([None, "Be kind."])),
            "scores": s,
        }
        for i, (kind, s) in enumerate(zip(kinds, scores, strict=True))
    ]
    own_system = [{"role": "system", "content": "House rules."}] if draw(st.booleans()) else []
    return {
        "prompt_id": prompt_id or draw(st.sampled_from(["p0", "p1", "p2", "p3", "p4"])),
        "messages": [*own_system, {"role": "user", "content": "question"}],
        "responses": responses,
        "scores": scores,
        "error": draw(st.sampled_from([None] * 9 + ["engine died"])),
        "attempt": draw(st.integers(1, 2)),
    }


@st.composite
def cases(draw: st.DrawFn) -> tuple[Config, pa.Table]:
    """A config and episodes that it could have given; some prompts stand twice."""
    config = draw(configs())
    return config, make_episodes(draw(st.lists(rows(config), max_size=6)), config)


taus = st.sampled_from([None, 0.3, 1.7, 23.0])
