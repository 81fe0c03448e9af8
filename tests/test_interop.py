"""Other tools' results on the same items: lm-evaluation-harness on plain transformers, in the environment that
`scripts/interop.sh` makes, beside ours on vLLM; a real instruct model of 135 M parameters in float32."""

from __future__ import annotations

import asyncio
import csv
import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from spa_ray.config.models import Config, Model
from spa_ray.engine import create_engine
from spa_ray.evaluation.benchmarks.mmlu import INTRODUCTION
from spa_ray.evaluation.benchmarks.truthfulqa import mc2, of_answers
from spa_ray.generation.benchmark import Plays, benchmark_prompts, make_benchmark
from spa_ray.rollout.chat import Chat
from tests.scripted import scripted_config

ROOT = Path(__file__).parents[1]
HARNESS = ROOT / ".cache" / "interop" / "bin" / "python"
MODEL = ROOT / ".cache" / "real" / "smollm2-135m"
SHARED = ROOT.parent / "shared" / "data"
ITEMS = 50
OPTIONS = "\n".join(f"{name}. {{{{choices[{k}]}}}}" for k, name in enumerate("ABCD"))
QUESTION = "{{question.strip()}}\n" + OPTIONS + "\nAnswer:"  # as `mmlu/generative` has it

pytestmark = [
    pytest.mark.engine,
    pytest.mark.alone,
    pytest.mark.long,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not (HARNESS.exists() and MODEL.exists()), reason="`make interop` fetches harness and model"),
]


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    settings = {"max_num_batched_tokens": 2048, "max_num_seqs": 16}  # for the logits of whole prompts
    engine = create_engine(Model(path=str(MODEL), dtype="float32", max_model_len=2048, engine_kwargs=settings), MODEL)
    yield engine
    engine.shutdown()


