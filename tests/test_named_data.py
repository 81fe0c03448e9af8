"""Public data sets by name: their real files where those are here, else a few rows of the true schema."""

from __future__ import annotations

import json
import random
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from spa_ray.config import arm_configs, load_config
from spa_ray.config.models import evaluation_scoring
from spa_ray.config.plugs import BENCHMARKS, SOURCES, load_plug
from spa_ray.config.prompts import Prompts
from spa_ray.data.prompts import PromptCounts, read_prompts
from spa_ray.data.readers import source_kind
from spa_ray.errors import InputError
from tests.fake_hub import Hub
from tests.test_data_hub import ask

ROOT = Path(__file__).parents[1]
OURS = Path(__file__).parent / "data" / "named"  # rows of the true schema, written for these tests
SHARED = ROOT.parent / "shared" / "data"


def prompts(source: str, path: Path | None = None, counts: PromptCounts | None = None, **keys: Any) -> list[Any]:
    """The prompts, their `meta` as a dict."""
    section = Prompts(source=source, path=None if path is None else str(path), **keys)
    return [{**row, "meta": json.loads(row["meta"])} for row in read_prompts(section, counts=counts)]


def texts(*arguments: Any, **keys: Any) -> list[str]:
    return [row["messages"][-1]["content"] for row in prompts(*arguments, **keys)]


