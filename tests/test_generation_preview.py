"""A preview shows everything that an episode asks, and is the same episode."""

from __future__ import annotations

from collections import Counter

from spa_ray.generation.preview import preview
from tests.scripted import WEIGHTS, play, prompt, scripted_config


def test_a_preview_is_the_episode_with_every_rendered_prompt_and_answer():
    config = scripted_config({"answers": 2}, scoring={"mode": "regex", "max_tokens": 40}, sampling={"n": 3})
    (shown,) = preview(config, [prompt()], model=WEIGHTS)
    assert shown["episode"] == play(config)
    exchanges = shown["exchanges"]
    repeated = sum(e.kind == "sample" for e in exchanges) - 3
    assert repeated > 0  # two distinct answers: one of three was drawn again
    assert Counter(e.kind for e in exchanges) == {"sample": 3 + repeated, "score": 8, "refine": 1}
    answers = [r["text"] for r in shown["episode"]["responses"]]
    assert all(any(e.answer == a for e in exchanges if e.kind != "score") for a in answers)
    for exchange in exchanges:
        assert "How do I bake bread?" in exchange.prompt
        assert exchange.prompt.endswith("<assistant>")
        assert ("Rating: [[" in exchange.answer) == (exchange.kind == "score")


def test_a_prompt_that_fails_is_shown_with_its_error():
    (shown,) = preview(scripted_config({"refuse": "bread"}), [prompt()], model=WEIGHTS)
    assert shown["episode"]["error"].startswith("refused: ")
    assert shown["exchanges"] == []
