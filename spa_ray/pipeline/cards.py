"""Cards, as the Hugging Face hub reads them: README.md in a run's model folders and beside its pairs.

A card says what was made of what: base model, method, data, settings, measures with intervals where they are known,
licences, the command and the versions. Secrets are left out.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spa_ray.config.models import Config
from spa_ray.config.plugs import SOURCES, load_plug
from spa_ray.data.hub import address_of
from spa_ray.logs import redact_command, redact_tree
from spa_ray.pipeline.manifest import versions
from spa_ray.pipeline.result_print import cell
from spa_ray.storage.files import AnyPath, is_file, write_text

CARD = "README.md"
TAGS = ["spa_ray", "alignment", "preference-optimization"]
OWNER_AND_NAME = re.compile(r"(?:hf://(?:datasets/)?)?([\w.-]+/[\w.-]+)(?:[@/].*)?")
GENERATED = ("sampling", "scoring", "refine")  # sections that decide what came out, where answers were generated
COLUMNS = """\
| column | |
| --- | --- |
| `prompt`, `chosen`, `rejected` | messages, as TRL reads a conversational preference data set |
| `chosen_ids`, `rejected_ids` | the generated token ids |
| `chosen_scores`, `rejected_scores` | by the objectives, highest priority first: {objectives} |
| `margin`, `gap` | sum of the absolute differences of the scores; absolute difference of their sums |
| `decided_by`, `kind` | the first objective that differs; whether the chosen answer is the refined one |"""
Measured = Mapping[str, Mapping[str, Any]]  # by family: `means`


def write_card(folder: AnyPath, text: str) -> None:
    """A card that says the same stays as it is."""
    if not is_file(folder / CARD) or (folder / CARD).read_text(encoding="utf-8") != text:
        write_text(folder / CARD, text)


@dataclass(frozen=True)
class Trained:
    """What a model was made from: the base model's folder and the funnel of its pairs, null for pairs of the user's
    own. `found` and `before` have `metrics` and `benchmarks`, its own and the base model's, where they are known."""

    base: AnyPath
    funnel: Mapping[str, Any] | None = None
    found: Mapping[str, Measured] | None = None
    before: Mapping[str, Measured] | None = None


def model_card(config: Config, name: str, model: Trained) -> str:
    """The card of one arm's model."""
    from huggingface_hub import ModelCardData

    found, before, funnel = model.found or {}, model.before or {}, model.funnel
    metrics, benchmarks = found.get("metrics", {}), found.get("benchmarks", {})
    results = [r for family, found in metrics.items() for r in _results(family, found["means"])]
    results += [r for bench, found in benchmarks.items() for r in _results(bench, found["measures"])]
    licence, base_id, source = _licence(model.base), hub_name(config.model.path), _data_id(config)
    data = ModelCardData(
        model_name=name,
        base_model=base_id,
        license=licence,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[*TAGS, "merge" if config.merge else config.train.method],
        datasets=[source] if source else None,
        eval_results=results or None,
    )
    made = "pairs of the user's own" if funnel is None else _made_of(config, funnel)
    how = f"Trained with spa_ray by the method `{config.train.method}`."
    if config.merge is not None:
        shares = ", ".join(f"{share:g} of `{arm}`" for arm, share in config.merge.shares.items())
        how, made = f"Merged with spa_ray: {shares} ({config.merge.what}).", "that of the merged models"
    parts = [
        f"# {name}",
        how,
        _table({"base model": f"`{base_id or config.model.path}`", "preference data": made,
                "objectives": ", ".join(config.objectives),
                "licence": licence or "that of the base model, whose folder names none"}),
        *_measures("Held-out prompts", metrics, before.get("metrics", {}), "means"),
        *_measures("Benchmark", benchmarks, before.get("benchmarks", {}), "measures"),
        "Scores are a judge's, not people's. They show a direction on these prompts and no guarantee on others.",
        *_origin(config, "denoise", "pairs", "train"),
    ]  # fmt: skip
    return _joined(data, parts)


def pairs_card(config: Config, name: str, funnel: Mapping[str, Any]) -> str:
    """The card beside a `pairs/`."""
    dropped = {f"dropped: {reason}": count for reason, count in funnel["dropped"].items() if count}
    parts = [
        f"# {name}",
        f"Preference pairs by spa_ray: {_made_of(config, funnel)}",
        COLUMNS.format(objectives=", ".join(config.objectives)),
        "## Funnel",
        _table({"prompts": funnel["prompts"], **dropped, "kept": funnel["kept"], "pairs": funnel["pairs"]}),
        "Prompts and answers can be harmful: sets of this kind are collected to be refused. The prompts' licence is "
        f"their authors'{_page(config)}, the answers' follows from the model that wrote them.",
        *_origin(config, "denoise", "pairs"),
    ]
    return _joined(_pairs_data("pairs/*.parquet", name=name, source=_data_id(config)), parts)


