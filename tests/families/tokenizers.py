"""Tokenizers of the families' kinds: small ones trained here with their control tokens, and Mistral's real files.

Each function returns a Hugging Face tokenizer without a chat template. Vocabularies are the same in every run.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

CORPUS = """
A policy is trained on pairs of answers: one was chosen, the other was rejected.
The judge rates every answer from 1 to 10.
What is the capital of the country in which the longest river ends? Say why, in one short sentence, and give a source.
Honesty comes before helpfulness: an answer that would harm somebody is refused, kindly, and another way is offered.
Wie geht es dir heute? Où est la gare? The temperature is 1.2, the limit is 64 tokens, and the seed is 20261125.
def add(a, b):
    return a + b
The user asked for a recipe with salt, brass, rice and seven lamps; the system said to be brief, exact and friendly.
"""


def byte_level(specials: tuple[str, ...], roles: dict[str, str]) -> Any:
    """Byte-level BPE, as Llama 3, Qwen, SmolLM2, Phi-4 and OLMo have. `roles`: bos_token and others, by name."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(CORPUS.splitlines(), trainer)
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return _wrapped(core, roles)


def pieces(specials: tuple[str, ...], roles: dict[str, str], *, prefix: bool) -> Any:
    """BPE over "▁"-marked words with byte fallback, as Gemma (`prefix` false) and Phi-3 (true) have."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    scheme = "first" if prefix else "never"
    core = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=True),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split("\n", behavior="isolated"),
        ]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=620, special_tokens=["<unk>", *byte_tokens], initial_alphabet=["▁", "\n"], show_progress=False
    )
    core.train_from_iterator(CORPUS.splitlines(keepends=True), trainer)
    core = Tokenizer.from_str(_as_plain_bytes(core.to_str()))  # byte tokens are pieces, not control tokens
    core.normalizer = normalizers.Sequence([])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(content=" ", left=1)] if prefix else [])
    )
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<unk>", *specials)])
    return _wrapped(core, {"unk_token": "<unk>", **roles})


def _as_plain_bytes(text: str) -> str:
    raw = json.loads(text)
    raw["added_tokens"] = []
    return json.dumps(raw)


def _wrapped(core: Any, roles: dict[str, str]) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=core, **roles)


def mistral_sentencepiece(file: str, folder: Path) -> Any:
    """Mistral's real SentencePiece file (32k words, byte fallback) out of the package mistral_common."""
    from transformers import AutoTokenizer

    folder.mkdir(parents=True)
    shutil.copy(_mistral_file(file), folder / "tokenizer.model")
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "add_bos_token": True}))
    return AutoTokenizer.from_pretrained(folder)


def mistral_tekken(file: str, folder: Path) -> Any:
    """Mistral's real tekken file (131k words) as the Hugging Face tokenizer that its repositories carry beside it."""
    from transformers.integrations.mistral import convert_tekken_tokenizer

    folder.mkdir(parents=True)
    shutil.copy(_mistral_file(file), folder / "tekken.json")
    return convert_tekken_tokenizer(str(folder / "tekken.json"))


def _mistral_file(name: str) -> Path:
    import mistral_common

    return Path(mistral_common.__file__).parent / "data" / name
