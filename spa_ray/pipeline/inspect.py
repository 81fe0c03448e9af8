"""`spa inspect`: one prompt's whole story in a run: candidates, scores, filters, pairs, weights.

Comes in: a run folder and a prompt_id (or its beginning). Goes out: a JSON-like story and its printed form.
Reads finished stages only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pds
from pydantic import ValidationError

from spa_ray.config.models import Config
from spa_ray.data.episodes import EpisodeFolder
from spa_ray.data.schemas import RELIABILITY, attributes_of
from spa_ray.errors import InputError
from spa_ray.logs import printable
from spa_ray.preferences import build_pairs, denoise
from spa_ray.storage.files import AnyPath, as_path, is_file, kind, parquet_dataset, read_json
from spa_ray.storage.folder import EVALUATION, RunFolder, open_run

TOLD = ("sensed", "asked")  # columns of episodes


def story(run_dir: AnyPath, prompt_id: str) -> dict[str, Any]:
    """The prompt's story, arm by arm and iteration by iteration.

    Raises: InputError when the run has no such prompt, or the beginning fits several.
    """
    run = open_run(run_dir)
    configs = run_configs(run)
    told: dict[str, list[dict[str, Any]]] = {}
    for file in run.arm_files():
        record = read_json(file)
        chapter = _chapter(record, configs[file.parent.name], prompt_id)
        if chapter:
            told.setdefault(file.parent.name, []).append({"iteration": int(file.stem.removeprefix("iter_")), **chapter})
    told = told or _answers(run, configs, prompt_id)
    if not told:
        raise InputError(f"{run_dir}: no prompt with the id {prompt_id!r} in its episodes; ids stand in episodes/")
    return {"run_dir": str(run.path), "prompt_id": prompt_id, "arms": told}


def run_configs(run: RunFolder) -> dict[str, Config]:
    """The resolved config of every arm of a run."""
    import yaml

    try:
        raw = yaml.safe_load((run.path / "config.yaml").read_text(encoding="utf-8"))
        return {name: Config.model_validate(arm) for name, arm in raw["arms"].items()}
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError, ValidationError) as e:
        raise InputError(f"{run.path}: not a run folder: its config.yaml was not written by a run") from e


def _chapter(record: dict[str, Any], config: Config, prompt_id: str) -> dict[str, Any] | None:
    row = _one_row(as_path(record["episodes"]), prompt_id) if "episodes" in record else None  # a merge has none
    if row is None:
        return None
    chapter = _episode(row, list(config.objectives))
    if "funnel" in record:
        denoised = denoise(row, config, tau=record["funnel"]["tau"])
        pairs = build_pairs(denoised, config)
        chapter["filters"] = denoised.select(["det", "kept", "drop_reason"]).to_pylist()[0]
        chapter["filters"]["tau"] = record["funnel"]["tau"]
        keys = ["pair_id", "chosen_index", "rejected_index", "margin", "gap", "decided_by", "kind"]
        weights = weights_at_mean(pairs, parquet_dataset(as_path(record["pairs"])).to_table(), config)
        chapter["pairs"] = [
            {**row, "weight": weight} for row, weight in zip(pairs.select(keys).to_pylist(), weights, strict=True)
        ]
        chapter["train"] = {"gap": config.train.gap, "alpha": config.train.alpha}
    return chapter


def _episode(row: pa.Table, objectives: list[str]) -> dict[str, Any]:
    """The row, and by name what its model sensed and was asked for, where its prompts say scores."""
    (episode,) = row.to_pylist()
    names = attributes_of(row.schema) or []
    steered = {what: dict(zip(names, episode[what], strict=True)) for what in TOLD if episode.get(what)}
    return {"episode": episode, "objectives": objectives, **({"steered": steered} if steered else {})}


def weights_at_mean(pairs: pa.Table, all_pairs: pa.Table, config: Config) -> list[float]:
    """(gap / mean gap)**α of each pair, with the mean over all pairs of the arm.

    Training takes the mean over the pair's own optimizer step, so its weight there differs a little.
    """
    mean = float(np.mean(gaps(all_pairs, config)))
    mine = gaps(pairs, config)
    return [1.0] * len(mine) if mean == 0 else [float(w) for w in (mine / mean) ** config.train.alpha]


def gaps(pairs: pa.Table, config: Config) -> np.ndarray:
    """(n,) what a pair is weighed by: `train.gap`, and its reliability with `train.uncertainty`."""
    gap = config.train.gap
    reliability = pairs[RELIABILITY].to_numpy() if config.train.uncertainty == "draws" else 1.0
    if gap == "primary":
        first = [pc.list_element(pairs[side], 0).to_numpy() for side in ("chosen_scores", "rejected_scores")]
        return np.abs(first[0] - first[1]) * reliability
    return pairs["gap" if gap == "abs_sum" else "margin"].to_numpy() * reliability


def _one_row(episodes: AnyPath, prompt_id: str) -> pa.Table | None:
    data = EpisodeFolder(episodes)
    ids = data.table(["prompt_id"])["prompt_id"]
    fits = pc.unique(ids.filter(pc.starts_with(ids, prompt_id))).to_pylist()
    if len(fits) > 1 and prompt_id not in fits:
        raise InputError(f"{prompt_id!r} is the beginning of {len(fits)} ids, for example {', '.join(fits[:3])}")
    if not fits:
        return None
    wanted = prompt_id if prompt_id in fits else fits[0]
    return data.table(where=pds.field("prompt_id") == wanted)


def _answers(run: RunFolder, configs: Mapping[str, Config], prompt_id: str) -> dict[str, list[dict[str, Any]]]:
    """Of a held-out prompt: every model's answer, as a chapter of iteration 0."""
    file = run.path / EVALUATION
    answers = read_json(file)["answers"] if is_file(file) else {}
    first = next(iter(configs.values()))
    objectives = list(first.evaluation.objectives or first.objectives)
    found = {arm: _one_row(as_path(at), prompt_id) for arm, at in answers.items() if kind(as_path(at)) is not None}
    return {arm: [{"iteration": 0, **_episode(row, objectives)}] for arm, row in found.items() if row is not None}


