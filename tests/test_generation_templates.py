"""Judge and refinement templates, and chat templates: mistakes are found before anything starts."""

from __future__ import annotations

from typing import Any

import pytest

from spa_ray.engine.scripted import ScriptedTokenizer
from spa_ray.errors import InputError
from spa_ray.generation.templates import Templates
from spa_ray.objectives import load_objectives
from spa_ray.rollout.chat import Chat
from tests.scripted import scripted_config
from tests.tiny_model import build_tiny_tokenizer

TURNS = [
    {"role": "user", "content": "first"},
    {"role": "assistant", "content": "second"},
    {"role": "user", "content": "third {{ answer }}"},
]
SCORED = [
    {"text": "LOWER", "scores": {"harmless": 2, "helpful": 3}},
    {"text": "UPPER", "scores": {"harmless": 9, "helpful": 8}},
]


def templates(**sections: Any) -> Templates:
    config = scripted_config(**sections)
    return Templates(config, load_objectives(config))


@pytest.mark.parametrize("mode", ["choice", "regex", "expected"])
def test_the_built_in_judge_prompt_names_one_objective_the_question_and_one_answer(mode: str):
    found = templates(scoring={"mode": mode, "scale": [1, 9]})
    text = found.score(TURNS, "my answer", found.objectives[0])
    assert "third {{ answer }}" in text  # what a user writes is text, never a template
    assert "my answer" in text
    assert "harmless" in text
    assert "helpful" not in text
    assert "[Conversation]\nUser: first\nAssistant: second\nUser: third" in text  # not its last turn alone
    assert ("[[k]]" in text) == (mode == "regex")


def test_a_single_question_is_no_conversation() -> None:
    found = templates()
    for text in (found.score(TURNS[:1], "my answer", found.objectives[0]), found.refine(TURNS[:1], SCORED)):
        assert "[Question]\nfirst\n\n[Answer" in text


def test_either_layout_of_the_judge_prompt_says_the_same_and_leads_with_what_its_requests_share():
    both = {}
    for layout in ("objective_first", "answer_first"):
        found = templates(scoring={"layout": layout, "prompt": None})
        both[layout] = found.score(TURNS, "my answer", found.objectives[0])
        for part in ("third", "my answer", "harmless", found.objectives[0].principle, "Reply with one whole number"):
            assert part in both[layout]
    assert both["objective_first"].index("harmless") < both["objective_first"].index("my answer")
    assert both["answer_first"].index("my answer") < both["answer_first"].index("harmless")


def test_the_built_in_refinement_prompt_shows_every_candidate_with_its_scores_in_order_of_priority():
    text = templates().refine(TURNS, SCORED)
    assert text.index("1. harmless") < text.index("2. helpful")
    assert text.index("harmless 2, helpful 3") < text.index("LOWER") < text.index("harmless 9, helpful 8")


def test_every_documented_variable_can_be_used():
    common = "{{ question }}|{{ messages[0].content }}|{{ objectives[1].name }}|{{ scale[1] }}|"
    score = common + "{{ answer }}|{{ objective.name }}|{{ objective.principle[:3] }}|{{ objective.rubric[:3] }}"
    refine = common + "{% for c in candidates %}{{ c.text }}={{ c.scores['helpful'] }};{% endfor %}"
    found = templates(scoring={"prompt": score, "system": score}, refine={"prompt": refine, "system": refine})
    expected = "third {{ answer }}|first|helpful|10|"
    assert found.score(TURNS, "A", found.objectives[0]) == expected + "A|harmless|The|Low"
    assert found.score_system(TURNS, "A", found.objectives[0]) == expected + "A|harmless|The|Low"
    assert found.refine(TURNS, SCORED) == found.refine_system(TURNS, SCORED) == expected + "LOWER=3;UPPER=8;"


@pytest.mark.parametrize(
    ("section", "key", "source", "message"),
    [
        ("scoring", "prompt", "{{ answr }}", "scoring.prompt: there is no variable 'answr'"),
        ("scoring", "prompt", "{% if question == 'x' %}{{ answr }}{% endif %}", "no variable 'answr'"),
        ("scoring", "prompt", "{{ candidates }}", "no variable 'candidates'"),
        ("scoring", "prompt", "{{ objective.nam }}", "scoring.prompt: cannot be rendered"),
        ("scoring", "prompt", "{{ answer ", "not a Jinja2 template"),
        ("scoring", "prompt", "{{ ''.__class__.__mro__ }}", "cannot be rendered"),
        ("scoring", "system", "{{ answr }}", "scoring.system: there is no variable 'answr'"),
        ("refine", "prompt", "{{ answer }}", "refine.prompt: there is no variable 'answer'"),
        ("refine", "prompt", "{{ candidates[0].scores['harmles'] }}", "refine.prompt: cannot be rendered"),
        ("refine", "system", "{{ objective.name }}", "refine.system: there is no variable 'objective'"),
    ],
)
def test_a_template_that_cannot_work_is_refused_up_front(section: str, key: str, source: str, message: str):
    with pytest.raises(InputError, match=message):
        templates(**{section: {key: source}})


def test_a_model_without_a_chat_template_is_refused():
    with pytest.raises(InputError, match="no chat template"):
        Chat(build_tiny_tokenizer(chat_template=None), model="m")


def test_the_prompt_ends_where_the_answer_begins_and_has_one_beginning_of_text():
    tokenizer = build_tiny_tokenizer()
    ids = Chat(tokenizer, model="m").prompt_ids([{"role": "user", "content": "hi"}], "be kind")
    assert tokenizer.decode(ids) == "<|bos|><|system|>be kind<|end|><|user|>hi<|end|><|assistant|>"
    assert ids.count(tokenizer.bos_token_id) == 1


NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}<|assistant|>"
)
IGNORES_SYSTEM = (
    "{% for m in messages %}{% if m['role'] != 'system' %}<|user|>{{ m['content'] }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template", [NO_SYSTEM, IGNORES_SYSTEM])
def test_where_a_template_has_no_system_role_its_text_leads_the_first_user_turn(template: str):
    tokenizer = build_tiny_tokenizer(template)
    text = tokenizer.decode(Chat(tokenizer, model="m").prompt_ids([{"role": "user", "content": "hi"}], "be kind"))
    assert "<|user|>be kind\n\nhi" in text


def test_the_sampling_system_prompt_stands_in_for_the_conversations_own():
    chat = Chat(ScriptedTokenizer(), model="m")
    turns = [{"role": "system", "content": "own"}, {"role": "user", "content": "hi"}]
    decode = ScriptedTokenizer().decode
    assert decode(chat.prompt_ids(turns, "sampled"), skip_special_tokens=False).startswith("<system>sampled<end><user>")
    assert decode(chat.prompt_ids(turns), skip_special_tokens=False).startswith("<system>own<end><user>")


@pytest.mark.parametrize("limit", [None, 8])
@pytest.mark.parametrize("text", ["", "hi", "  two\n\n words ", "ümläut 中文 🙂", "<|other|> <s>", "word " * 200])
def test_prompt_ids_are_those_of_transformers_whatever_truncation_the_tokenizers_file_asks_for(
    text: str, limit: int | None
) -> None:
    tokenizer = build_tiny_tokenizer()
    turns = [{"role": "user", "content": text}]
    expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
    if limit:
        tokenizer.backend_tokenizer.enable_truncation(limit)
        tokenizer.backend_tokenizer.enable_padding()
    assert Chat(tokenizer, model="m").prompt_ids(turns) == expected
