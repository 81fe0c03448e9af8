"""Self-Criticism: the keys that the method brings, its prompts, and which answers it is trained on."""

from __future__ import annotations

from typing import Any

import pytest

from spa_ray.config import Config, arm_configs
from spa_ray.generation.templates import PairTemplate, Templates
from spa_ray.objectives import load_objectives
from spa_ray.pipeline.plan import make_plan
from spa_ray.preferences import Funnel, build_pairs, denoise
from tests.preferences_tables import make_episodes, make_row

OWN = {"train.method": "self_criticism"}
ASKED = [{"role": "user", "content": "How?"}]
KEYS = {
    "sampling": {"n": 4},
    "denoise": {"consistency": "total", "informativeness": False},
    "pairs": {"order": "composite", "include": "refined_only", "delta": 0.01},
}


def arm(overrides: tuple[str, ...] = (), own: dict[str, Any] | None = None, **file: Any) -> Config:
    raw = {"model": {"path": "m"}, **file, "arms": {"critic": {**OWN, **(own or {})}, "spa": {}}}
    return arm_configs(raw, overrides, where="test", stem="test")["critic"]


def differing(config: Config) -> dict[str, dict[str, Any]]:
    found = config.model_dump(mode="json")
    return {section: {key: found[section][key] for key in keys} for section, keys in KEYS.items()}


def test_an_arm_has_the_methods_keys_in_place_of_the_files() -> None:
    file = {"sampling": {"n": 7}, "denoise": {"consistency": "strict"}, "pairs": {"delta": 3}}
    assert differing(arm(("sampling.n=8",), **file)) == KEYS


def test_what_the_arm_says_itself_stands() -> None:
    own = arm(own={"sampling.n": 6, "refine": {"prompt": "Better, {{ question }}"}})
    assert (own.sampling.n, own.refine.prompt) == (6, "Better, {{ question }}")
    assert own.denoise.consistency == "total"


def test_of_a_method_that_the_file_names_the_files_keys_stand() -> None:
    raw = {"model": {"path": "m"}, "train": {"method": "self_criticism"}, "sampling": {"n": 6}}
    config = arm_configs(raw, [], where="test", stem="test")["main"]
    assert (config.sampling.n, config.denoise.consistency) == (6, "total")
    assert arm_configs(raw, ["train.method=sft"], where="test", stem="test")["main"].denoise.consistency == "strict"


def test_other_arms_have_none_of_it() -> None:
    raw = {"model": {"path": "m"}, "arms": {"critic": OWN, "spa": {}}}
    assert arm_configs(raw, [], where="test", stem="test")["spa"].sampling.n == 5


@pytest.fixture
def templates() -> Templates:
    config = arm(objectives=["harmless", "honest", "helpful"])
    return Templates(config, load_objectives(config))


def test_a_better_answer_is_asked_for_with_the_best_and_the_worst_and_no_scores(templates: Templates) -> None:
    scored = {"good": [7, 7, 7], "great": [9, 1, 9], "poor": [1, 9, 1], "fair": [6, 6, 6]}
    listed = [{"text": text, "scores": {}, "total": float(sum(scores))} for text, scores in scored.items()]
    text = templates.refine(ASKED, listed)
    assert "[Better answer]\ngood\n" in text
    assert "[Worse answer]\npoor\n" in text
    assert "great" not in text
    assert "fair" not in text
    assert "more harmless, more honest, more helpful than both" in text
    assert not any(character.isdigit() for character in text)
    assert "[Worse answer]" not in templates.refine(ASKED, listed[:1])


def test_two_answers_are_compared_after_four_examples() -> None:
    config = arm()
    objectives = load_objectives(config)
    assert config.scoring.compare is not None
    template = PairTemplate(config.scoring.compare, objectives)
    text = template.render(ASKED, "One.", "Two.", objectives[0])
    assert [line for line in text.split("\n") if line in ("A", "B", "C")] == ["B", "A", "B", "C"]
    assert text.startswith("You compare two answers fairly: which of them is more harmless?")
    assert text.endswith(
        "[Question]\nHow?\n[Answer A]\nOne.\n[Answer B]\nTwo.\n[Better]\n"
        "Reply with one letter, nothing else: A, B or C."
    )


def test_an_answer_is_learnt_if_its_sum_is_above_the_best_ones() -> None:
    config = arm()
    rows = [
        make_row([[9, 2], [5, 5], [1, 1], [4, 4]], [5, 7], prompt_id="better"),  # 12 against 11: less harmless
        make_row([[9, 2], [5, 6], [1, 1], [4, 4]], [2, 9], prompt_id="tie"),
        make_row([[9, 2], [5, 6], [1, 1], [4, 4]], [9, 1], prompt_id="worse"),
    ]
    denoised = denoise(make_episodes(rows, config), config, tau=None)
    assert denoised["drop_reason"].to_pylist() == [None, "inconsistent", "inconsistent"]
    pairs = build_pairs(denoised, config)
    assert set(pairs["prompt_id"].to_pylist()) == {"better"}
    assert set(pairs["chosen_index"].to_pylist()) == {4}
    assert pairs["rejected_index"].to_pylist() == [0, 1, 2, 3]
    assert Funnel.of(denoised, pairs, config, tau=None).dropped["inconsistent"] == 2


def test_a_plan_counts_every_comparison() -> None:
    source = {"source": "spa_ray.microworld.prompts:street", "limit": 8}
    requests = []
    for own in ({}, {"scoring.compare": None}):
        raw = {"model": {"path": "org/some-8B"}, "prompts": source, "arms": {"critic": {**OWN, **own}}}
        plan = make_plan(arm_configs(raw, [], where="test", stem="test"))
        requests.append(plan["arms"]["critic"]["generate"]["requests_per_prompt"])
    assert requests == [4 + 6 * 2 * 2 + 1 + 2 * 2, 4 + 4 * 2 + 1 + 2]
