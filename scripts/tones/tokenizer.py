"""The tokenizer of `tones`: the words of both worlds, the words of score sentences, digits one by one.

A mark of 10 is one token, as the first world has it.
"""

from __future__ import annotations

import random
import re

from tokenizers import Regex, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from scripts.microworld import tokenizer as first
from scripts.tones.corpus import MAKERS
from spa_ray.microworld.tones.grammar import all_sentences
from spa_ray.microworld.tones.prompts import ATTRIBUTES, CUES

DIGITS = r"(?<![\d.])10(?!\d)|\d(?!\w)|(?<=[\d.])\d"  # not those of a word such as rm1_score


def words() -> list[str]:
    """Every word of the world, sorted, without the first world's."""
    rng = random.Random(0)
    texts = all_sentences() + [cue for ends in CUES.values() for cues in ends for cue in cues]
    texts += [f"<{name}_score: -, {name}> <rm{k}_score>" for k, name in enumerate((*ATTRIBUTES, "helpful"), 1)]
    texts += [part for make in MAKERS.values() for e in (make(rng) for _ in range(300)) for part in (e.user, e.target)]
    found = {word for text in texts for word in re.findall(r"\w+|[^\w\s]+", text)}
    known = set(first.words())
    return sorted({word for word in found | set("0123456789") if not re.fullmatch(r"\d\d+", word)} - known)


def build() -> PreTrainedTokenizerFast:
    """The first world's tokenizer, with more words behind its own, so that its ids stand."""
    tokenizer = first.build(words())
    split = pre_tokenizers.Split(Regex(DIGITS), "isolated")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.Whitespace()])
    return tokenizer
