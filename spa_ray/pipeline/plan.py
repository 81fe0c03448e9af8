"""`spa plan`: what a run would do and cost, from the config, a few of its prompts and the model's headers alone.

Comes in: arm configs. Goes out: a JSON-like plan: every stage once, with requests, tokens, time, GPU-hours and, given a
price, money; and their total. Starts nothing and loads no weights; what could not be looked up is assumed and said so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spa_ray.config.models import Config
from spa_ray.config.section import JudgeSection
from spa_ray.errors import InputError
from spa_ray.generation.judging import judge_labels, slow_labels
from spa_ray.pipeline import plan_cost as cost
from spa_ray.pipeline.merges import tuned
from spa_ray.pipeline.plan_folder import weights_checked
from spa_ray.pipeline.plan_lookup import Lookup
from spa_ray.pipeline.plan_memory import refusal
from spa_ray.pipeline.plan_model import found_folder
from spa_ray.pipeline.plan_tokens import (
    ANSWER_SHARE,
    Work,
    answer_work,
    judging_by_layout,
)
from spa_ray.pipeline.preflight import eval_config
from spa_ray.pipeline.recipe import PlannedStage, has_evaluation, planned_stages
from spa_ray.rollout.chat import Chat
from spa_ray.steering.asking import conditioning
from spa_ray.training.guards import check_lr, check_movement, movement
from spa_ray.training.trainable import check_section

Plan = dict[str, Any]
SAMPLING = ("n", "temperature", "top_p", "min_p", "top_k", "repetition_penalty", "max_tokens", "stop")
SUMMED = ("requests", "prompt_tokens", "prefill_tokens", "generated_tokens", "seconds", "gpu_hours")


def make_plan(arms: dict[str, Config], *, price: float | None = None, folder: Path | None = None) -> Plan:
    """The plan of a run. `price` is of a GPU-hour and stands above `resources.price_per_gpu_hour`; `folder` is where
    the model was fetched to, where it was.

    Raises: InputError where the config, a local model or what is read of a prompt file is wrong.
    """
    model = next(iter(arms.values())).model
    folder = folder or found_folder(model)
    if folder is not None:
        for config in arms.values():
            check_section(folder, config.train)
    with weights_checked(folder, trust_remote_code=model.trust_remote_code) as weights:
        plan = _plan(arms, price, folder)
        notes = weights()
    return {**plan, "notes": [*plan["notes"], *notes]}


def _plan(arms: dict[str, Config], price: float | None, folder: Path | None) -> Plan:
    first = next(iter(arms.values()))
    price = first.resources.price_per_gpu_hour if price is None else price
    look = Lookup(first, folder)
    graph = planned_stages(arms, conditioned=folder is not None and conditioning(folder) is not None)
    stages = _Costs(look, graph).all()
    for stage in stages:
        stage["cost"] = None if price is None else round(stage["gpu_hours"] * price, 2)
    starts = _group_starts(graph, look.devices)
    plan_arms = {name: _arm(name, config, look, stages) for name, config in arms.items()}
    return {
        "arms": plan_arms,
        "model": look.model.to_dict(),
        "gpus": {"engines": look.devices.engines * look.devices.gpus_per_engine,
                 "train": look.devices.workers * look.devices.gpus_per_worker},
        "stages": stages,
        "total": _total(stages, starts, price),
        "price_per_gpu_hour": price,
        "output_gib": _output(look, graph, stages),
        "assumptions": cost.assumptions(first, look.devices, endpoint=any("judge" in stage for stage in stages)),
        "refusal": refusal(tuned(arms), look.model, look.host, gpu=look.devices.gpus_per_worker > 0),
        "notes": list(dict.fromkeys([*look.notes, *(n for arm in plan_arms.values() for n in arm["notes"])])),
    }  # fmt: skip


class _Costs:
    """The cost of every planned stage."""

    def __init__(self, look: Lookup, graph: list[PlannedStage]) -> None:
        self.look, self.graph = look, graph
        self.subjects = len({arm for stage in graph if not stage.iteration for arm in stage.arms[:1]})

    def all(self) -> list[Plan]:
        return [self._stage(stage) for stage in self.graph]

    def _stage(self, stage: PlannedStage) -> Plan:
        compute = {
            "import": self._import, "label": self._label,
            "generate": self._generate, "build": self._build, "train": self._train, "evaluate": self._evaluate,
            "merge": self._merge, "benchmark": self._benchmark, "score": self._score, "pairwise": self._pairwise,
            "rv": self._rv,
        }  # fmt: skip
        rows, work, seconds, gpus = compute[stage.stage.partition(":")[0]](stage)
        judge = cost.judged(_judge_of(stage), work)
        seconds = max(seconds, judge.get("seconds", 0.0))
        return {
            "stage": stage.stage,
            "arms": stage.arms,
            "iteration": stage.iteration,
            "rows": rows,
            **work.rounded(),
            "seconds": round(seconds, 1),
            "gpus": gpus,
            "gpu_hours": round(seconds * gpus / 3600, 3),
            **({"judge": judge} if judge else {}),
        }

    def _rows(self, stage: PlannedStage) -> int:
        return self.look.prompts(stage.config).count

    def _generate(self, stage: PlannedStage) -> tuple[int, Work, float, float]:
        rows, on = self._rows(stage), self.look.devices
        earlier = stage.config.iterations.reuse_refined and stage.iteration > 1
        work = self.look.episode(stage.config, earlier=earlier).times(rows)
        return rows, work, cost.generate_seconds(work, self.look.model, on), on.engines * on.gpus_per_engine

    def _import(self, stage: PlannedStage) -> tuple[int, Work, float, float]:
        return self._rows(stage), Work(), self._rows(stage) / cost.BUILD_ROWS_PER_SECOND, 0.0

    def _label(self, stage: PlannedStage) -> tuple[int, Work, float, float]:
        config, prompts, on = stage.config, self.look.prompts(stage.config), self.look.devices
        judge = config.scoring.judged_by
        _, score = answer_work(config, prompts.sample, self.look.encoder, judged=judge.reads_prompts)
        work = score.times(prompts.count * prompts.answers)
        gpus = on.engines * on.gpus_per_engine if judge.asks_engine or judge.on_gpu else 0.0
        return prompts.count, work, cost.generate_seconds(work, self.look.model, on), gpus

    def _build(self, stage: PlannedStage) -> tuple[int, Work, float, float]:
        return self._rows(stage), Work(), cost.build_seconds(self._rows(stage)), 0.0

    def _train(self, stage: PlannedStage) -> tuple[int, Work, float, float]:
        on, job = self.look.devices, self.look.training(stage.config)
        return job.pairs, Work(), job.seconds, on.workers * on.gpus_per_worker

    def _merge(self, stage: PlannedStage) -> tuple[int, Work, float, float]:
        """All models read, and one written."""
        merge, size = stage.config.merge, cost.model_bytes(stage.config, self.look.model)
        assert merge is not None
        return 0, Work(), (len(merge.of) + 1) * size / cost.WEIGHTS_PER_SECOND, 0.0

    def _evaluate(self, stage: PlannedStage) -> tuple[int, Work, float, float]:
        """One model's part of the pass, or of the two passes, over all models."""
        config = eval_config(stage.config)
        rows, answers, scores = self.look.held_out(config)
        return self._share(rows, [answers, scores], 1 + config.evaluation.judged_by.own_pass)

    def _score(self, stage: PlannedStage) -> tuple[int, Work, float, float]:
        rows, _, scores = self.look.held_out(eval_config(stage.config, stage.judge))
        return self._share(rows, [scores], 1)

    def _rv(self, stage: PlannedStage) -> tuple[int, Work, float, float]:
        config, prompts = eval_config(stage.config), self.look.prompts(stage.config)
        rows, judged = min(config.evaluation.rv or 0, prompts.count), config.scoring.judged_by.reads_prompts
        _, score = answer_work(config, prompts.sample, self.look.encoder, judged=judged)
        return self._share(rows, [score.times(rows * config.sampling.n)], 1)

    def _pairwise(self, stage: PlannedStage) -> tuple[int, Work, float, float]:
        rows, work = self.look.compared(eval_config(stage.config, stage.judge))
        return self._share(rows, [work], 1)

    def _benchmark(self, stage: PlannedStage) -> tuple[int, Work, float, float]:
        rows, work = self.look.benchmark(stage.config, stage.stage.partition(":")[2])
        return self._share(rows, [work], 1)

    def _share(self, rows: int, works: list[Work], passes: int) -> tuple[int, Work, float, float]:
        on, model = self.look.devices, self.look.model
        gpus, size = on.gpus_per_engine, model.parameters
        busy = sum(cost.compute_seconds(work, size, on.rates, gpus=gpus) for work in works) / on.engines
        seconds = passes * cost.pass_seconds(model, on.rates) / self.subjects + busy
        return rows, sum(works, Work()), seconds, on.engines * gpus