def pairs_card_for(pairs: AnyPath, data_file: str) -> str:
    """The card of exported pairs: that of the build, about another file. A bare one where the build has none."""
    from huggingface_hub import DatasetCard

    beside = pairs.parent / CARD
    if not is_file(beside):
        return _joined(_pairs_data(data_file), ["# Preference pairs by spa_ray"])
    card = DatasetCard(beside.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    card.data["configs"] = _files(data_file)
    return str(card)


def hub_name(source: str | None) -> str | None:
    """`owner/name` where a source or a model is on a hub; null for what is here."""
    if not source or os.path.exists(os.path.expanduser(source)):
        return None
    found = OWNER_AND_NAME.fullmatch(source)
    return found[1] if found else None


def _data_id(config: Config) -> str | None:
    source = _source(config) or ""
    named = load_plug(SOURCES, source, where="prompts.source") if source in SOURCES else None
    address = named.hub if named else address_of(source) if source else None
    return hub_name(address)


def _source(config: Config) -> str | None:
    return config.episodes.source or config.prompts.source


def _page(config: Config) -> str:
    source = _source(config) or ""
    return f" ({load_plug(SOURCES, source, where='prompts.source').page})" if source in SOURCES else ""


def _licence(base: AnyPath) -> str | None:
    """What the base model's own card says."""
    from huggingface_hub import ModelCard

    if not is_file(base / CARD):
        return None
    found = (
        ModelCard((base / CARD).read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict().get("license")
    )
    return found if isinstance(found, str) else None


def _made_of(config: Config, funnel: Mapping[str, Any]) -> str:
    source = _source(config)
    made = f"{funnel['pairs']:,} pairs of {funnel['prompts']:,} prompts"
    if source is None:
        return f"{made}."
    judge = f"scored by a judge of kind `{config.scoring.judged_by.kind}`"
    given = config.episodes.source and not config.labels_given
    return f"{made} of `{source}`, {'with scores that were given' if given else judge}."


def _results(of: str, measures: Mapping[str, Any]) -> list[Any]:
    from huggingface_hub import EvalResult

    values = {name: found["mean"] if isinstance(found, Mapping) else found for name, found in measures.items()}
    return [
        EvalResult(task_type="text-generation", dataset_type=of, dataset_name=of, metric_type=name, metric_value=value)
        for name, value in values.items()
        if isinstance(value, int | float)
    ]


def _measures(title: str, families: Measured, before: Measured, key: str) -> list[str]:
    """A table of a model's measures for each family or benchmark, with the base model's where they are there."""
    parts = []
    for family, found in families.items():
        old = before.get(family, {}).get(key, {})
        rows = [f"| {name} | {cell(value)} | {cell(old.get(name))} |" for name, value in found[key].items()]
        head = [f"## {title}: {family}", "", "| | this model | before training |", "| --- | --- | --- |"]
        parts.append("\n".join([*head, *rows]))
    return parts


def _origin(config: Config, *sections: str) -> list[str]:
    import yaml

    if _source(config) and not config.episodes.source:
        sections = (*GENERATED, *sections)
    shown = redact_tree({"seed": config.seed, **config.model_dump(mode="json", include=set(sections))})
    settings = yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)
    command = " ".join(["spa", *redact_command(sys.argv)[1:]])
    lines = [f"{name} {version}" for name, version in versions().items()]
    return ["## Settings", f"```yaml\n{settings}```", "## Command", f"```\n{command}\n```", "## Versions",
            ", ".join(lines)]  # fmt: skip


def _table(values: Mapping[str, Any]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in values.items())])


def _files(data_file: str) -> list[dict[str, Any]]:
    return [{"config_name": "default", "data_files": [{"split": "train", "path": data_file}]}]


def _pairs_data(data_file: str, *, name: str | None = None, source: str | None = None) -> Any:
    from huggingface_hub import DatasetCardData

    return DatasetCardData(
        pretty_name=name, tags=[*TAGS, "trl"], source_datasets=[source] if source else None, configs=_files(data_file)
    )


def _joined(data: Any, parts: Sequence[str]) -> str:
    return "\n\n".join([f"---\n{data.to_yaml()}\n---", *parts]) + "\n"
