"""The word-level tokenizer of the microworld: a few hundred words, the scores 1..10 as single tokens, a chat template.

Goes out: a `PreTrainedTokenizerFast`. Answers survive a round trip (full stops and commas are joined again in
decoding, a colon is not); a word that the world does not know becomes `<unk>`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from scripts.microworld.corpus import MAKERS, WORLD_SYSTEMS
from spa_ray.microworld.grammar import all_sentences
from spa_ray.microworld.prompts import FAMILIES, draw

SPECIAL = ("<pad>", "<unk>", "<s>", "<end>", "<system>", "<user>", "<assistant>")
CHAT_TEMPLATE = (
    "<s>{% for message in messages %}<{{ message.role }}>{{ message.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def words() -> list[str]:
    """Every word of the world, sorted: all answer sentences, many prompts of every family, the templates."""
    rng = random.Random(0)
    texts = all_sentences() + [s for s in WORLD_SYSTEMS if s]
    texts += [text for family in FAMILIES for pair in (draw(family, rng) for _ in range(4000)) for text in pair]
    texts += [e.user for make in MAKERS.values() for e in (make(rng) for _ in range(20))]
    found = {word for text in texts for word in re.findall(r"\w+|[^\w\s]+", text)}
    return sorted(found | {str(k) for k in range(1, 11)})


def build(more: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """The tokenizer, with its chat template; `<end>` ends every turn and is the end-of-sequence token. `more` words of
    another world stand behind this one's."""
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *words(), *more))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<end>",
        additional_special_tokens=["<system>", "<user>", "<assistant>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