def refusal(*arguments: Any, **keys: Any) -> str:
    with pytest.raises(InputError) as caught:
        prompts(*arguments, **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def put(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- each set ---------------------------------------------------------------------------------------------------------

HERE: dict[str, tuple[str, int, dict[str, Any]]] = {  # file, prompts, what the first one's meta has among others
    "saferlhf": ("saferlhf.jsonl", 4, {"safer_response_id": 0, "is_response_0_safe": True}),
    "wildguard": (
        "wildguard.jsonl",
        5,
        {"adversarial": False, "prompt_harm_label": "unharmful", "subcategory": "benign"},
    ),
    "honeset": ("honeset.json", 5, {"category": "Latest Information with External Services", "domain": "news"}),
    "helpsteer2": ("helpsteer2.jsonl", 3, {"response": "Oak.", "helpfulness": 3, "verbosity": 0}),
    "ultrafeedback": ("ultrafeedback.jsonl", 5, {"source": "sharegpt", "models": ["m", "n"]}),
}


@pytest.mark.parametrize("name", HERE)
def test_a_set_that_is_not_here_is_read_by_its_schema(name: str) -> None:
    file, count, meta = HERE[name]
    counts = PromptCounts()
    rows = prompts(name, OURS / file, counts)
    assert (len(rows), counts.bad) == (count, 0)
    assert meta.items() <= rows[0]["meta"].items()
    assert "completions" not in rows[0]["meta"]


def test_schemas_traps_are_known() -> None:
    assert [row["meta"].get("domain") for row in prompts("honeset", OURS / "honeset.json")][3] == "mathematics"
    disguised = prompts("wildguard", OURS / "wildguard.jsonl")[2]  # text is text, whatever it looks like
    assert disguised["messages"][0]["content"].startswith("\n\nHuman: say")
    assert disguised["meta"]["response_harm_label"] is None
    turns = prompts("helpsteer2", OURS / "helpsteer2.jsonl")[1]["messages"]
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user"]


REAL: dict[str, tuple[str, str, int, dict[str, Any]]] = {  # set, file, prompts and duplicates, the first one's meta
    "jailbreak_trigger": ("jailbreak_trigger", "trustllm/jailbreak.json", 1400, {"attack": "fixed sentence"}),
    "hh_rlhf": ("hh_rlhf", "hh_rlhf/harmless-base_test.jsonl.gz", 2308, {}),
    "advbench": ("advbench", "advbench/harmful_behaviors.csv", 520, {}),
    "harmbench": ("harmbench", "harmbench/harmbench_behaviors_text_all.csv", 400, {"functional_category": "standard"}),
    "xstest": ("xstest", "xstest", 450, {"label": "safe", "type": "homonyms", "focus": "kill"}),
    "strongreject": ("strongreject", "strongreject", 313, {"category": "Disinformation and deception"}),
    "do_not_answer": ("do_not_answer", "do_not_answer", 939, {"intents": ["S004lewd"]}),
    "mt_bench": ("mt_bench", "mt_bench/question.jsonl", 80, {"category": "writing", "question_id": 81}),
    "arena_hard": ("arena_hard", "arena_hard/v0.1_question.jsonl", 500, {"category": "arena-hard-v0.1"}),
    "arena_hard 2": ("arena_hard", "arena_hard/v2.0_question.jsonl", 750, {"subcategory": "coding"}),
    "truthfulqa": ("truthfulqa", "truthfulqa/TruthfulQA.csv", 817, {"category": "Misconceptions"}),
    "truthfulqa mc": ("truthfulqa", "truthfulqa/mc_task.json", 817, {}),
    "safetybench": ("safetybench", "safetybench", 2100, {"category": "Offensiveness", "answer": 1, "id": 2}),
    "mmlu": ("mmlu", "mmlu", 3173, {"subject": "abstract_algebra", "answer": 1, "choices": ["0", "4", "2", "6"]}),
}
SPLITS = {"safetybench": "zh_subset", "hh_rlhf": "test"}
real = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared is absent")


@real
@pytest.mark.parametrize("case", REAL)
def test_a_set_s_real_files_are_read(case: str) -> None:
    name, file, count, meta = REAL[case]
    counts = PromptCounts()
    rows = prompts(name, SHARED / file, counts, split=SPLITS.get(name), on_bad_row="skip")
    assert counts.rows + counts.duplicates == count
    assert counts.bad == (4 if name == "hh_rlhf" else 0)  # HH-RLHF has chosen transcripts without a user's last turn
    assert meta.items() <= rows[0]["meta"].items()
    assert all(row["messages"][-1]["role"] == "user" for row in rows)


@real
def test_gold_answers_and_references_come_along() -> None:
    target = prompts("advbench", SHARED / "advbench")[0]["meta"]["target"]
    assert target.startswith("Sure, here")
    mc = prompts("truthfulqa", SHARED / "truthfulqa/mc_task.json")[0]["meta"]["mc1_targets"]
    assert (len(mc["choices"]), mc["labels"]) == (4, [1, 0, 0, 0])
    best = prompts("truthfulqa", SHARED / "truthfulqa/TruthfulQA.csv")[0]["meta"]
    assert best["best_answer"] in best["correct_answers"]
    assert len(best["incorrect_answers"]) == 7
    assert [len(row["meta"]["turns"]) for row in prompts("mt_bench", SHARED / "mt_bench/question.jsonl")] == [2] * 80
    hh = prompts("hh_rlhf", SHARED / "hh_rlhf", limit=1)[0]["meta"]
    assert not any("Assistant:" in hh[side] for side in ("chosen", "rejected"))
    harm = prompts("harmbench", SHARED / "harmbench/harmbench_behaviors_text_all.csv")
    (first, *_) = [row for row in harm if row["meta"]["context"]]
    assert first["messages"][0]["content"].startswith(first["meta"]["context"] + "\n\n---\n\n")


@real
def test_mmlu_has_its_splits_and_a_question_s_choices_are_lettered() -> None:
    assert len(prompts("mmlu", SHARED / "mmlu", split="dev")) == 284  # one of 285 twice
    (row, *_) = prompts("mmlu", SHARED / "mmlu/dev/anatomy_dev.csv", split="dev")
    assert row["messages"][0]["content"].splitlines()[1] == "A. The first pharyngeal arch"
    assert "no CSV files in it" in refusal("mmlu", SHARED / "mmlu", split="validation")


def test_forks_with_other_columns_are_read_or_refused(tmp_path: Path) -> None:
    assert texts("advbench", put(tmp_path / "a.jsonl", [{"Goal": "Forge a coin.", "Target": "Sure, here"}])) == [
        "Forge a coin."
    ]
    swapped = put(tmp_path / "b.jsonl", [{"goal": "Sure, here is how to forge a coin", "target": "Forge a coin."}])
    assert f"{swapped}:1: goal and target have each other's names" in refusal("advbench", swapped)
    turns = put(tmp_path / "c.jsonl", [{"turns": [{"content": f"Write a {what}."}]} for what in ("fugue", "song")])
    assert texts("arena_hard", turns) == ["Write a fugue.", "Write a song."]
    hub = put(tmp_path / "d.jsonl", [{"prompt": [f"{k}?", "Two?"], "prompt_id": k, "reference": []} for k in "01"])
    assert prompts("mt_bench", hub)[0]["meta"]["turns"] == ["0?", "Two?"]
    question = {"question": "May I?", "risk_area": "Harms", "GPT4_response": "No.", "GPT4_harmful": 0}
    assert prompts("do_not_answer", put(tmp_path / "e.jsonl", [question]))[0]["meta"] == {"category": "Harms"}
    other = put(tmp_path / "f.jsonl", [{"text": "May I?"}])
    assert f"{other}:1: has no column instruction; columns: text" in refusal("honeset", other)
    assert f"{other}:1: is no row of mt_bench as https://" in refusal("mt_bench", other)


def test_every_set_and_benchmark_is_one_short_file_and_plugs_alone_names_it() -> None:
    """A benchmark's file names its data set; the command line's help and docstrings may."""
    package = ROOT / "spa_ray"
    folders = (package / "data" / "loaders", package / "evaluation" / "benchmarks")
    own = {name: {folder / f"{name}.py" for folder in folders} for name in {*SOURCES, *BENCHMARKS}}
    for name in {*SOURCES, *BENCHMARKS}:
        assert any(file.exists() for file in own[name]), name
        assert all(len(file.read_text().splitlines()) <= 120 for file in own[name] if file.exists()), name
    knowing = {
        (str(file.relative_to(package)), name)
        for file in package.rglob("*.py")
        for name in own
        if file not in own[name] and re.search(f"[\"'.]{name}[\"':]", file.read_text())
    }
    assert {file for file, _ in knowing} == {"config/plugs.py"}


# --- where it is ------------------------------------------------------------------------------------------------------


def test_a_set_that_no_hub_has_needs_a_local_copy() -> None:
    assert source_kind(Prompts(source="honeset")) == "named"
    page = "https://github.com/Flossiee/HonestyLLM"
    assert refusal("honeset") == f"prompts.source: honeset is on no hub; give prompts.path=FILE, a copy from {page}"
    assert f"prompts.path: '/no/such': no such file or folder; a copy is at {page}" in refusal(
        "honeset", Path("/no/such")
    )
    assert "did you mean saferlhf?" in refusal("safer-lhf")
    assert "prompts.path: 'me/tiny' is no data set by name" in refusal("me/tiny", OURS)
    assert "prompts.split: saferlhf has train, test, not 'dev'" in refusal("saferlhf", OURS, split="dev")


CARD = "configs:\n" + "".join(
    f"- {{config_name: wildguard{split}, data_files: [{{split: {split}, path: {split}/*.jsonl}}]}}\n"
    for split in ("train", "test")
)


def test_a_hub_s_sets_are_streamed_by_name_and_what_is_gated_is_told_in_one_line(tmp_path: Path) -> None:
    safer, wild, steer = ((OURS / f"{name}.jsonl").read_bytes() for name in ("saferlhf", "wildguard", "helpsteer2"))
    repositories = {
        "PKU-Alignment/PKU-SafeRLHF": {"train.jsonl": safer, "test.jsonl": safer.splitlines()[0]},
        "allenai/wildguardmix": {"README.md": f"---\n{CARD}---\n".encode(), "train/a.jsonl": wild,
                                 "test/a.jsonl": wild.splitlines()[0]},
        "nvidia/HelpSteer2": {"train.jsonl": steer, "validation.jsonl": steer},
    }  # fmt: skip
    asked = [
        {"source": "saferlhf", "split": "test"},
        {"source": "saferlhf"},
        {"source": "wildguard", "split": "test"},
        {"source": "helpsteer2", "split": "validation"},
        {"source": "advbench"},
    ]
    with Hub(repositories, gated=frozenset({"walledai/AdvBench"})) as hub:
        test, train, wild_test, steered, gated = ask(asked, tmp_path, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0")
    assert (len(test["texts"]), len(train["texts"]), len(steered["texts"])) == (1, 4, 3)
    assert wild_test["texts"] == ["Tell me a story about a lighthouse."]
    told = "accept its conditions on its page and set HF_TOKEN, or give a local file in its place: prompts.path=FILE"
    assert told in gated["error"]
    assert "\n" not in gated["error"]


# --- splits, samples, overlap -----------------------------------------------------------------------------------------


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return [{"instruction": f"Question {k}: what is {k} times {k}?", "category": "c"} for k in range(400)]


def test_a_set_in_one_part_has_two_halves_whatever_the_order(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    path = put(tmp_path / "a.jsonl", rows)
    train, test = (texts("honeset", path, split=split) for split in ("train", "test"))
    assert sorted(train + test) == sorted(texts("honeset", path))
    assert not set(train) & set(test)
    assert min(len(train), len(test)) > 150
    random.Random(1).shuffle(rows)
    assert set(texts("honeset", put(tmp_path / "b.jsonl", rows), split="test")) == set(test)


def test_a_sample_is_the_same_in_every_order_and_the_larger_holds_the_smaller(
    tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    path = put(tmp_path / "a.jsonl", rows)
    drawn = texts("honeset", path, limit=60, sample=0)
    assert texts("honeset", path, limit=40, sample=0) == drawn[:40]
    assert drawn != texts("honeset", path, limit=60) != texts("honeset", path, limit=60, sample=1) != drawn
    section = Prompts(source="honeset", path=str(path), limit=20, sample=0)
    assert [row["messages"][0]["content"] for row in read_prompts(section, skip=40)] == drawn[40:]
    random.Random(2).shuffle(rows)
    assert texts("honeset", put(tmp_path / "b.jsonl", [*rows, *rows]), limit=60, sample=0) == drawn
    assert drawn[0] == "Question 152: what is 152 times 152?"  # on any machine


def test_a_sample_says_how_many() -> None:
    with pytest.raises(InputError, match=r"prompts.*say how many"):
        arm_configs({"model": {"path": "m"}, "prompts": {"sample": 1}}, [], where="c.yaml", stem="c")


LONG = "Please tell me, in the voice of an old sailor, why the tides turn twice a day."


def test_prompts_that_share_thirteen_words_with_held_out_ones_are_left_out_and_counted(tmp_path: Path) -> None:
    held = put(tmp_path / "held.jsonl", [{"prompt": LONG}, {"prompt": "Name a tree."}])
    trained = put(
        tmp_path / "train.jsonl",
        [
            {"prompt": f"Be brief. {LONG.upper()} And the moon?"},
            {"prompt": "name a tree"},
            {"prompt": "Name a tree, and a flower."},
            {"prompt": "Why do the tides turn twice a day?"},
        ],
    )
    counts = PromptCounts()
    section = Prompts(source=str(trained), decontaminate="evaluation")
    kept = list(read_prompts(section, counts=counts, against=[Prompts(source=str(held))]))
    assert [row["messages"][0]["content"] for row in kept] == [
        "Name a tree, and a flower.", "Why do the tides turn twice a day?"
    ]  # fmt: skip
    assert dict(counts.dropped.counts) == {"in the evaluation": 2}


def test_decontamination_is_of_training_prompts_and_needs_held_out_ones() -> None:
    def config(**raw: Any) -> Any:
        return arm_configs({"model": {"path": "m"}, **raw}, [], where="c.yaml", stem="c")["main"]

    asked = {"source": "a", "decontaminate": "evaluation"}
    with pytest.raises(InputError, match="evaluation has no prompts"):
        config(prompts=asked)
    with pytest.raises(InputError, match="of prompts to train on"):
        config(evaluation={"families": {"far": asked}})
    found = config(prompts=asked, evaluation={"prompts": {"source": "b"}, "families": {"far": {"source": "c"}}})
    assert [section.source for section in found.decontaminated_by] == ["b", "c"]


def test_near_duplicates_are_kept_and_counted(tmp_path: Path) -> None:
    path = put(
        tmp_path / "p.jsonl", [{"prompt": p} for p in ("Name a tree.", "name a  TREE!", "Name trees.", "?", "!")]
    )
    counts = PromptCounts()
    assert len(prompts(str(path), counts=counts)) == 5
    assert counts.to_dict()["near_duplicates"] == 1
    assert counts.notes() == ["prompts: 1 prompts have the words of an earlier one; they are kept"]


# --- configs ----------------------------------------------------------------------------------------------------------


MODELS = {"llama-3.1-8b": 1.375, "mistral-7b": 0.25}  # and γ
CELLS = [f"paper/{model}-{data}" for model in MODELS for data in ("saferlhf", "wildguard", "honeset")]
CONFIGS = ("llama-3.1-8b-saferlhf", "mistral-7b-wildguard", "llama-3.1-8b-honeset", *CELLS)


@pytest.mark.parametrize("stem", CONFIGS)
def test_the_shipped_configs_are_planned_on_local_files_of_the_true_schema(
    stem: str, tmp_path: Path, spa: Callable[..., Any]
) -> None:
    path = ROOT / "configs" / f"{stem}.yaml"
    name = yaml.safe_load(path.read_text())["prompts"]["source"]
    whole = (OURS / HERE[name][0]).read_text()
    if name == "honeset":  # its halves
        files = [OURS / "honeset.json"] * 2
    else:
        lines = whole.splitlines(keepends=True)
        files = [tmp_path / "train.jsonl", tmp_path / "test.jsonl"]
        files[0].write_text("".join(lines))
        files[1].write_text(lines[-1])
    given = [f"prompts.path={files[0]}", f"evaluation.prompts.path={files[1]}"]
    status, out, err = spa("plan", path, *given, "--json")
    assert status == 0, err
    plan = json.loads(out.strip().splitlines()[-1])
    assert not any("assumed" in note for note in plan["notes"] if "prompts" in note.split(":")[0])
    if name != "honeset":
        assert any("prompts: 1 rows left out: in the evaluation" in note for note in plan["notes"])
    for arm in plan["arms"].values():
        assert arm["generate"]["requests"] > 0


@pytest.mark.parametrize("stem", CELLS)
def test_the_six_cells_of_table_1_are_the_recipe_to_the_letter(stem: str) -> None:
    """ALGORITHMS 1; what each arm trains by, and a judge of its own that is asked for its likeliest rating."""
    path = ROOT / "configs" / f"{stem}.yaml"
    arms = load_config(path)
    first = arms["spa"]
    assert list(arms) == ["sft", "spa_dpo", "spa_simpo", "spa"]
    assert {name: config.train.beta for name, config in arms.items()} == {
        "sft": 2.5,
        "spa_dpo": 0.1,
        "spa_simpo": 2.5,
        "spa": 2.5,
    }
    assert first.train.gamma == next(gamma for model, gamma in MODELS.items() if model in stem)
    assert first.objectives == (("honest" if "honeset" in stem else "harmless"), "helpful")
    defaults = arm_configs({"model": {"path": "m"}}, [], where="c.yaml", stem="c")["main"]
    assert (first.denoise, first.pairs, first.scoring) == (defaults.denoise, defaults.pairs, defaults.scoring)
    asked = evaluation_scoring(first)
    assert (asked.judged_by.kind, asked.mode, asked.temperature, asked.max_tokens) == ("endpoint", "regex", 0, 512)


PAGE = (ROOT / "docs" / "DATA.md").read_text(encoding="utf-8")


def test_the_page_names_every_set_and_where_it_is() -> None:
    listed = {line.split("`")[1]: line for line in PAGE.splitlines() if line.startswith("| `") and "](http" in line}
    assert list(listed) == list(SOURCES)
    for name, line in listed.items():
        found = load_plug(SOURCES, name, where="test")
        assert f"]({found.page})" in line
        assert ("file only" in line) == (found.hub is None)
        if found.hub is not None and "| hub" not in line:
            assert "/".join(found.hub.removeprefix("hf://").split("/")[:2]) in line


def test_the_page_s_examples_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, plug = re.findall(r"```(?:yaml|python)\n(.*?)```", PAGE, re.DOTALL)[:2]
    raw = {"model": {"path": "m"}, **yaml.safe_load(config)}
    found = arm_configs(raw, [], where="c.yaml", stem="c")["main"]
    assert [section.source for section in found.decontaminated_by] == ["saferlhf", "xstest"]
    (tmp_path / "riddles.py").write_text(plug)
    monkeypatch.syspath_prepend(tmp_path)
    path = put(tmp_path / "r.jsonl", [{"riddle": f"What has {k} legs?", "solution": "a stool", "k": k} for k in (3, 4)])
    rows = prompts("riddles:SET", path)
    assert rows[0]["messages"] == [{"role": "user", "content": "What has 3 legs?"}]
    assert rows[0]["meta"] == {"answer": "a stool", "k": 3}


def test_honeset_s_rows_are_never_committed() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    assert [file for file in tracked if "honeset" in file.lower() and file.endswith((".json", ".jsonl"))] in (
        [], ["tests/data/named/honeset.json"]
    )  # fmt: skip
    assert len(json.loads((OURS / "honeset.json").read_text())) == 5
