"""Other tools' results on the same items: lm-evaluation-harness, in the environment that `scripts/interop.sh` makes."""

from __future__ import annotations

import asyncio
import csv
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from spa_ray.config.models import Config, Model
from spa_ray.engine import create_engine
from spa_ray.generation.benchmark import Plays, benchmark_prompts, make_benchmark
from spa_ray.rollout.chat import Chat
from tests.scripted import scripted_config

ROOT = Path(__file__).parents[1]
HARNESS = ROOT / ".cache" / "interop" / "bin" / "python"
SHARED = ROOT.parent / "shared" / "data"
ITEMS = 50

pytestmark = [
    pytest.mark.engine,
    pytest.mark.alone,
    pytest.mark.long,
    pytest.mark.skipif(not HARNESS.exists(), reason="no .cache/interop: `make interop` installs the harness"),
]


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_model` with room for examples, whose likeliest next token is always a letter, now this and now that one."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("interop") / "model"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    weights = load_file(folder / "model.safetensors")
    letters = PreTrainedTokenizerFast.from_pretrained(folder).convert_tokens_to_ids(list("ABCD"))
    drawn = torch.randn(len(letters), weights["lm_head.weight"].shape[1], generator=torch.Generator().manual_seed(3))
    weights["lm_head.weight"] *= 0.1
    weights["lm_head.weight"][letters] = drawn - drawn.mean(0)  # one of them is above 0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Any]:
    engine = create_engine(Model(path=str(model), dtype="float32", max_model_len=4096), model)
    yield engine
    engine.shutdown()


def harness(model: Path, task: str, data: Path, **changes: Any) -> list[dict[str, Any]]:
    """What the harness says of every row of the files in `data`."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(data / "home")}
    command = [str(HARNESS), str(Path(__file__).with_name("interop_harness.py")), str(model), task, str(data)]
    done = subprocess.run(
        [*command, json.dumps(changes)], capture_output=True, text=True, check=False, env=environment, cwd=data
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def ours(engine: Any, model: Path, name: str, **section: Any) -> tuple[list[dict[str, Any]], Mapping[str, Any]]:
    config: Config = scripted_config({}, evaluation={"benchmarks": {name: section}})
    chosen = config.evaluation.benchmarks[name]
    plays = Plays(chosen, engine, Chat(engine.tokenizer, model=str(model)), seed=0)

    async def all_rows() -> list[dict[str, Any]]:
        return await asyncio.gather(*(plays.run(prompt) for prompt in benchmark_prompts(chosen, where=name)))

    rows = []
    for row in asyncio.run(all_rows()):
        assert row["error"] is None, row["error"]
        meta = json.loads(row["meta"])
        rows.append({**row, "result": meta.pop("result"), "meta": meta})
    return rows, make_benchmark(chosen).metrics(rows)


def write_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def as_hub(targets: Mapping[str, int]) -> dict[str, list[Any]]:
    return {"choices": list(targets), "labels": list(targets.values())}


@pytest.fixture(scope="module")
def truthfulqa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Published questions where they are at hand, else ones of the same form."""
    file = SHARED / "truthfulqa" / "mc_task.json"
    if file.is_file():
        rows = json.loads(file.read_text())[:ITEMS]
    else:
        rows = []
        for k in range(ITEMS):
            one, other = f"It is {k}.", f"There are {k + 7} of them"
            sets = {"mc1_targets": {one: 1, other: 0}, "mc2_targets": {one: 1, "Nobody knows": 1, other: 0}}
            rows.append({"question": f"How many stones has house {k}?", **sets})
    folder = tmp_path_factory.mktemp("truthfulqa")
    (folder / "mc_task.json").write_text(json.dumps(rows))
    sets = ("mc1_targets", "mc2_targets")
    write_rows(
        folder / "hub" / "validation.jsonl", [{**row, **{name: as_hub(row[name]) for name in sets}} for row in rows]
    )
    return folder


@pytest.fixture(scope="module")
def mmlu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One subject, with the examples and the questions also as the hub has them."""
    folder = tmp_path_factory.mktemp("mmlu")
    for part, count in (("dev", 5), ("test", ITEMS)):
        file = SHARED / "mmlu" / part / f"astronomy_{part}.csv"
        if file.is_file():
            with file.open(newline="", encoding="utf-8") as lines:
                rows = list(csv.reader(lines))[:count]
        else:
            rows = [
                [f" How far is star {k}?", "near", "far", str(k), "nobody knows", "ABCD"[k % 4]] for k in range(count)
            ]
        (folder / "published" / part).mkdir(parents=True)
        with (folder / "published" / part / f"astronomy_{part}.csv").open("w", newline="", encoding="utf-8") as lines:
            csv.writer(lines).writerows(rows)
        asked = [{"question": q, "choices": options, "answer": "ABCD".index(right)} for q, *options, right in rows]
        write_rows(folder / "hub" / f"{part}.jsonl", asked)
    return folder


@pytest.mark.parametrize("chat", [False, True])
def test_mc1_and_mc2_are_the_harness(engine: Any, model: Path, truthfulqa: Path, chat: bool) -> None:
    rows, measures = ours(engine, model, "truthfulqa", path=str(truthfulqa / "mc_task.json"), chat=chat)
    assert len(rows) == ITEMS
    for name in ("mc1", "mc2"):
        theirs = harness(model, f"truthfulqa/truthfulqa_{name}", truthfulqa / "hub", chat=chat)
        for row, found in zip(rows, theirs, strict=True):
            of_texts = [row["result"]["logprobs"][text] for text, _ in row["meta"][name]]
            assert of_texts == pytest.approx([value for value, _ in found["filtered"]], abs=1e-3)
        assert measures[name]["mean"] == pytest.approx(sum(found["acc"] for found in theirs) / ITEMS, abs=1e-4)
        assert 0 < measures[name]["mean"] < 1


@pytest.mark.parametrize("chat", [False, True])
def test_mmlu_is_the_harness(engine: Any, model: Path, mmlu: Path, chat: bool) -> None:
    section = {"path": str(mmlu / "published"), "chat": chat, "sampling": {"max_tokens": 1}}
    rows, measures = ours(engine, model, "mmlu", **section)
    generation = {"until": ["</s>", "\n"], "max_gen_toks": 1}
    theirs = harness(
        model, "mmlu/generative/mmlu_astronomy", mmlu / "hub", chat=chat, num_fewshot=5, generation_kwargs=generation
    )
    assert [row["responses"][0]["text"] for row in rows] == [found["filtered"][0] for found in theirs]
    assert [row["result"]["exact"] for row in rows] == [found["exact_match"] == 1 for found in theirs]
    assert len(rows) == ITEMS
    assert 0 < measures["exact_match"]["mean"] == measures["accuracy"]["mean"] < 1
    assert len({row["responses"][0]["text"] for row in rows}) > 1