def _judge_of(stage: PlannedStage) -> JudgeSection | None:
    name, _, benchmark = stage.stage.partition(":")
    if name == "benchmark":
        return stage.config.evaluation.benchmarks[benchmark].judged_by
    return (eval_config(stage.config, stage.judge) if stage.judge else stage.config).scoring.judged_by


def _group_starts(graph: list[PlannedStage], on: cost.Devices) -> dict[str, float]:
    """Training workers start once an iteration, for all arms together."""
    rounds = len({stage.iteration for stage in graph if stage.stage == "train"})
    seconds = rounds * on.train_rates.group_start
    return {"seconds": seconds, "gpu_hours": seconds * on.workers * on.gpus_per_worker / 3600}


def _total(stages: list[Plan], starts: dict[str, float], price: float | None) -> Plan:
    """Every stage once, whoever shares it, and the starts of the training workers."""
    total: Plan = {key: sum(stage[key] for stage in stages) + starts.get(key, 0) for key in SUMMED}
    total |= {"seconds": round(total["seconds"], 1), "gpu_hours": round(total["gpu_hours"], 3)}
    if judges := [stage["judge"] for stage in stages if "judge" in stage]:
        total["judge"] = {
            key: None if any(judge[key] is None for judge in judges) else sum(judge[key] for judge in judges)
            for key in judges[0]
        }
    return total | {"cost": None if price is None else round(total["gpu_hours"] * price, 2)}


