"""What `spa plan` looks up once a run: the model's headers, a few prompts, the tokens of what is asked of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spa_ray.config.models import Config
from spa_ray.config.prompts import Prompts
from spa_ray.data.left_out import lines
from spa_ray.engine.cpu_dtype import with_dtype
from spa_ray.errors import InputError
from spa_ray.generation.benchmark import benchmark_prompts, make_benchmark
from spa_ray.pipeline import plan_cost as cost
from spa_ray.pipeline.host import planned_host
from spa_ray.pipeline.plan_model import ModelFacts, model_facts
from spa_ray.pipeline.plan_prompts import SAMPLED, PromptFacts, held_out_facts, prompt_facts
from spa_ray.pipeline.plan_tokens import (
    CHARS_PER_TOKEN,
    CharEncoder,
    Encoder,
    Work,
    answer_work,
    compare_work,
    episode_work,
    mean_tokens,
    play_judging,
)
from spa_ray.pipeline.preflight import prompt_check, thinking_warnings
from spa_ray.rollout.chat import Chat, open_chat
from spa_ray.rollout.check import PromptCheck


@dataclass
class Lookup:
    """What was looked up, once a run: arms share the model; prompts and token counts are kept by their settings."""

    first: Config
    folder: Path | None = None
    notes: list[str] = field(default_factory=list)
    kept: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        facts = model_facts(self.first.model, self.notes, self.folder)
        self.devices = cost.devices(self.first, facts.parameters)
        config = self.first if self.devices.gpus_per_engine else with_dtype(self.first)
        changed = config.model.dtype != self.first.model.dtype
        self.model: ModelFacts = model_facts(config.model, [], self.folder) if changed else facts
        self.host = planned_host(self.first.resources, on_gpus=self.devices.gpus_per_worker > 0)
        self.encoder: Encoder = self._encoder()
        self.notes += thinking_warnings(self.encoder if isinstance(self.encoder, Chat) else None, self.first)

    def _encoder(self) -> Encoder:
        folder = self.model.folder
        if folder is None or self.first.model.own_engine:
            why = "not on this machine" if folder is None else "the engine's own"
            self.notes.append(f"tokenizer of {self.model.path}: {why}; {CHARS_PER_TOKEN} characters a token assumed")
            return CharEncoder()
        return open_chat(self.first.model, folder, estimate=True)

    def prompts(self, config: Config) -> PromptFacts:
        against = [section.model_dump_json() for section in config.decontaminated_by]
        key = ["prompts", config.model_dump(mode="json", include={"prompts", "episodes"}), against, config.labels_given]
        return self._once(key, lambda: self._prompts(config))

    def _prompts(self, config: Config) -> PromptFacts:
        where, prompts, given = "prompts", config.prompts, None
        if config.episodes.source:
            where, given = "episodes", config.episodes
            prompts = Prompts(source=given.source, split=given.split, limit=given.limit)
        facts = prompt_facts(
            prompts, self.notes, where, self._check(config), given, not config.labels_given, config.decontaminated_by
        )
        self.notes += lines({where: facts.dropped})
        return facts

    def training(self, config: Config) -> cost.Training:
        """Of the pairs that are to be expected; given answers are candidates, and none is refined."""
        prompts = self.prompts(config)
        if config.episodes.source:
            sampling = config.sampling.model_copy(update={"n": max(2, round(prompts.answers))})
            pairs = config.pairs.model_copy(update={"include": "candidates_only"})
            config = config.model_copy(update={"sampling": sampling, "pairs": pairs})
        return cost.training(config, self.model, prompts.count, self.tokens(config), self.devices)

    def held_out(self, config: Config) -> tuple[int, Work, Work]:
        """Rows, and the work of answering and of scoring them."""
        return self._once(
            ["held out", config.model_dump(mode="json", exclude={"train"})], lambda: self._held_out(config)
        )

    def _held_out(self, config: Config) -> tuple[int, Work, Work]:
        rows, answers, scores = 0, Work(), Work()
        found = held_out_facts(config.evaluation, self.notes, self._check(None))
        self.notes += lines({where: facts.dropped for where, facts in found.items()})
        for facts in found.values():
            judged = config.scoring.judged_by.reads_prompts
            answer, score = answer_work(config, facts.sample, self.encoder, judged=judged)
            rows += facts.count
            answers, scores = answers + answer.times(facts.count), scores + score.times(facts.count)
        return rows, answers, scores

    def compared(self, config: Config) -> tuple[int, Work]:
        """Held-out prompts, and the work of comparing two answers to each."""
        key = ["compared", config.model_dump(mode="json", exclude={"train"})]
        return self._once(key, lambda: self._compared(config))

    def _compared(self, config: Config) -> tuple[int, Work]:
        rows, work = 0, Work()
        for facts in held_out_facts(config.evaluation, [], self._check(None)).values():
            rows += facts.count
            work += compare_work(config, facts.sample, self.encoder).times(facts.count)
        return rows, work

    def benchmark(self, config: Config, name: str) -> tuple[int, Work]:
        """Prompts of a benchmark, and the work of asking each its questions once."""
        section = config.evaluation.benchmarks[name]
        return self._once(["benchmark", section.model_dump(mode="json")], lambda: self._benchmark(config, name))

    def _benchmark(self, config: Config, name: str) -> tuple[int, Work]:
        section = config.evaluation.benchmarks[name]
        prompts = [p["messages"] for p in benchmark_prompts(section, where=f"evaluation.benchmarks.{name}")]
        asked = config.evaluation.model_copy(update={"sampling": section.sampling})
        sample = prompts[:: max(1, len(prompts) // SAMPLED)]
        work, _ = answer_work(config.model_copy(update={"evaluation": asked}), sample, self.encoder, judged=False)
        benchmark = make_benchmark(section)
        play = work.times(benchmark.questions)
        return len(prompts), (play + play_judging(section, play, benchmark.judgements)).times(len(prompts))

    def tokens(self, config: Config) -> float:
        """Mean tokens of a rendered prompt."""
        key = ["tokens", config.model_dump(mode="json", include={"prompts", "episodes"})]
        return self._once(key, lambda: mean_tokens(self.prompts(config).sample, self.encoder))

    def episode(self, config: Config, *, earlier: bool) -> Work:
        sections = {"objectives", "constitution", "prompts", "sampling", "scoring", "refine"}
        key = ["episode", earlier, config.model_dump(mode="json", include=sections)]
        return self._once(
            key,
            lambda: episode_work(
                config, self.prompts(config).sample, self.encoder, context=self.model.context, earlier=earlier
            ),
        )

    def _check(self, config: Config | None) -> PromptCheck | None:
        chat = self.encoder if isinstance(self.encoder, Chat) else None
        return prompt_check(chat, [] if config is None else [config])

    def _once(self, key: list[Any], find: Callable[[], Any]) -> Any:
        text = json.dumps(key, sort_keys=True)
        if text not in self.kept:
            try:
                self.kept[text] = find()
            except ValueError as e:  # a judge's or a refinement's prompt: the prompts themselves were looked at
                raise InputError(f"a prompt of the run cannot be rendered: {e}") from e
        return self.kept[text]
