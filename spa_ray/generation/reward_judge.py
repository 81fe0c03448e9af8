"""A reward model as the judge: a sequence classifier whose outputs are scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from spa_ray.config.judge import Reward
from spa_ray.errors import InputError
from spa_ray.generation.classifier import Classifier, check_folder
from spa_ray.generation.judging import Item, Judgement, Parts, together
from spa_ray.rollout.settings import ChatSettings, today


class RewardJudge:
    """One model, whose outputs score all objectives."""

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
        settings = settings or ChatSettings(date=today())
        self._section, self._scale = section, scale
        self.classifier = Classifier(section, settings, trust_remote_code=trust_remote_code)
        self._at = outputs_of(section, objectives, self.classifier.labels)

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

    async def score(self, item: Item) -> list[Judgement]:
        encoded = self.classifier.encode(item.messages, item.response)
        if (tokens := len(encoded["input_ids"])) > (longest := self.classifier.longest):
            why_not = f"too_long: {tokens} tokens exceed the reward model's context of {longest}"
            return [Judgement(None, why_not) for _ in item.objectives]
        outputs = await self.classifier.outputs(encoded)
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


class RewardJudges:
    """A reward model for each objective."""

    def __init__(self, judges: Mapping[str, RewardJudge]) -> None:
        self._judges = judges

    async def score(self, item: Item) -> list[Judgement]:
        alone = [replace(item, objectives=[objective]) for objective in item.objectives]
        found = await together([self._judges[one.objectives[0].name].score(one) for one in alone])
        return [judgement for (judgement,) in found]


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