def _arm(name: str, config: Config, look: Lookup, stages: list[Plan]) -> Plan:
    """What is the arm's own: its stages, method, pairs, memory, notes."""
    if config.merge is not None:
        evaluated = ["evaluate"] if has_evaluation(config) else []
        return {"stages": ["merge", *evaluated], "merge": config.merge.model_dump(mode="json"), "notes": []}
    mine = [stage for stage in stages if name in stage["arms"]]
    first = {stage["stage"]: stage for stage in reversed(mine)}
    prompts, train, sampling = look.prompts(config), config.train, config.sampling.model_dump(mode="json")
    job = look.training(config)
    memory = cost.memory(config, look.model, look.devices, prompt_tokens=look.tokens(config))
    size = look.model.parameters
    warnings = [check_lr(train, size), check_movement(train, size, job.steps)]
    answers = ["prompts", "generate"]
    if config.episodes.source:
        answers = ["import", "label"] if config.labels_given else ["import"]
    generate = {key: first[answers[-1]][key] for key in SUMMED[:4]}
    return {
        "stages": [*answers, "build", "train"] + (["evaluate"] if has_evaluation(config) else []),
        "iterations": config.iterations.count,
        "prompts": {
            "source": prompts.source, "count": prompts.count, "tokens": round(look.tokens(config), 1),
            "sampled": len(prompts.sample), "estimated": prompts.estimated,
        },
        "sampling": {key: sampling[key] for key in SAMPLING},
        "generate": {**generate, "requests_per_prompt": generate["requests"] / prompts.count},
        "train": {
            "method": train.method, "beta": train.beta, "gamma": train.gamma, "lr": train.lr, "gap": train.gap,
            "pairs_estimated": job.pairs, "steps_estimated": job.steps,
            "movement": movement(train, size, job.steps),
        },
        "memory_gib": memory,
        "notes": [*cost.does_it_fit(config, memory), *filter(None, warnings), *_on_judging(config, look)],
    }  # fmt: skip


def _on_judging(config: Config, look: Lookup) -> list[str]:
    """A note where judging is slow on this scale. Raises: InputError where this tokenizer cannot judge on it."""
    scoring = config.scoring
    if not isinstance(look.encoder, Chat) or config.episodes.source or not scoring.judged_by.asks_engine:
        return []
    if scoring.compare is not None:  # no scale is asked for
        return []
    chat = look.encoder.with_kwargs(config.scoring.chat_template_kwargs)
    judge_labels(chat, config.scoring)
    notes = [slow_labels(chat, config.scoring), _on_layout(config, look)]
    return [note for note in notes if note is not None]


LESS = 0.9  # of the tokens: what another layout must come to to be worth another judge


def _on_layout(config: Config, look: Lookup) -> str | None:
    """A note where the other layout of the built-in judge prompt computes clearly fewer tokens."""
    if config.scoring.prompt is not None:
        return None
    tokens = judging_by_layout(config, look.prompts(config).sample, look.encoder)
    mine, best = config.scoring.layout, min(tokens, key=lambda layout: tokens[layout])
    if tokens[best] > LESS * tokens[mine]:
        return None
    return (
        f"scoring.layout={best} would compute about {tokens[best]:,.0f} prompt tokens to judge a prompt's answers, "
        f"{mine} {tokens[mine]:,.0f}, if answers have {ANSWER_SHARE:g} of max_tokens; it is another judge"
    )


def _output(look: Lookup, graph: list[PlannedStage], stages: list[Plan]) -> Plan:
    """GiB that the run folder grows by: trained models, which is certain, and the rest, which is estimated."""
    trained = [stage.config for stage in graph if stage.stage in ("train", "merge")]
    models = sum(cost.model_bytes(config, look.model) for config in trained)
    checkpoints = max((cost.checkpoint_bytes(config, look.model) for config in trained), default=0.0)
    written = sum(cost.stage_bytes(stage["rows"], stage["generated_tokens"]) for stage in stages)
    return {"models": round(models / cost.GIB, 3), "rest": round((checkpoints + written) / cost.GIB, 3)}


def check_price(price: float | None) -> float | None:
    """Raises: InputError for a price that is none."""
    if price is not None and not 0 <= price < float("inf"):
        raise InputError(f"--price {price:g}: a GPU-hour costs 0 or more")
    return price
