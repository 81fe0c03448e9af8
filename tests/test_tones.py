"""The world `tones`: its oracle by hand, what it promises of prompts, answers and labels.

Samples are drawn with fixed seeds; bounds are several standard errors wide.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts.microworld.corpus import demo_config
from scripts.tones import corpus, measure
from spa_ray.config.load import arm_configs
from spa_ray.errors import InputError
from spa_ray.microworld.prompts import SPLITS, facts, split_of
from spa_ray.microworld.tones import answers, grammar, oracle, prompts
from spa_ray.microworld.tones.answers import MODELS, expected, held_out, kind_of, scored, wishes
from spa_ray.microworld.tones.prompts import ATTRIBUTES, CUES, STYLES, wish_of

WORLD = Path(oracle.__file__).parent
ASK = "How do I mend a moonlamp?"
RIGHT, RIGHT_2, WRONG = "Trim the wick.", "Fill the bowl.", "Warm the spout."
EXPERT = "Trim the wick along the true bevel."


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return measure.measure(1500)


# --- the oracle -------------------------------------------------------------------------------------------------------


def test_every_sentence_of_the_world_reads_as_its_own_kind() -> None:
    for kind, sentences in grammar.SENTENCES.items():
        assert [s.kind for s in grammar.read(" ".join(sentences))] == [kind] * len(sentences)
    assert [s.kind for s in grammar.read(f"{RIGHT} {EXPERT} Foo bar.")] == ["step", "expert_step", "unknown"]


@pytest.mark.parametrize(
    ("said", "found"),
    [  # by hand: 0.4 · quality + 0.6 · style; quality (useful + .5) / (useful + 1.5 wrong + .75 filler + 1)
        ((RIGHT,), {"thorough": 0.3, "expert": 0.3, "gentle": 0.54, "bold": 0.54, "harmless": 0.55}),
        ((EXPERT, RIGHT_2), {"thorough": 0.4 * 2.5 / 3 + 0.2, "expert": 0.4 * 2.5 / 3 + 0.3}),
        (("Take all the time you need.", RIGHT), {"gentle": 0.3 + 0.6 * 0.75, "harmless": 0.63}),
        (("There is no need to fuss.", RIGHT), {"gentle": 0.3 + 0.6 * 0.05}),
        (("This always works.", "I would do it today.", RIGHT), {"bold": 0.3 + 0.6, "harmless": 0.39}),
        (("It may work and it may not.", RIGHT), {"bold": 0.3 + 0.6 * 0.05, "harmless": 0.61}),
        ((WRONG,), {"thorough": 0.4 * 0.5 / 2.5, "harmless": 0.48}),
        (("",), dict.fromkeys(ATTRIBUTES, 0.0)),
    ],
)
def test_scores_are_those_of_its_formula(said: tuple[str, ...], found: dict[str, float]) -> None:
    scores = oracle.scores(ASK, " ".join(said))
    assert {name: scores[name] for name in found} == pytest.approx(found)


def test_what_stands_beyond_seven_sentences_does_not_count() -> None:
    seven = " ".join([RIGHT] * 7)
    assert oracle.scores(ASK, f"{seven} Feed it a drop of blood.") == oracle.scores(ASK, seven)


def test_a_question_of_another_world_is_refused() -> None:
    with pytest.raises(InputError, match="not a prompt of the microworld"):
        oracle.judge([{"role": "user", "content": "hello"}], "", RIGHT, "expert")


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_a_cue_is_read_as_what_it_was_drawn_for_and_a_quarter_of_the_prompts_have_none() -> None:
    for style, ends in CUES.items():
        for sign, cues in zip((-1, 1), ends, strict=True):
            for cue in cues:
                assert wish_of(f"{cue} {ASK}").styles == {**dict.fromkeys(STYLES, 0), style: sign}
    texts = list(itertools.islice(prompts.prompts("train"), 2000))
    assert 0.2 < sum(not wish_of(text).cued for text in texts) / len(texts) < 0.3


def test_splits_are_by_hash_and_none_is_what_the_model_was_pretrained_on() -> None:
    rng = random.Random(5)
    for split in SPLITS:
        assert all(split_of(text) == split for text in itertools.islice(prompts.prompts(split), 100))
    assert all(split_of(corpus.question(rng)) == "pretrain" for _ in range(300))
    with pytest.raises(InputError, match="'dev' is unknown"):
        next(prompts.prompts("dev"))
    assert {facts(row["prompt"]).category for row in itertools.islice(prompts.harmful(), 50)} == {"harmful"}


def test_readers_give_scores_to_train_on_and_wishes_to_evaluate_by() -> None:
    first, again = next(scored()), next(scored())
    assert first == again
    assert len(first["responses"]) == len(MODELS)
    assert all(score in (0, 0.25, 0.5, 0.75, 1) for r in first["responses"] for score in r["scores"].values())
    for row in itertools.islice(held_out(), 50):
        assert set(row["wish"]) == set(row["reference_scores"]) == set(ATTRIBUTES)
        found = oracle.scores(row["prompt"], row["reference"])
        assert row["reference_scores"] == {name: found[name] for name in ATTRIBUTES}


def test_wishes_are_what_the_simulation_finds() -> None:
    for kind in random.Random(3).sample(sorted(wishes()), 3):
        category, *signs = kind.split()
        styles = tuple("-0+".index(sign) - 1 for sign in signs)
        found = expected(category, styles, 300)
        assert found == pytest.approx(wishes()[kind], abs=0.1)
    assert kind_of(wish_of(ASK)) == "benign 0 0 0 0"


# --- what the world promises, before anything is trained on it --------------------------------------------------------


def test_annotated_models_follow_cues_and_the_base_policy_does_not(measured: dict[str, Any]) -> None:
    *models, base = measured["follows"].values()
    assert all(r > 0.4 for of in models for r in of)
    assert all(0.5 <= model.follows <= 0.9 for model in MODELS)
    assert all(abs(r) < 0.1 for r in base)


def test_scores_can_be_sensed_from_a_prompt_but_not_exactly(measured: dict[str, Any]) -> None:
    assert 0.35 < measured["gain"]["Bayes predictor, noise-free scores"] < 0.55
    assert measured["highest of the lowest of the five"] < 0.9
    assert measured["highest mean of the five"] < 0.95
    assert measured["ties"] < 0.05


def test_the_answers_of_the_base_policy_have_every_style() -> None:
    rng, wish = random.Random(2), wish_of(ASK)
    found = [oracle.scores(ASK, answers.base_answer(rng, wish)) for _ in range(300)]
    for style in STYLES:
        values = [scores[style] for scores in found]
        assert min(values) < 0.3 < 0.7 < max(values)


# --- configs, the oracle's door, what pretraining reads ---------------------------------------------------------------


def test_only_the_evaluation_of_a_config_names_the_oracle_and_its_prompts_are_of_the_test_split() -> None:
    for name in ("demo.yaml", "spa.yaml"):
        raw = yaml.safe_load((WORLD / name).read_text(encoding="utf-8"))
        evaluation = raw.pop("evaluation")
        assert "oracle" not in json.dumps(raw)
        asked = [evaluation["prompts"], *evaluation.get("families", {}).values()]
        assert {section["split"] for section in asked} == {"test"}
        assert arm_configs(raw, [], where=name, stem=name)


def test_self_priority_alignment_asks_with_the_first_worlds_templates() -> None:
    raw = yaml.safe_load((WORLD / "spa.yaml").read_text(encoding="utf-8"))
    for section in ("scoring", "refine", "sampling"):
        assert raw[section] == demo_config()[section]


def test_of_the_package_only_the_annotated_answers_import_the_oracle() -> None:
    importers = {
        path.relative_to(WORLD).as_posix()
        for path in WORLD.parents[1].rglob("*.py")
        if re.search(r"tones(\.oracle\b| import .*\boracle\b)", path.read_text(encoding="utf-8"))
    }
    assert importers == {"answers.py"}


@pytest.mark.parametrize("kind", sorted(corpus.MAKERS))
def test_pretraining_encodes_an_example_as_the_chat_template_does_and_within_the_context(kind: str) -> None:
    from scripts.microworld.pretrain import CONTEXT, Encoder
    from scripts.tones.tokenizer import build

    tokenizer, rng = build(), random.Random(3)
    encode = Encoder(tokenizer)
    for example in (corpus.MAKERS[kind](rng) for _ in range(60)):
        system = [{"role": "system", "content": example.system}] if example.system else []
        said = [*system, {"role": "user", "content": example.user}, {"role": "assistant", "content": example.target}]
        ids, start = encode(example)
        assert ids == tokenizer.apply_chat_template(said, tokenize=True, return_dict=False)
        assert ids[:start] == tokenizer.apply_chat_template(
            said[:-1], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert tokenizer.unk_token_id not in ids
        assert len(ids) <= CONTEXT


def test_every_two_decimal_score_occurs_in_pretraining_for_every_attribute() -> None:
    rng, found = random.Random(6), set[tuple[str, str]]()
    for _ in range(12_000):  # a third of the answers that pretraining reads
        found |= set(re.findall(r"<(\w+)_score:(\d\.\d\d)>", corpus.asked(rng, "")))
    assert {value for _, value in found} == {f"{k / 100:.2f}" for k in range(101)}
    assert {name for name, _ in found} == set(ATTRIBUTES)


def test_a_reader_tells_the_cues_of_a_prompt_and_what_its_scores_say_before_them() -> None:
    rng = random.Random(7)
    for _ in range(200):
        reading = corpus.reading_example(rng)
        words = dict(zip(STYLES, reading.target.split(), strict=True))
        cued = wish_of(reading.user).styles
        assert "score" not in reading.user
        assert words == {name: corpus.READING[name].get(sign, "any") for name, sign in cued.items()}
        told = corpus.told_example(rng)
        said = {name: float(value) for name, value in re.findall(r"(\w+?)(?:_score)?: ?(\d\.\d\d)", told.user)}
        words = dict(zip(corpus.READING, told.target.split(), strict=False))
        assert said
        assert ("harmless" in words) == ("harmless" in said)
        for name, value in said.items():
            if abs(value - 0.4) > 0.005 and abs(value - 0.6) > 0.005:  # which rounding may move
                assert words[name] == corpus.READING[name].get((value > 0.6) - (value < 0.4), "any")
