"""A model that senses: prompts in, the scores that each one asks for out, by the head that training left beside it.

The backbone is read as training reads it (`ResponseLogps`): the hidden state that the output head gets, at the last
token of the prompt without a generation prompt. Prompts are padded on the right, where no token sees the padding, so
the scores depend on no neighbour but by rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from spa_ray.config.models import Model
from spa_ray.errors import InputError
from spa_ray.rollout.chat import open_chat
from spa_ray.rollout.tokenizer import why
from spa_ray.training.method import Method

TOKENS = 16_384  # in one forward pass, padding included
Messages = Sequence[Mapping[str, str]]


class Sensor:
    """One model and its head. Scores are in [0, 1], in the order of the method's objectives."""

    def __init__(
        self, model: Model, folder: Path, method: Method[Any], *, day: date | None = None, device: str = "cpu"
    ) -> None:
        """`model` says in which dtype, and how prompts are rendered. Raises: InputError for a model or head that cannot
        be loaded."""
        from spa_ray.training.forward import ResponseLogps
        from spa_ray.training.rope import pin_rope

        self._chat, self._method, self._device = open_chat(model, folder, day=day), method, device
        backbone = load_backbone(model, folder).to(device)
        pin_rope(backbone, model.max_model_len)
        self.context = model.max_model_len or backbone.config.get_text_config().max_position_embeddings
        self._policy = ResponseLogps(backbone, hidden=True)
        self._head = method.load(folder, trust_remote_code=model.trust_remote_code).to(device)

    def sense(self, conversations: Sequence[Messages]) -> list[list[float] | str]:
        """The scores of each; a text says why a prompt cannot be read."""
        found: list[list[float] | str] = ["" for _ in conversations]
        prompts: dict[int, list[int]] = {}
        for at, messages in enumerate(conversations):
            try:
                prompts[at] = self._ids(messages)
            except ValueError as e:
                found[at] = str(e)
        for places in chunks({at: len(ids) for at, ids in prompts.items()}):
            for at, scores in zip(places, self.scores([prompts[at] for at in places]), strict=True):
                found[at] = scores
        return found

    def scores(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        """Of prompts as ids, in one forward pass."""
        import torch

        rows = [(np.asarray(ids, dtype=np.int64), np.zeros(0, dtype=np.int64)) for ids in prompts]
        with torch.inference_mode():
            *_, hidden = self._policy(self._policy.collate(rows, self._device))
            sensed = self._method.sense(self._head, hidden)
        if not bool(torch.isfinite(sensed).all()):
            raise InputError("the model senses scores that are no numbers; its weights or its head are broken")
        scores: list[list[float]] = sensed.double().tolist()
        return scores

    def _ids(self, messages: Messages) -> list[int]:
        ids = self._chat.message_ids(messages)
        if len(ids) >= self.context:
            raise ValueError(f"{len(ids)} tokens exceed the context of {self.context}")
        return ids


def load_backbone(model: Model, folder: Path) -> Any:
    """The causal LM in evaluation mode. Raises: InputError."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    dtype = "auto" if model.dtype == "auto" else getattr(torch, model.dtype)
    try:
        found = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=model.trust_remote_code, use_safetensors=True
        )
    except Exception as e:  # files and libraries each have errors of their own
        raise InputError(f"model {folder}: it cannot be loaded to sense scores ({why(e)})") from e
    return found.eval()


def chunks(lengths: Mapping[int, int]) -> Iterator[list[int]]:
    """The keys by length, so many at a time as TOKENS has room for."""
    chunk: list[int] = []
    for key in sorted(lengths, key=lambda key: lengths[key]):
        if chunk and (len(chunk) + 1) * lengths[key] > TOKENS:
            yield chunk
            chunk = []
        chunk.append(key)
    if chunk:
        yield chunk
