"""A reward model as the judge: a sequence classifier that scores answers in batches, in a thread of its own."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from spa_ray.config.judge import Reward
from spa_ray.errors import InputError
from spa_ray.generation.judging import Item, Judgement, Parts

Encoded = dict[str, list[int]]  # what a tokenizer makes of one sequence


class RewardJudge:
    """Whoever waits is scored with all others that wait, at most `batch_size` in one forward pass."""

    def __init__(self, section: Reward, *, trust_remote_code: bool = False) -> None:
        """Raises: InputError for a folder that is no sequence classifier with safetensors."""
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self._section, folder = section, Path(section.path).expanduser()
        self.check(section, "judge")
        self._tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        self._model = AutoModelForSequenceClassification.from_pretrained(
            folder, use_safetensors=True, trust_remote_code=trust_remote_code
        )
        self._model.to(section.device).eval()
        # Classifiers find a sequence's end by their own padding token; one without any takes a sequence at a time.
        padding = self._model.config.pad_token_id
        self._at_once = 1 if padding is None else section.batch_size
        self._tokenizer.padding_side = "right"
        if padding is not None:
            self._tokenizer.pad_token = self._tokenizer.convert_ids_to_tokens(padding)
        self._chat = section.input == "chat" or (section.input is None and self._tokenizer.chat_template is not None)
        self._waiting: list[tuple[Encoded, asyncio.Future[list[float]]]] = []
        self._worker: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reward")

    @classmethod
    def of(cls, section: Reward, parts: Parts) -> RewardJudge:
        return cls(section, trust_remote_code=parts.config.model.trust_remote_code)

    @staticmethod
    def check(section: Reward, where: str) -> None:
        """Raises: InputError where the folder holds no model in safetensors."""
        folder = Path(section.path).expanduser()
        if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
            raise InputError(f"{where}: {section.path}: no reward model here (config.json and *.safetensors)")

    async def score(self, item: Item) -> list[Judgement]:
        outputs = await self._outputs(self._encode(item))
        at = self._section.attributes or {objective.name: k for k, objective in enumerate(item.objectives)}
        return [self._read(outputs, at, objective.name) for objective in item.objectives]

    def _read(self, outputs: Sequence[float], at: dict[str, int], objective: str) -> Judgement:
        if at.get(objective, len(outputs)) >= len(outputs):
            raise ValueError(f"reward model {self._section.path}: {len(outputs)} outputs, and none for {objective}")
        value, (a, b) = outputs[at[objective]], self._section.scale
        score = a * (1 / (1 + math.exp(-value)) if self._section.sigmoid else value) + b
        if not math.isfinite(score):
            return Judgement(None, f"parse_failure: the reward model's output is {value}")
        return Judgement(score, text=f"{value:.6g}")

    def _encode(self, item: Item) -> Encoded:
        if self._chat:
            said = [*map(dict, item.messages), {"role": "assistant", "content": item.response}]
            found = self._tokenizer.apply_chat_template(said, tokenize=True, return_dict=True)
        else:
            found = self._tokenizer(item.messages[-1]["content"], item.response)
        tokens = len(found["input_ids"])
        longest = min(self._tokenizer.model_max_length, getattr(self._model.config, "max_position_embeddings", 10**9))
        if tokens > longest:
            raise ValueError(f"the conversation's {tokens} tokens exceed the reward model's {longest}")
        return dict(found)

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

        padded: Any = self._tokenizer.pad(sequences, return_tensors="pt").to(self._section.device)
        with torch.inference_mode():
            outputs: list[list[float]] = self._model(**padded).logits.float().tolist()
        return outputs
