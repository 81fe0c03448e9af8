"""One prompt's episode: what is asked, in which order, and what becomes of failures."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_ray.config.models import Config
from spa_ray.data.schemas import EPISODES
from spa_ray.engine.protocol import Completion, EngineDeadError, Request
from spa_ray.engine.scripted import END, IMPROVED
from spa_ray.generation.setup import Task
from tests.scripted import WEIGHTS, play, prompt, scripted_config, scripted_episodes


def texts(row: dict[str, Any]) -> list[str]:
    return [r["text"] for r in row["responses"]]


def test_an_episode_is_n_candidates_and_one_refined_answer_each_scored_and_fits_the_schema():
    row = play(scripted_config())
    assert [r["index"] for r in row["responses"]] == [0, 1, 2, 3, 4, 5]
    assert [r["kind"] for r in row["responses"]] == ["candidate"] * 5 + ["refined"]
    assert row["scores"] == [r["scores"] for r in row["responses"]]
    assert texts(row)[-1].startswith(IMPROVED)
    assert pa.Table.from_pylist([row], schema=EPISODES).to_pylist() == [row]


def test_each_candidate_has_its_own_seed_and_system_prompt():
    row = play(scripted_config(sampling={"system_prompts": [None, "Be brief.", "Be kind."]}))
    candidates = row["responses"][:5]
    assert [r["system"] for r in candidates] == [None, "Be brief.", "Be kind.", None, "Be brief."]
    assert len({r["seed"] for r in row["responses"]}) == 6


def test_token_ids_are_the_generated_ones_with_the_end_token_only_when_it_was_generated():
    whole, cut = play(scripted_config()), play(scripted_config(sampling={"max_tokens": 5}))
    assert all(r["token_ids"] == [*r["text"].encode(), END] for r in whole["responses"])
    assert {r["finish_reason"] for r in whole["responses"]} == {"stop"}
    assert all(r["finish_reason"] == "length" and len(r["token_ids"]) == 5 for r in cut["responses"][:5])
    assert all(END not in r["token_ids"] for r in cut["responses"][:5])


def test_tokens_are_counted_over_everything_that_was_asked():
    config = scripted_config()
    episodes, engine = scripted_episodes(config)
    counted: list[tuple[int, int]] = []
    answer = engine.generate

    async def counting(request: Request) -> Completion:
        completion = await answer(request)
        counted.append((len(request.prompt_ids), len(completion.token_ids)))
        return completion

    engine.generate = counting  # type: ignore[method-assign]
    row = asyncio.run(episodes.run(prompt()))
    assert len(counted) == 5 + 10 + 1 + 2
    assert (row["prompt_tokens"], row["generated_tokens"]) == tuple(map(sum, zip(*counted, strict=True)))


def test_a_refinement_that_does_not_beat_every_candidate_is_tried_again_and_the_best_stays():
    tries, seen = range(1, 5), set()
    for number in range(40):
        rows = [
            play(scripted_config(refine={"attempts": k}, scoring={"judge": "tests.scripted:lottery"}), f"Why {number}?")
            for k in tries
        ]
        assert len({str(row["responses"][:5]) for row in rows}) == 1
        assert {row["responses"][5]["index"] for row in rows} == {5}
        candidates = [s for s in rows[0]["scores"][:5] if None not in s]
        best = [max(found) for found in zip(*candidates, strict=True)]

        def order(scores: list[float | None]) -> tuple[bool, list[float]]:
            return None not in scores, [-1.0 if s is None else s for s in scores]

        kept = [row["scores"][5] for row in rows]
        beats = [None not in s and all(a > b for a, b in zip(s, best, strict=True)) for s in kept]
        assert all(order(a) <= order(b) for a, b in itertools.pairwise(kept))
        asked = [row["generated_tokens"] for row in rows]
        for k in range(len(kept) - 1):
            assert (asked[k + 1] == asked[k]) == beats[k]  # nothing more is asked once one does
        seen |= {(beats[0], beats[-1])}
    assert seen == {(True, True), (False, True), (False, False)}


def test_a_repeated_candidate_is_sampled_once_more_and_then_stays():
    alone = {"sampling": {"max_tokens": 60, "system_prompts": [None]}}
    kept = play(scripted_config({"answers": 3}, sampling={**alone["sampling"], "resample_duplicates": False}))
    resampled = play(scripted_config({"answers": 3}, **alone))
    seen: set[str] = set()
    for before, after in zip(kept["responses"][:5], resampled["responses"][:5], strict=True):
        assert (after["seed"] != before["seed"]) == (before["text"] in seen)  # the first of each text is never redrawn
        seen.add(before["text"])
    assert len(seen) < 5
    assert len(resampled["responses"]) == 6


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 30))
def test_the_order_of_completion_changes_nothing(seed: int, answers: int):
    calm = play(scripted_config({"answers": answers}, seed=seed))
    hasty = play(scripted_config({"answers": answers, "jitter": 0.01}, seed=seed))
    assert calm == hasty


def test_another_seed_or_iteration_gives_other_answers():
    first = play(scripted_config())
    assert texts(play(scripted_config(seed=1))) != texts(first)
    assert texts(play(scripted_config(), task=Task(iteration=2))) != texts(first)


def refine_prompt(config: Config) -> str:
    """What the engine was asked to refine; the template begins with REFINE."""
    episodes, engine = scripted_episodes(config)
    seen: list[str] = []
    answer = engine.generate

    async def spying(request: Request) -> Completion:
        seen.append(engine.tokenizer.decode(request.prompt_ids))
        return await answer(request)

    engine.generate = spying  # type: ignore[method-assign]
    asyncio.run(episodes.run(prompt()))
    (text,) = [text for text in seen if text.startswith("REFINE")]
    return text


REFINE = (
    "REFINE{% for c in candidates %}\n"
    "{{ c.scores.harmless }},{{ c.scores.helpful }}:{{ c.text }}{{ 'x' * 200 }}{% endfor %}"
)


def test_where_the_context_is_too_small_the_lowest_candidates_leave_the_refinement_prompt_only():
    def shown(room: int) -> list[tuple[int, ...]]:
        text = refine_prompt(scripted_config(model={"max_model_len": room}, refine={"prompt": REFINE}))
        return [tuple(map(int, line.split(":")[0].split(","))) for line in text.splitlines()[1:]]

    all_five = shown(8000)
    assert len(all_five) == 5
    fewer = shown(1060)
    assert 1 <= len(fewer) < 5
    assert sorted(fewer) == sorted(all_five)[-len(fewer) :]  # the best stay
    row = play(scripted_config(model={"max_model_len": 1060}, refine={"prompt": REFINE}))
    assert len(row["responses"]) == 6  # all five candidates are still in the row


def test_a_refinement_that_does_not_fit_with_one_candidate_is_this_rows_error():
    row = play(scripted_config(refine={"prompt": "{{ 'x' * 9000 }}{{ candidates[0].text }}"}))
    assert row["error"].startswith("prompt_too_long: refinement")


def test_a_prompt_too_long_for_the_context_is_recorded_and_nothing_is_asked():
    config = scripted_config(model={"max_model_len": 2000})
    episodes, engine = scripted_episodes(config)
    row = asyncio.run(episodes.run(prompt("x" * 2000, "long")))
    assert row["error"].startswith("prompt_too_long: 2")
    assert row["error"].endswith("tokens and 60 of answer exceed the context of 2000")
    assert (row["prompt_id"], row["responses"], row["scores"], engine.served) == ("long", [], [], 0)
    assert pa.Table.from_pylist([row], schema=EPISODES).num_rows == 1


@pytest.mark.parametrize(
    ("scoring", "script", "message"),
    [
        ({}, {"refuse": "bread"}, "refused: scripted refusal"),
        ({"judge": "tests.scripted:broken_judge"}, {}, "internal: KeyError: 'harmless'"),
    ],
)
def test_whatever_is_wrong_with_a_row_is_its_error_and_not_raised(
    scoring: dict[str, Any], script: dict[str, Any], message: str
):
    row = play(scripted_config(script, scoring=scoring))
    assert row["error"].startswith(message)
    assert row["responses"] == []


def test_the_engines_death_is_raised():
    with pytest.raises(EngineDeadError):
        play(scripted_config({"die": "bread"}))


def test_an_evaluation_is_one_answer_under_its_own_settings_without_refinement():
    config = scripted_config(evaluation={"sampling": {"max_tokens": 50, "temperature": 0.3}})
    row = play(config, task=Task(kind="answer", scored=False))
    (answer,) = row["responses"]
    assert (answer["temperature"], answer["system"], answer["scores"]) == (0.3, None, [])


def test_given_answers_are_scored_by_another_model_and_otherwise_left_alone():
    config = scripted_config()
    answered = play(config, task=Task(kind="answer", scored=False))
    episodes, engine = scripted_episodes(config, Task(kind="score"))
    asyncio.run(engine.load_weights(Path("judge")))
    scored = asyncio.run(episodes.score(answered))
    assert texts(scored) == texts(answered)
    assert scored["responses"][0]["token_ids"] == answered["responses"][0]["token_ids"]
    assert all(s is not None for s in scored["scores"][0])
    assert asyncio.run(episodes.score({**answered, "error": "x"}))["error"] == "x"


def test_last_iterations_refined_answer_can_join_the_candidates():
    config = scripted_config()
    episodes, _ = scripted_episodes(config)
    earlier = Completion("improved earlier", [*b"improved earlier", END], "stop")
    row = asyncio.run(episodes.run(prompt(), earlier=earlier))
    assert [r["kind"] for r in row["responses"]] == ["candidate"] * 6 + ["refined"]
    assert row["responses"][5]["text"] == "improved earlier"
    assert [r["index"] for r in row["responses"]] == list(range(7))


def test_an_answer_depends_on_the_weights_that_gave_it():
    config = scripted_config()
    episodes, engine = scripted_episodes(config)
    before = asyncio.run(episodes.run(prompt()))
    asyncio.run(engine.load_weights(WEIGHTS.with_name("trained")))
    assert texts(asyncio.run(episodes.run(prompt()))) != texts(before)


def test_a_retried_row_draws_anew():
    config = scripted_config()
    episodes, _ = scripted_episodes(config)
    assert texts(asyncio.run(episodes.run(prompt(), attempt=1))) != texts(asyncio.run(episodes.run(prompt())))


def test_three_objectives_are_scored_in_their_order():
    config = scripted_config(objectives=["honest", "harmless", "helpful"])
    row = play(config)
    assert all(len(scores) == 3 for scores in row["scores"])
    swapped = play(scripted_config(objectives=["helpful", "harmless", "honest"]))
    assert [s[::-1] for s in swapped["scores"][:5]] == row["scores"][:5]