def print_story(told: dict[str, Any]) -> None:
    """The story as text: each episode once, under the names of the arms that share it, then what each made of it."""
    from rich.console import Console
    from rich.text import Text

    console = Console(markup=False, highlight=False)  # what models wrote is text, never a style
    for shared in shared_chapters(told["arms"], ("episode",)):
        chapter = shared[0][1]
        console.rule(Text(printable(f"{_arms(shared)}: {chapter['episode']['prompt_id']}")))
        _print_episode(console, chapter)
        by_arm: dict[str, list[dict[str, Any]]] = {}
        for arm, one in shared:
            by_arm.setdefault(arm, []).append(one)
        outcomes = shared_chapters(by_arm, ("filters", "pairs", "train"))
        for outcome in outcomes:
            if len(outcomes) > 1:
                console.print(Text(printable(f"{_arms(outcome)}:"), style="bold"))
            if "filters" in outcome[0][1]:
                _print_filters(console, outcome[0][1])


Told = list[tuple[str, dict[str, Any]]]  # arm and chapter


def shared_chapters(arms: Mapping[str, list[dict[str, Any]]], keys: Sequence[str]) -> list[Told]:
    """The arms' chapters in groups that are equal in these keys, in the order of their first arms."""
    groups: dict[str, Told] = {}
    for arm, chapters in arms.items():
        for chapter in chapters:
            same = json.dumps([chapter.get(key) for key in keys], sort_keys=True, default=str)
            groups.setdefault(same, []).append((arm, chapter))
    return list(groups.values())


def _arms(shared: Told) -> str:
    """«arms sft, spa, iteration 1»."""
    names = list(dict.fromkeys(arm for arm, _ in shared))
    numbers = sorted({chapter["iteration"] for _, chapter in shared} - {0})
    arms = f"arm{'s' if len(names) > 1 else ''} {', '.join(names)}"
    if not numbers:
        return f"{arms}, held out"
    return f"{arms}, iteration{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _print_episode(console: Any, chapter: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    episode, names = chapter["episode"], chapter["objectives"]
    for message in episode["messages"]:
        console.print(Text.assemble((message["role"], "bold"), f": {printable(message['content'])}"))
    if episode["error"]:
        console.print(f"error: {printable(episode['error'])}")
    for what, scores in chapter.get("steered", {}).items():
        console.print(f"{what}: {', '.join(f'{name} {score:.2f}' for name, score in scores.items())}")
    if episode.get("floored"):
        console.print(f"raised by steer.floors: {', '.join(episode['floored'])}")
    table = Table("#", "kind", *names, "status", "answer")
    for response in episode["responses"] or []:
        scores = ["–" if s is None else f"{s:g}" for s in response["scores"]]
        status = printable(", ".join(sorted(set(response["score_status"]))))
        table.add_row(str(response["index"]), response["kind"], *scores, status, printable(response["text"]))
    console.print(table)


def _print_filters(console: Any, chapter: dict[str, Any]) -> None:
    from rich.table import Table

    filters = chapter["filters"]
    verdict = "kept" if filters["kept"] else f"dropped: {filters['drop_reason']}"
    console.print(f"det Σ {filters['det']}, τ {filters['tau']}: {verdict}")
    if chapter["pairs"]:
        table = Table("pair", "kind", "decided by", "margin (Eq. 2)", "gap (Eq. 3)", "weight")
        for pair in chapter["pairs"]:
            indices = f"{pair['chosen_index']} ≻ {pair['rejected_index']}"
            numbers = [f"{pair['margin']:g}", f"{pair['gap']:g}", f"{pair['weight']:.2f}"]
            table.add_row(indices, pair["kind"], pair["decided_by"], *numbers)
        console.print(table)
        train = chapter["train"]
        console.print(
            f"weight: ({train['gap']} gap / its mean over all pairs) ** {train['alpha']:g}; a step uses its own mean"
        )
