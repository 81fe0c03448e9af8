"""A sequence classifier that scores conversations in batches, in a thread of its own: what a reward judge asks."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from spa_ray.config.judge import Reward
from spa_ray.errors import InputError
from spa_ray.generation.judging import Message
from spa_ray.rollout.chat import chat_of
from spa_ray.rollout.settings import ChatSettings
from spa_ray.rollout.tokenizer import load_tokenizer, why
from spa_ray.storage.node_cache import local_folder

AUTO = "AutoModelForSequenceClassification"
SPEAKERS = {"user": "Human", "assistant": "Assistant"}  # of HH-RLHF
Encoded = dict[str, list[int]]  # what a tokenizer makes of one sequence


class Classifier:
    """Whoever waits is scored with all others that wait, at most `batch_size` in one forward pass."""

    def __init__(self, section: Reward, settings: ChatSettings, *, trust_remote_code: bool) -> None:
        """`settings` say what day a chat template sees.

        Raises: InputError for a folder that is no trained sequence classifier, or one that lacks `section.output`.
        """
        assert section.path is not None
        self._section = section
        folder = local_folder(Path(section.path))
        self.tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
        self._model = load_classifier(section, folder, trust_remote_code=trust_remote_code)
        # Classifiers find a sequence's end by their own padding token; one without any takes a sequence at a time.
        padding = self._model.config.pad_token_id
        self._at_once = 1 if padding is None else section.batch_size
        self.tokenizer.padding_side = "right"
        if padding is not None:
            self.tokenizer.pad_token = self.tokenizer.convert_ids_to_tokens(padding)
        chat = section.input == "chat" or (section.input is None and self.tokenizer.chat_template is not None)
        self._ask = transcript if section.input == "transcript" else question
        self._chat = chat_of(self.tokenizer, folder, settings) if chat else None
        self.labels = self._labels()
        places = getattr(self._model.config, "max_position_embeddings", math.inf)
        self.longest = min(self.tokenizer.model_max_length, places)  # tokens
        self._waiting: list[tuple[Encoded, asyncio.Future[list[float]]]] = []
        self._worker: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reward")

    def _labels(self) -> list[str]:
        """Names of the model's outputs. Raises: InputError where it has no such outputs."""
        shape, output = self._model.config, self._section.output
        if output == "logits":
            return [str(shape.id2label[k]) for k in range(shape.num_labels)]
        try:  # nothing else tells how many there are
            (found,) = self._forward([dict(self.tokenizer("."))])
        except AttributeError as e:
            raise InputError(f"reward model {self._section.path}: its output has no {output!r}; set output") from e
        return [str(k) for k in range(len(found))]

    def encode(self, messages: Sequence[Message], response: str) -> Encoded:
        """Control tokens in what was said stay text. Raises: ValueError for what the chat template refuses."""
        if self._chat is not None:
            ids = self._chat.answered_ids(messages, response)
            return {"input_ids": ids, "attention_mask": [1] * len(ids)}
        return dict(self.tokenizer(self._ask(messages), response, split_special_tokens=True))

    async def outputs(self, encoded: Encoded) -> list[float]:
        """(outputs,) of one sequence."""
        answer: asyncio.Future[list[float]] = asyncio.get_running_loop().create_future()
        self._waiting.append((encoded, answer))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.ensure_future(self._work())  # no caller's, which may be given up
        return await answer

    async def _work(self) -> None:
        """Score until nobody waits. A failure is told to those whose batch it was."""
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch, self._waiting = self._waiting[: self._at_once], self._waiting[self._at_once :]
            try:
                found = await loop.run_in_executor(self._thread, self._forward, [encoded for encoded, _ in batch])
            except Exception as e:  # noqa: BLE001 whatever the model raises fails these prompts
                for _, answer in batch:
                    if not answer.done():
                        answer.set_exception(e)
                continue
            for (_, answer), outputs in zip(batch, found, strict=True):
                if not answer.done():  # a prompt that was given up waits no more
                    answer.set_result(outputs)

    def _forward(self, sequences: list[Encoded]) -> list[list[float]]:
        import torch

        several = len(sequences) > 1  # one needs no padding token, which the tokenizer may lack
        padded: Any = self.tokenizer.pad(sequences, padding=several, return_tensors="pt").to(self._section.device)
        with torch.inference_mode():
            outputs: list[list[float]] = getattr(self._model(**padded), self._section.output).float().tolist()
        return outputs


def question(messages: Sequence[Message]) -> str:
    """The first of a sentence pair: the last turn, or all of several with their roles."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in messages)


def transcript(messages: Sequence[Message]) -> str:
    """The turns as HH-RLHF writes them, up to where the answer begins; the space before that is RiC's."""
    turns = [f"\n\n{SPEAKERS.get(turn['role'], turn['role'].capitalize())}: {turn['content']}" for turn in messages]
    return f"{''.join(turns)} \n\nAssistant:"


def check_folder(folder: Path, where: str) -> None:
    """Raises: InputError where the folder holds no sequence classifier in safetensors."""
    shape = _settings(folder)
    if not shape or not list(folder.glob("*.safetensors")):
        raise InputError(f"{where}: {folder}: no reward model here (config.json and *.safetensors)")
    kinds = shape.get("architectures") or []
    if AUTO not in shape.get("auto_map", {}) and not any("SequenceClassification" in kind for kind in kinds):
        raise InputError(
            f"{where}: {folder}: {', '.join(kinds) or 'an unnamed architecture'} is no sequence classifier; "
            "give the folder of a reward model"
        )


def _settings(folder: Path) -> dict[str, Any]:
    """config.json; empty where there is none."""
    try:
        found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def load_classifier(section: Reward, folder: Path, *, trust_remote_code: bool) -> Any:
    """The model on its device. Raises: InputError where it cannot be loaded, or a part of it was never trained."""
    import torch
    from transformers import AutoModelForSequenceClassification

    if not trust_remote_code and AUTO in _settings(folder).get("auto_map", {}):
        raise InputError(f"reward model {folder}: its class is code of its own; model.trust_remote_code=true runs it")
    dtype = "auto" if section.dtype is None else getattr(torch, section.dtype)
    try:
        model, found = AutoModelForSequenceClassification.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
        model = model.to(section.device).eval()
    except Exception as e:  # files, libraries and devices each have errors of their own
        raise InputError(f"reward model {folder}: it cannot be loaded ({why(e)})") from e
    if found["missing_keys"]:  # transformers fills them with random numbers
        names = ", ".join(sorted(found["missing_keys"])[:3])
        raise InputError(f"reward model {folder}: its files hold no {names}; give the folder of a trained model")
    return model
