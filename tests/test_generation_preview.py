"""A preview shows everything that an episode asks, and is the same episode."""

from __future__ import annotations

import asyncio

import pytest

from spa_ray.errors import RunError
from spa_ray.generation.preview import preview
from tests.fake_endpoint import FakeEndpoint, running
from tests.scripted import WEIGHTS, play, prompt, scripted_config


def test_a_preview_is_the_episode_with_every_prompt_and_answer():
    config = scripted_config({"answers": 2}, scoring={"mode": "regex", "max_tokens": 40}, sampling={"n": 3})
    (shown,) = asyncio.run(preview(config, WEIGHTS, [prompt()]))
    assert shown["episode"] == play(config)
    judged = [call for call in shown["calls"] if "Rating: [[" in call["text"]]
    assert len(judged) == 8
    assert len(shown["calls"]) > 3 + 1 + 8  # two distinct answers: one of three candidates was drawn again
    for response in shown["episode"]["responses"]:
        assert any(call["text"] == response["text"] for call in shown["calls"])
    assert all("How do I bake bread?" in call["prompt"] for call in shown["calls"])


def test_what_a_judge_behind_an_endpoint_is_asked_is_shown_too():
    with running(FakeEndpoint()) as fake:
        judge = {"kind": "endpoint", "base_url": fake.url, "model": "judge"}
        config = scripted_config(scoring={"mode": "regex", "judge": judge, "system": "Be fair."}, sampling={"n": 3})
        (shown,) = asyncio.run(preview(config, WEIGHTS, [prompt()]))
        judged = [call for call in shown["calls"] if call["text"] == "[[7]]"]
        assert len(judged) == len(fake.bodies) == 8
        assert all(call["prompt"].startswith("Be fair.\n\nYou are a strict, fair judge") for call in judged)
        assert {call["prompt_tokens"] for call in judged} == {10}
    with pytest.raises(RunError, match="gives no answer"):
        asyncio.run(preview(config, WEIGHTS, [prompt()]))


def test_a_prompt_that_fails_is_shown_with_its_error():
    (shown,) = asyncio.run(preview(scripted_config({"refuse": "bread"}), WEIGHTS, [prompt()]))
    assert shown["episode"]["error"].startswith("refused: ")
    assert shown["calls"] == []


def test_a_prompt_whose_engine_answers_nothing_ends_in_an_error_row():
    config = scripted_config({"hang": "How"}, generation={"prompt_timeout_s": 0.5})
    (shown,) = asyncio.run(asyncio.wait_for(preview(config, WEIGHTS, [prompt("How?")]), 20))
    assert shown["episode"]["error"] == "timeout: no episode within generation.prompt_timeout_s 0.5"
