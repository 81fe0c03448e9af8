"""A reward model as the judge: a sequence classifier that scores answers in batches, in a thread of its own."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from spa_ray.config.judge import Reward
from spa_ray.errors import InputError
from spa_ray.generation.judging import Item, Judgement, Message, Parts, together
from spa_ray.rollout.chat import chat_of
from spa_ray.rollout.settings import ChatSettings, today
from spa_ray.rollout.tokenizer import load_tokenizer, why
from spa_ray.storage.node_cache import local_folder

AUTO = "AutoModelForSequenceClassification"
SPEAKERS = {"user": "Human", "assistant": "Assistant"}  # of HH-RLHF
Encoded = dict[str, list[int]]  # what a tokenizer makes of one sequence


class RewardJudge:
    """Whoever waits is scored with all others that wait, at most `batch_size` in one forward pass."""

    def __init__(
        self,
        section: Reward,
        objectives: Sequence[str],
        scale: Sequence[int] = (1, 10),
        *,
        settings: ChatSettings | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """`settings` say what day a chat template sees.

        Raises: InputError for a folder that is no trained sequence classifier, or one that lacks an output.
        """
        assert section.path is not None
        self._section, self._scale = section, scale
        folder = local_folder(Path(section.path))
        self._tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
        self._model = load_classifier(section, folder, trust_remote_code=trust_remote_code)
        # Classifiers find a sequence's end by their own padding token; one without any takes a sequence at a time.
        padding = self._model.config.pad_token_id
        self._at_once = 1 if padding is None else section.batch_size
        self._tokenizer.padding_side = "right"
        if padding is not None:
            self._tokenizer.pad_token = self._tokenizer.convert_ids_to_tokens(padding)
        chat = section.input == "chat" or (section.input is None and self._tokenizer.chat_template is not None)
        self._ask = transcript if section.input == "transcript" else question
        settings = settings or ChatSettings(date=today())
        self._chat = chat_of(self._tokenizer, folder, settings) if chat else None
        self._at = outputs_of(section, objectives, self._labels())
        places = getattr(self._model.config, "max_position_embeddings", math.inf)
        self._longest = min(self._tokenizer.model_max_length, places)
        self._waiting: list[tuple[Encoded, asyncio.Future[list[float]]]] = []
        self._worker: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reward")

    @classmethod
    def of(cls, section: Reward, parts: Parts) -> RewardJudge | RewardJudges:
        config = parts.config
        shared: dict[str, Any] = {
            "scale": config.scoring.scale,
            "settings": parts.chat.settings.model_copy(update={"kwargs": {}}),
            "trust_remote_code": config.model.trust_remote_code,
        }
        if section.models is None:
            return cls(section, config.objectives, **shared)
        one_each = section.each()
        if missing := [name for name in config.objectives if name not in one_each]:
            raise InputError(f"reward models: none is for {missing[0]}; give models: {{{missing[0]}: FOLDER}}")
        return RewardJudges({name: cls(one_each[name], [name], **shared) for name in config.objectives})

    @staticmethod
    def check(section: Reward, where: str) -> None:
        """Raises: InputError where a folder holds no sequence classifier in safetensors."""
        for folder in (section.models or {"": str(section.path)}).values():
            check_folder(Path(folder), where)

    def _labels(self) -> list[str]:
        """Names of the model's outputs. Raises: InputError where it has no such outputs."""
        shape, output = self._model.config, self._section.output
        if output == "logits":
            return [str(shape.id2label[k]) for k in range(shape.num_labels)]
        try:  # nothing else tells how many there are
            (found,) = self._forward([dict(self._tokenizer("."))])
        except AttributeError as e:
            raise InputError(f"reward model {self._section.path}: its output has no {output!r}; set output") from e
        return [str(k) for k in range(len(found))]

    async def score(self, item: Item) -> list[Judgement]:
        encoded = self._encode(item)
        if (tokens := len(encoded["input_ids"])) > self._longest:
            why_not = f"too_long: {tokens} tokens exceed the reward model's context of {self._longest}"
            return [Judgement(None, why_not) for _ in item.objectives]
        outputs = await self._outputs(encoded)
        return [self._read(outputs[self._at[objective.name]], objective.name) for objective in item.objectives]

    def _read(self, value: float, objective: str = "") -> Judgement:
        mean, deviation = (self._section.standardize or {}).get(objective, (0.0, 1.0))
        score = (value - mean) / deviation
        transform, (low, high) = self._section.transform, self._scale
        if transform == "sigmoid":
            score = low + (high - low) * (1 + math.tanh(score / 2)) / 2  # which no output overflows
        elif transform != "identity":
            score = transform[0] * score + transform[1]
        if not (math.isfinite(value) and math.isfinite(score)):
            return Judgement(None, f"parse_failure: the reward model's output is {value}")
        return Judgement(score, text=f"{value:.6g}")

    def _encode(self, item: Item) -> Encoded:
        """Control tokens in what was said stay text. Raises: ValueError for what the chat template refuses."""
        if self._chat is not None:
            ids = self._chat.answered_ids(item.messages, item.response)
            return {"input_ids": ids, "attention_mask": [1] * len(ids)}
        return dict(self._tokenizer(self._ask(item.messages), item.response, split_special_tokens=True))

    async def _outputs(self, encoded: Encoded) -> list[float]:
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
        padded: Any = self._tokenizer.pad(sequences, padding=several, return_tensors="pt").to(self._section.device)
        with torch.inference_mode():
            outputs: list[list[float]] = getattr(self._model(**padded), self._section.output).float().tolist()
        return outputs


class RewardJudges:
    """A reward model for each objective."""

    def __init__(self, judges: Mapping[str, RewardJudge]) -> None:
        self._judges = judges

    async def score(self, item: Item) -> list[Judgement]:
        alone = [replace(item, objectives=[objective]) for objective in item.objectives]
        found = await together([self._judges[one.objectives[0].name].score(one) for one in alone])
        return [judgement for (judgement,) in found]


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


def outputs_of(section: Reward, objectives: Sequence[str], labels: Sequence[str]) -> dict[str, int]:
    """Objective -> number of its output. Raises: InputError where the model has no such output."""
    one = section.attribute
    named = section.attributes or {name: k if one is None else one for k, name in enumerate(objectives)}
    found = {}
    for objective in objectives:
        given = named.get(objective)
        at = labels.index(given) if given in labels else given
        if not isinstance(at, int) or not 0 <= at < len(labels):
            what = "none" if given is None else f"no {given!r}"
            raise InputError(
                f"reward model {section.path}: {what} of its {len(labels)} outputs ({', '.join(labels)}) is for "
                f"{objective}; give attributes: {{{objective}: ..}}"
            )
        found[objective] = at
    return found
