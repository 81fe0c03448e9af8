"""What each stage reads, as the settings that its hash covers. `resources` and `tracking` never appear here.

Comes in: an arm's config and the hashes of the stage's inputs. Goes out: a stage folder's address.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spa_ray import evaluation, generation, preferences, training
from spa_ray.config.models import TRAIN_BYSTANDERS, Config, Section
from spa_ray.objectives import load_objectives
from spa_ray.runs.hashing import stage_hash

CHAT_KEYS = ("chat_template_kwargs", "date", "think")
Chat = Mapping[str, Any] | None  # `ChatSettings.key` of the run's settings


def _plain(section: Section, *leave_out: str) -> dict[str, Any]:
    return section.model_dump(mode="json", exclude=set(leave_out))


def _objectives(config: Config, names: tuple[str, ...] | None = None) -> list[dict[str, Any]]:
    """The objectives with their wording: a changed rubric is another judge."""
    chosen = config if names is None else config.model_copy(update={"objectives": names})
    return [vars(o) if not hasattr(o, "model_dump") else o.model_dump(mode="json") for o in load_objectives(chosen)]


def _engine(config: Config) -> dict[str, Any]:
    """What of the model section changes answers (its path does not: the files' hash stands for it)."""
    return _plain(config.model, "path", "revision", "tensor_parallel_size", *CHAT_KEYS)


def _chat(config: Config, chat: Mapping[str, Any] | None) -> dict[str, Any]:
    """How prompts are rendered: `ChatSettings.key`, or the config's own keys where there is none."""
    return config.model.model_dump(mode="json", include=set(CHAT_KEYS)) if chat is None else dict(chat)


def generate_hash(
    config: Config, *, iteration: int, prompts: str, model: str, earlier: str | None, chat: Chat = None
) -> str:
    """`earlier` is the last iteration's generate hash where its refined answers are reused."""
    settings = {
        "chat": _chat(config, chat),
        "seed": config.seed,
        "iteration": iteration,
        "objectives": _objectives(config),
        "engine": _engine(config),
        **{name: _plain(getattr(config, name)) for name in ("sampling", "scoring", "refine")},
    }
    return stage_hash("generate", generation.STAGE_VERSION, settings, [prompts, model, *([earlier] if earlier else [])])


def build_hash(config: Config, *, episodes: str, frozen_tau: float | None) -> str:
    settings = {
        "objectives": list(config.objectives),
        "denoise": _plain(config.denoise),
        "pairs": _plain(config.pairs),
        "frozen_tau": frozen_tau,
    }
    return stage_hash("build", preferences.STAGE_VERSION, settings, [episodes])


def train_hash(config: Config, *, pairs: str, model: str, chat: Chat = None) -> str:
    train = _plain(config.train.resolved(), *TRAIN_BYSTANDERS)
    settings = {"seed": config.seed, "train": train, "chat": _chat(config, chat)}
    return stage_hash("train", training.STAGE_VERSION, settings, [pairs, model])


def evaluate_hash(config: Config, *, prompts: str, model: str, judge: str, chat: Chat = None) -> str:
    settings = {
        "chat": _chat(config, chat),
        "seed": config.seed,
        "objectives": _objectives(config, config.evaluation.objectives),
        "engine": _engine(config),
        "scoring": _plain(config.scoring),
        "sampling": _plain(config.evaluation.sampling),
        "judge": config.evaluation.judge if ":" in config.evaluation.judge else None,
    }
    return stage_hash("evaluate", evaluation.STAGE_VERSION, settings, [prompts, model, judge])