def harness(task: str, data: Path, **changes: Any) -> list[dict[str, Any]]:
    """What the harness says of every row of the files in `data`."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(data / "home")}
    command = [str(HARNESS), str(Path(__file__).with_name("interop_harness.py")), str(MODEL), task, str(data)]
    done = subprocess.run(
        [*command, json.dumps(changes)], capture_output=True, text=True, check=False, env=environment, cwd=data
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def ours(engine: Any, name: str, **section: Any) -> tuple[list[dict[str, Any]], Mapping[str, Any]]:
    config: Config = scripted_config({}, evaluation={"benchmarks": {name: section}})
    chosen = config.evaluation.benchmarks[name]
    plays = Plays(chosen, engine, Chat(engine.tokenizer, model=str(MODEL)), seed=0)

    async def all_rows() -> list[dict[str, Any]]:
        return await asyncio.gather(*(plays.run(prompt) for prompt in benchmark_prompts(chosen, where=name)))

    rows = []
    for row in asyncio.run(all_rows()):
        assert row["error"] is None, row["error"]
        meta = json.loads(row["meta"])
        rows.append({**row, "result": meta.pop("result"), "meta": meta})
    return rows, make_benchmark(chosen).metrics(rows)


def asked(engine: Any, row: Mapping[str, Any], *, chat: bool | str) -> str:
    """The text that our model was given."""
    if not chat:
        return row["messages"][0]["content"]
    return engine.tokenizer.apply_chat_template(row["messages"], tokenize=False, add_generation_prompt=True)


def write_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


# --- TruthfulQA -----------------------------------------------------------------------------------------------------


def truthfulqa(folder: Path, items: int) -> Path:
    """Published questions where they are available, else ones of the same form; also as the hub has them."""
    file = SHARED / "truthfulqa" / "mc_task.json"
    if file.is_file():
        rows = json.loads(file.read_text())[:items]
    else:
        rows = []
        for k in range(items):
            one, other = f"It is {k}.", f"There are {k + 7} of them"
            sets = {"mc1_targets": {one: 1, other: 0}, "mc2_targets": {one: 1, "Nobody knows": 1, other: 0}}
            rows.append({"question": f"How many stones has house {k}?", **sets})
    (folder / "mc_task.json").write_text(json.dumps(rows))
    for row in rows:
        for name in ("mc1_targets", "mc2_targets"):
            row[name] = {"choices": list(row[name]), "labels": list(row[name].values())}
    write_rows(folder / "hub" / "validation.jsonl", rows)
    return folder


@pytest.mark.parametrize(("chat", "items"), [(False, ITEMS), (True, 10)])
def test_mc1_and_mc2_are_the_harness(engine: Any, tmp_path: Path, chat: bool, items: int) -> None:
    data = truthfulqa(tmp_path, items)
    rows, measures = ours(engine, "truthfulqa", path=str(data / "mc_task.json"), chat=chat)
    assert len(rows) == items
    for name in ("mc1", "mc2"):
        theirs = harness(f"truthfulqa/truthfulqa_{name}", data / "hub", chat=chat)
        for row, found in zip(rows, theirs, strict=True):
            assert asked(engine, row, chat=chat) == found["prompt"]
            logs, labels = of_answers(row["meta"][name], row["result"]["logprobs"])
            others = [value for value, _ in found["filtered"]]
            assert logs == pytest.approx(others, abs=5e-3, rel=1e-4)
            if name == "mc1":
                assert logs.index(max(logs)) == others.index(max(others))
            else:
                assert mc2(logs, labels) == pytest.approx(found["acc"], abs=1e-3)
        assert measures[name]["mean"] == pytest.approx(sum(found["acc"] for found in theirs) / items, abs=1e-3)
        assert 0 < measures[name]["mean"] < 1


# --- MMLU -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mmlu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One subject, with the examples and the questions also as the hub has them."""
    folder = tmp_path_factory.mktemp("mmlu")
    for part, count in (("dev", 5), ("test", ITEMS)):
        file = SHARED / "mmlu" / part / f"abstract_algebra_{part}.csv"
        if file.is_file():
            with file.open(newline="", encoding="utf-8") as lines:
                rows = list(csv.reader(lines))[:count]
        else:
            rows = [
                [f" How far is star {k}?", "near", "far", str(k), "nobody knows", "ABCD"[k % 4]] for k in range(count)
            ]
        (folder / "published" / part).mkdir(parents=True)
        with (folder / "published" / part / f"abstract_algebra_{part}.csv").open(
            "w", newline="", encoding="utf-8"
        ) as lines:
            csv.writer(lines).writerows(rows)
        questions = [{"question": q, "choices": options, "answer": "ABCD".index(right)} for q, *options, right in rows]
        write_rows(folder / "hub" / f"{part}.jsonl", questions)
    return folder


@pytest.mark.parametrize("chat", [False, "turns", True])
def test_the_letters_of_mmlu_are_the_harness(engine: Any, mmlu: Path, chat: bool | str) -> None:
    """Its chat form, with the introduction as system message and examples as turns, is `turns`. Ours by default, all in
    one user message, it has no name for: there its own is changed to ask the same."""
    section = {"path": str(mmlu / "published"), "chat": chat, "sampling": {"max_tokens": 8}}
    rows, measures = ours(engine, "mmlu", **section)
    changes: dict[str, Any] = {"chat": bool(chat), "num_fewshot": 5}
    if chat is True:
        examples = rows[0]["messages"][0]["content"].rpartition("\n\n")[0] + "\n\n"
        assert examples.startswith(INTRODUCTION.format(subject="abstract algebra"))
        changes |= {"num_fewshot": 0, "description": ""}
        changes["doc_to_text"] = "{% raw %}" + examples + "{% endraw %}" + QUESTION
    theirs = harness(
        "mmlu/generative/mmlu_abstract_algebra",
        mmlu / "hub",
        generation_kwargs={"until": ["</s>", "\n"], "max_gen_toks": 8},
        **changes,
    )
    assert [asked(engine, row, chat=chat) for row in rows] == [found["prompt"] for found in theirs]
    said = [row["responses"][0]["text"].partition("\n")[0].strip() for row in rows]
    assert said == [found["filtered"][0] for found in theirs]
    assert [row["result"]["exact"] for row in rows] == [found["exact_match"] == 1 for found in theirs]
    assert len(rows) == ITEMS
    assert 0 < measures["exact_match"]["mean"] < 1
    if not chat:  # asked by its chat template, a model of this size may say the same letter to everything
        assert len(set(said)) > 1
