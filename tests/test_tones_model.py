"""The model of the world `tones`: its vocabulary and its folder."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

from scripts.tones import corpus
from scripts.tones import tokenizer as world_tokenizer
from spa_ray.methods.sga import BETWEEN, SCORE, SENTENCE
from spa_ray.microworld.tones import oracle
from spa_ray.microworld.tones.prompts import ATTRIBUTES

MODEL = Path(oracle.__file__).parent / "model"


def test_every_word_of_prompts_answers_and_score_sentences_is_in_the_vocabulary() -> None:
    from transformers import AutoTokenizer

    tokenizer, rng = AutoTokenizer.from_pretrained(MODEL), random.Random(8)
    assert tokenizer.get_vocab() == world_tokenizer.build().get_vocab()
    texts = [part for make in corpus.MAKERS.values() for _ in range(200) for part in _parts(make(rng))]
    texts += [
        SENTENCE + BETWEEN.join(SCORE.format(name=name, value=k / 100) for name in ATTRIBUTES) for k in range(101)
    ]
    texts += ["< harmless: 0.25 > < bold: 1 > How", " <rm1_score> -0.3 <rm5_score> 2.1 "]
    for text in texts:
        assert tokenizer.unk_token_id not in tokenizer.encode(text, add_special_tokens=False), text
    assert tokenizer.tokenize("harmless 10 <bold_score:0.10>")[:2] == ["harmless", "10"]
    assert tokenizer.tokenize("<bold_score:0.10>") == ["<", "bold_score", ":", "0", ".", "1", "0", ">"]


def _parts(example: Any) -> tuple[str, str]:
    return example.user, example.target


def test_the_model_folder_is_small_and_says_what_it_is() -> None:
    weights = MODEL / "model.safetensors"
    assert weights.stat().st_size < 10e6
    (size,) = struct.unpack("<Q", weights.read_bytes()[:8])
    assert size > 100
    card = (MODEL / "README.md").read_text()
    assert "python -m scripts.tones.pretrain" in card
    assert "python -m scripts.tones.measure" in card
