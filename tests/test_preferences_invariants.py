"""DESIGN's invariants 1, 2, 3 and 6, read off the tables that leave the build alone."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_ray.config.models import Config
from spa_ray.data.schemas import PAIRS, canonical
from spa_ray.preferences import ALL_REASONS, Funnel, build_pairs, denoise
from tests.examples import examples
from tests.preferences_tables import cases, configs, make_episodes, rows, taus

Case = tuple[Config, pa.Table]


def compared(scores: list[float], config: Config) -> tuple[float, ...]:
    caps = config.pairs.thresholds
    return tuple(min(s, caps.get(name, s)) for name, s in zip(config.objectives, scores, strict=True))


@given(cases(), taus)
@settings(max_examples=examples(100), deadline=None)
def test_1_the_chosen_precedes_the_rejected_by_a_margin_and_differs_from_it(case: Case, tau: float | None) -> None:
    config, episodes = case
    answers = {
        (row["prompt_id"], r["index"]): r
        for row in episodes.to_pylist()[::-1]
        for r in row["responses"]
        if row["error"] is None
    }
    for pair in build_pairs(denoise(episodes, config, tau=tau), config).to_pylist():
        chosen, rejected = pair["chosen_scores"], pair["rejected_scores"]
        assert compared(chosen, config) > compared(rejected, config)
        assert pair["margin"] == sum(abs(a - b) for a, b in zip(chosen, rejected, strict=True)) >= config.pairs.delta
        assert pair["gap"] == abs(sum(chosen) - sum(rejected))
        texts = [pair[side][0]["content"] for side in ("chosen", "rejected")]
        ids = [pair["chosen_ids"], pair["rejected_ids"]]
        assert texts[0] != texts[1]
        assert ids[0] != ids[1]
        assert all(texts)
        assert all(ids)
        assert (pair["prompt_id"], pair["chosen_index"]) in answers


@given(cases(), taus)
@settings(max_examples=examples(100), deadline=None)
def test_2_a_refined_chosen_dominates_under_the_default_rule(case: Case, tau: float | None) -> None:
    config, episodes = case
    strict = config.denoise.model_copy(update={"consistency": "strict"})
    config = config.model_copy(update={"denoise": strict})
    for pair in build_pairs(denoise(episodes, config, tau=tau), config).to_pylist():
        if pair["kind"] == "refined":
            assert all(a >= b for a, b in zip(pair["chosen_scores"], pair["rejected_scores"], strict=True))
            assert pair["chosen_scores"] != pair["rejected_scores"]


@given(cases(), taus)
@settings(max_examples=examples(100), deadline=None)
def test_3_no_prompt_is_lost_or_counted_twice(case: Case, tau: float | None) -> None:
    config, episodes = case
    denoised = denoise(episodes, config, tau=tau)
    pairs = build_pairs(denoised, config)
    funnel = Funnel.of(denoised, pairs, config, tau=tau)
    assert funnel.prompts == episodes.num_rows == funnel.kept + sum(funnel.dropped.values())
    assert funnel.kept == len({p["prompt_id"] for p in pairs.to_pylist()})
    assert tuple(funnel.dropped) == ALL_REASONS
    assert funnel.pairs == pairs.num_rows == sum(funnel.pairs_by_kind.values())
    assert funnel.pairs == sum(funnel.pairs_by_decided_by.values())
    ids = pairs["pair_id"].to_pylist()
    assert len(ids) == len(set(ids))


@given(cases(), taus)
@settings(max_examples=examples(100), deadline=None)
def test_6_a_failed_score_takes_its_response_out_of_every_pair(case: Case, tau: float | None) -> None:
    config, episodes = case
    denoised = denoise(episodes, config, tau=tau)
    source = {row["prompt_id"]: row for row in denoised.to_pylist() if row["kept"]}
    for pair in build_pairs(denoised, config).to_pylist():
        for side in ("chosen_index", "rejected_index"):
            assert None not in source[pair["prompt_id"]]["scores"][pair[side]]


@given(st.data(), configs(), taus)
@settings(max_examples=examples(100), deadline=None)
def test_blocks_built_apart_give_the_same_pairs_and_their_funnels_add_up(
    data: st.DataObject, config: Config, tau: float | None
) -> None:
    source = [data.draw(rows(config, prompt_id=f"p{i}")) for i in range(data.draw(st.integers(1, 6)))]
    episodes = make_episodes(source, config)
    whole = denoise(episodes, config, tau=tau)
    pairs = build_pairs(whole, config)
    cut = data.draw(st.integers(0, len(source)))
    parts = [denoise(part, config, tau=tau) for part in (episodes.slice(cut), episodes.slice(0, cut))]
    built = [build_pairs(part, config) for part in parts]
    assert canonical(pa.concat_tables(built)).equals(canonical(pairs))
    assert build_pairs(pa.concat_tables(parts), config).num_rows == pairs.num_rows
    funnels = [Funnel.of(d, p, config, tau=tau) for d, p in zip(parts, built, strict=True)]
    assert funnels[0] + funnels[1] == Funnel.of(whole, pairs, config, tau=tau)


@given(cases())
@settings(max_examples=examples(50), deadline=None)
def test_pairs_carry_the_schema_and_the_facts_of_the_run(case: Case) -> None:
    config, episodes = case
    pairs = build_pairs(denoise(episodes, config, tau=None), config)
    assert pairs.schema.equals(PAIRS.with_metadata(episodes.schema.metadata), check_metadata=True)
    pairs.validate(full=True)


def test_a_funnel_that_does_not_add_up_cannot_be_made() -> None:
    none = dict.fromkeys(ALL_REASONS, 0)
    good = {
        "prompts": 2,
        "dropped": none | {"error": 1},
        "kept": 1,
        "pairs": 3,
        "pairs_by_kind": {"refined": 1, "candidate": 2},
        "pairs_by_decided_by": {"harmless": 3, "helpful": 0},
        "dead_pairs": 1,
        "tau": 2.5,
        "ddof": 1,
    }
    assert Funnel(**Funnel(**good).to_dict()) == Funnel(**good)
    broken = [
        {"prompts": 3},
        {"dropped": none},
        {"dropped": {"error": 1}},
        {"pairs": 4},
        {"pairs_by_kind": {"refined": 1, "candidate": 1}},
        {"pairs_by_decided_by": {"harmless": 2, "helpful": 0}},
        {"dead_pairs": 4},
        {"kept": 2},
    ]
    for change in broken:
        with pytest.raises(ValueError, match=r"prompts|pairs|dropped"):
            Funnel(**good | change)
    with pytest.raises(ValueError, match="tau"):
        Funnel(**good) + Funnel(**good | {"tau": 3.0})
