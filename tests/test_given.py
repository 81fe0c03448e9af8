"""Answers with scores that a data set holds: read in public forms and one's own, built, cut into tokens, run."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from spa_ray.config import Config, arm_configs
from spa_ray.config.prompts import Episodes
from spa_ray.data.given import EpisodeCounts, write_episodes
from spa_ray.data.loaders.helpsteer2 import ATTRIBUTES as HELPSTEER2
from spa_ray.data.loaders.ultrafeedback import ATTRIBUTES as ULTRAFEEDBACK
from spa_ray.data.schemas import EPISODES, is_imported, objectives_of, ranges_of
from spa_ray.errors import InputError
from spa_ray.pipeline.recipe import planned_stages
from spa_ray.preferences import build_pairs, denoise
from spa_ray.rollout.chat import Chat
from spa_ray.training.own_pairs import answer_ids
from spa_ray.training.tokenize import tokenize_pairs
from tests.fake_hub import Hub
from tests.tiny_model import build_tiny_tokenizer

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "DATA.md").read_text(encoding="utf-8")
ANSWERS = ROOT / "docs" / "examples" / "answers.jsonl"
HH = ROOT.parent / "shared" / "data" / "hh_rlhf" / "harmless-base_test.jsonl.gz"


def rated(prompt: str, response: str, *ratings: int) -> dict[str, Any]:
    return {"prompt": prompt, "response": response, **dict(zip(HELPSTEER2, ratings, strict=True))}


def completion(text: str, *ratings: str) -> dict[str, Any]:
    annotations = {name: {"Rating": r, "Rationale": "…"} for name, r in zip(ULTRAFEEDBACK, ratings, strict=True)}
    return {"model": "m", "response": text, "custom_system_prompt": "Be kind.", "annotations": annotations}


HELPSTEER2_ROWS = [
    rated("c#", "A language.", 3, 4, 4, 2, 1),
    rated("c#", "A note.", 1, 0, 4, 0, 0),
    rated("Hi\n<extra_id_1>Assistant\nHello\n<extra_id_1>User\n1 + 2?", "3", 4, 4, 4, 0, 0),
    rated("Hi\n<extra_id_1>Assistant\nHello\n<extra_id_1>User\n1 + 2?", "4", 0, 0, 4, 0, 0),
]
ULTRAFEEDBACK_ROW = {
    "source": "evol",
    "instruction": "Name a tree.",
    "models": ["m"],
    "completions": [completion("Oak.", "5", "4", "N/A", "1"), completion("Rose.", "1", "2", "3", "2")],
}
HH_ROW = {
    side: f"\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: A tree?\n\nAssistant: {answer}"
    for side, answer in (("chosen", "Oak."), ("rejected", "Rose."))
}


def put(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(source: Path, **keys: Any) -> tuple[pa.Table, EpisodeCounts]:
    out = source.with_suffix(".episodes.parquet")
    counts = write_episodes(Episodes(source=str(source), **keys), out)
    return pq.read_table(out), counts


def refusal(source: Path, **keys: Any) -> str:
    with pytest.raises(InputError) as caught:
        read(source, **keys)
    assert "\n" not in str(caught.value)
    assert not list(source.parent.glob(f"*{source.stem}.episodes*"))
    return str(caught.value)


# --- forms -----------------------------------------------------------------------------------------------------------


def test_helpsteer2_has_two_rows_a_prompt_and_turns_in_its_prompts(tmp_path: Path) -> None:
    table, counts = read(put(tmp_path / "h.jsonl", *HELPSTEER2_ROWS))
    assert table.schema.equals(EPISODES)
    assert (objectives_of(table.schema), is_imported(table.schema)) == (list(HELPSTEER2), True)
    assert table["scores"].to_pylist()[0] == [[3, 4, 4, 2, 1], [1, 0, 4, 0, 0]]
    assert ranges_of(table.schema) == [(0, 4)] * 5
    turns = table["messages"].to_pylist()[1]
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user"]
    assert [turn["content"] for turn in turns] == ["Hi", "Hello", "1 + 2?"]
    assert (counts.rows, counts.answers) == (2, 4)


def test_ultrafeedback_has_ratings_as_text_and_not_all_of_them(tmp_path: Path) -> None:
    table, _ = read(put(tmp_path / "u.jsonl", ULTRAFEEDBACK_ROW))
    (row,) = table.to_pylist()
    assert row["scores"] == [[5, 4, None, 1], [1, 2, 3, 2]]
    assert ranges_of(table.schema) == [(1, 5)] * 4
    assert row["responses"][0]["score_status"] == ["ok", "ok", "missing", "ok"]
    assert [answer["system"] for answer in row["responses"]] == ["Be kind."] * 2
    assert [answer["token_ids"] for answer in row["responses"]] == [None] * 2
    assert row["messages"] == [{"role": "user", "content": "Name a tree."}]
    assert json.loads(row["meta"]) == {"source": "evol", "models": ["m"]}


def test_a_pairs_label_is_its_score(tmp_path: Path) -> None:
    table, counts = read(put(tmp_path / "hh.jsonl", HH_ROW))
    (row,) = table.to_pylist()
    assert [turn["content"] for turn in row["messages"]] == ["Hi", "Hello", "A tree?"]
    assert [answer["text"] for answer in row["responses"]] == ["Oak.", "Rose."]
    assert (row["scores"], counts.attributes, counts.ranges) == ([[1.0], [0.0]], ("preferred",), ((0, 1),))


@pytest.mark.skipif(not HH.is_file(), reason="../shared is absent")
def test_hh_rlhf_itself(tmp_path: Path) -> None:
    counts = write_episodes(Episodes(source=str(HH), on_bad_row="skip"), tmp_path / "hh.parquet")
    assert (counts.rows, counts.bad, dict(counts.dropped.counts)) == (
        2301,
        9,
        {"empty": 4, "malformed": 5, "duplicate": 2},
    )


def test_own_rows_hold_all_answers_or_one_and_keep_what_else_they_have(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in ANSWERS.read_text().splitlines()]
    rows[0] |= {"prompt_id": "bread", "topic": "food"}
    table, counts = read(put(tmp_path / "own.jsonl", *rows))
    found = table.to_pylist()
    assert [len(row["responses"]) for row in found] == [2, 3, 2]
    assert [row["scores"] for row in found][1:] == [[[9, 6], [1, 4], [8, None]], [[9, 9], [9, 4]]]
    assert (found[0]["prompt_id"], json.loads(found[0]["meta"])) == ("bread", {"topic": "food"})
    assert counts.attributes == ("harmless", "helpful")
    names = dict.fromkeys(name for row in rows for name in row)
    pq.write_table(
        pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows]), tmp_path / "own.parquet"
    )
    assert read(tmp_path / "own.parquet")[0]["scores"].to_pylist() == table["scores"].to_pylist()


def test_the_first_row_with_scores_names_the_attributes(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "responses": []},
        {"prompt": "b", "responses": [{"text": "x", "scores": {}}]},
        {"prompt": "c", "responses": [{"text": "y", "scores": {"helpful": 3, "harmless": 5}}]},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out.parquet"
    counts = write_episodes(Episodes(source=str(tmp_path / "a.jsonl")), out)
    assert counts.attributes == ("helpful", "harmless")
    assert objectives_of(pq.read_schema(out)) == ["helpful", "harmless"]
    assert pq.read_table(out)["scores"].to_pylist() == [[], [[None, None]], [[3, 5]]]

    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    with pytest.raises(InputError, match="no answer has a score"):
        write_episodes(Episodes(source=str(tmp_path / "b.jsonl")), tmp_path / "none.parquet")
    assert not (tmp_path / "none.parquet").exists()


def test_attributes_are_chosen_and_ordered_and_prompts_limited(tmp_path: Path) -> None:
    table, _ = read(put(tmp_path / "h.jsonl", *HELPSTEER2_ROWS), attributes=("verbosity", "helpfulness"), limit=1)
    assert objectives_of(table.schema) == ["verbosity", "helpfulness"]
    assert table["scores"].to_pylist() == [[[1, 3], [0, 1]]]
    _, counts = read(put(tmp_path / "p.jsonl", ONE, {**ONE, "prompt": "r", "scores": {"x": 1, "y": 2}}))
    assert counts.notes() == [f"episodes: {tmp_path / 'p.jsonl'}: scores that episodes.attributes leaves out: y"]
    told = refusal(put(tmp_path / "own.jsonl", *HELPSTEER2_ROWS), attributes=("helpful",))
    assert "has a score 'helpful'; they have coherence, complexity, correctness" in told


ONE = {"prompt": "q", "response": "a", "scores": {"x": 1}}
BAD: dict[str, tuple[Any, str]] = {
    "no answers": ({"prompt": "q"}, "no answers with scores (columns: prompt); give `prompt` and `responses`"),
    "no list": (
        {"prompt": "q", "responses": "a"},
        "`responses` is text; give a list of {text, scores: {name: number}}",
    ),
    "no text": ({"prompt": "q", "responses": [{"scores": {}}]}, "`responses`[0].text is null; an answer is text"),
    "no scores": ({"prompt": "q", "responses": [{"text": "a"}]}, "`responses`[0] is no answer; give {text, scores:"),
    "text score": ({**ONE, "scores": {"x": "high"}}, "`x` is 'high'; a score is a finite number"),
    "endless": ({**ONE, "scores": {"x": float("inf")}}, "`x` is inf; a score is a finite number"),
    "no completions": (
        {**ULTRAFEEDBACK_ROW, "completions": ["a"]},
        "`completions` is not of the form that it shows (TypeError",
    ),
    "beyond the scale": (rated("q", "a", 5, 0, 0, 0, 0), "helpfulness is 5; a rating is a number from 0 to 4"),
    "no rating": (
        {**ULTRAFEEDBACK_ROW, "completions": [completion("a", "good", "1", "1", "1")]},
        "`completions`[0] instruction_following is 'good'; a rating is a number from 1 to 5",
    ),
    "empty answer": ({**HH_ROW, "chosen": "\n\nHuman: Hi\n\nAssistant: "}, "`chosen`[1] is empty"),
    "no prompt": ({"responses": [{"text": "a", "scores": {"x": 1}}]}, "no value in `prompt` or `messages`"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_told_with_its_line_or_left_out_and_counted(tmp_path: Path, name: str) -> None:
    row, told = BAD[name]
    source = put(tmp_path / "p.jsonl", ONE, row)
    message = refusal(source)
    assert message.startswith(f"{source}:2: {told}")
    assert message.endswith("(or leave such rows out with episodes.on_bad_row=skip)")
    _, counts = read(source, on_bad_row="skip")
    assert (counts.rows, counts.bad, sum(counts.dropped.counts.values())) == (1, 1, 1)


def test_own_scores_have_the_ranges_that_are_given(tmp_path: Path) -> None:
    source = put(tmp_path / "p.jsonl", ONE, {**ONE, "prompt": "r", "scores": {"x": 7}})
    assert refusal(source, ranges={"x": (1, 5)}).startswith(
        f"{source}:2: `x` is 7; its range is 1 to 5 (episodes.ranges)"
    )
    assert refusal(source, ranges={"y": (1, 5)}) == "episodes.ranges: 'y' is not one of the scores x"
    two = put(tmp_path / "t.jsonl", {**ONE, "scores": {"x": 1, "y": 1}})
    assert "episodes.ranges: 'x' has none; give" in refusal(two, ranges={"y": (1, 5)})
    assert config("episodes.attributes=null", "episodes.ranges={y: [0, 1]}").episodes.ranges == {"y": (0, 1)}
    with pytest.raises(ValueError, match=r"ranges: 'x' is not one of the attributes \['y'\]"):
        Episodes(attributes=("y",), ranges={"x": (0, 1)})
    assert ranges_of(read(source)[0].schema) is None
    table, _ = read(source, ranges={"x": (1, 7)})
    assert (ranges_of(table.schema), table["scores"].to_pylist()) == ([(1, 7)], [[[1]], [[7]]])
    assert read(source, ranges={"x": (1, 5)}, on_bad_row="skip")[1].bad == 1


def test_a_sets_range_gives_way_to_the_one_that_is_given_and_one_file_has_one(tmp_path: Path) -> None:
    rows = put(tmp_path / "h.jsonl", *HELPSTEER2_ROWS)
    chosen = {"attributes": ("helpfulness", "verbosity")}
    assert ranges_of(read(rows, ranges={"verbosity": (0, 2)}, **chosen)[0].schema) == [(0, 4), (0, 2)]
    own = {"prompt": "z", "response": "a", "scores": {"helpfulness": 9, "verbosity": 9}}
    told = refusal(put(tmp_path / "m.jsonl", *HELPSTEER2_ROWS, own), **chosen)
    assert told == f"{tmp_path / 'm.jsonl'}:5: its scores have other ranges than those before; set episodes.ranges"


def test_a_prompt_that_comes_again_later_is_left_out_and_counted(tmp_path: Path) -> None:
    other = {**ONE, "prompt": "r"}
    table, counts = read(put(tmp_path / "p.jsonl", ONE, ONE, other, ONE))
    assert [len(answers) for answers in table["responses"].to_pylist()] == [2, 1]
    assert dict(counts.dropped.counts) == {"duplicate": 1}


# --- config ----------------------------------------------------------------------------------------------------------


def config(*overrides: str, **raw: Any) -> Config:
    given = {"model": {"path": "m"}, "episodes": {"source": "s.jsonl", "attributes": ["x"]}, **raw}
    return arm_configs(given, overrides, where="test", stem="test")["main"]


def test_given_answers_bring_their_defaults() -> None:
    found = config("profile=robust")
    assert (found.objectives, found.episodes.attributes) == (("x",), ("x",))
    assert (found.denoise.consistency, found.denoise.informativeness, found.pairs.delta) == ("off", False, "auto")
    assert config("pairs.delta=0.5").pairs.delta == 0.5
    assert config("pairs.order=mean").pairs.delta == 1e-6
    assert Config.model_validate(config("pairs.order=mean").model_dump(mode="json")) == config("pairs.order=mean")
    assert config("episodes.attributes=null", "objectives=[a,b]").episodes.attributes == ("a", "b")
    assert Config.model_validate(found.model_dump(mode="json")) == found


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("denoise.consistency=strict", "denoise.consistency: given answers (episodes.source) are not denoised"),
        ("denoise.informativeness=true", "denoise.informativeness: given answers (episodes.source) are not denoised"),
        ("iterations.count=2", "iterations.count: given answers (episodes.source) serve one iteration"),
        ("objectives=[a,b]", "episodes.attributes: ['x'] are not the objectives ['a', 'b']"),
    ],
)
def test_what_given_answers_rule_out_is_refused(override: str, told: str) -> None:
    with pytest.raises(InputError, match=re.escape(told)):
        config(override)


def test_arms_with_given_answers_stand_beside_arms_that_ask() -> None:
    given = {"episodes.source": "s.jsonl", "episodes.attributes": ["harmless", "helpful"]}
    arms = {"asks": {}, "given": given, "sft": {**given, "train.method": "sft"}}
    raw = {"model": {"path": "m"}, "prompts": {"source": "p.jsonl"}, "arms": arms}
    stages = planned_stages(arm_configs(raw, (), where="test", stem="test"))
    assert [(stage.stage, stage.arms) for stage in stages] == [
        ("import", ["given", "sft"]),
        ("generate", ["asks"]),
        ("build", ["asks"]),
        ("build", ["given", "sft"]),
        ("train", ["asks"]),
        ("train", ["given"]),
        ("train", ["sft"]),
    ]


# --- pairs and tokens -------------------------------------------------------------------------------------------------


def pairs_of(folder: Path, **raw: Any) -> tuple[pa.Table, pa.Table]:
    episodes, _ = read(put(folder / "own.jsonl", *(json.loads(line) for line in ANSWERS.read_text().splitlines())))
    arm = config(episodes={"source": "x", "attributes": ["harmless", "helpful"]}, **raw)
    denoised = denoise(episodes, arm, tau=None)
    return denoised, build_pairs(denoised, arm)


def test_two_scored_answers_are_enough_for_pairs_without_ids(tmp_path: Path) -> None:
    denoised, pairs = pairs_of(tmp_path)
    assert denoised["drop_reason"].to_pylist() == [None] * 3
    assert pairs["decided_by"].to_pylist() == ["helpful", "harmless", "helpful"]
    assert pairs["chosen_ids"].to_pylist() == pairs["rejected_ids"].to_pylist() == [None] * 3
    one, _ = read(put(tmp_path / "one.jsonl", ONE))
    assert denoise(one, config(), tau=None)["drop_reason"].to_pylist() == ["too_few_scores"]


def test_training_cuts_them_into_the_templates_tokens_with_one_end(tmp_path: Path) -> None:
    _, pairs = pairs_of(tmp_path)
    pq.write_table(pairs, tmp_path / "pairs.parquet")
    tokenizer = build_tiny_tokenizer()
    chat, end = Chat(tokenizer, model="tiny"), tokenizer.eos_token_id
    settings: dict[str, Any] = {"vocab_size": len(tokenizer), "max_length": 512, "gap": "l1"}
    tokens = tmp_path / "tokens.arrow"
    tokenize_pairs(tmp_path / "pairs.parquet", tokens, chat, **settings, ends=lambda: frozenset({end}))
    rows = pa.ipc.open_file(str(tokens)).read_all().to_pylist()
    assert [row["gap"] for row in rows] == pairs["margin"].to_pylist()
    for row, pair in zip(rows, pairs.to_pylist(), strict=True):
        for side in ("chosen", "rejected"):
            ids = row[f"{side}_ids"]
            assert ids == answer_ids(chat, pair["prompt"], pair[side][0]["content"], frozenset({end}))
            assert (ids.count(end), ids[-1]) == (1, end)


# --- commands --------------------------------------------------------------------------------------------------------


def last(out: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def commands(page: str) -> Iterator[list[str]]:
    for line in page.splitlines():
        if line.startswith("    spa "):
            yield shlex.split(line)[1:]


def test_import_is_done_once_and_leaves_nothing_half_written(tmp_path: Path, spa: Any) -> None:
    source = put(tmp_path / "p.jsonl", ONE, {"prompt": "q"})
    command = ("import", source, "--out", tmp_path / "out", "--json")
    assert spa(*command)[0] == 2
    assert not (tmp_path / "out").exists()
    status, out, err = spa(*command, "episodes.on_bad_row=skip")
    assert (status, last(out)["rows"], last(out)["attributes"]) == (0, 1, ["x"])
    assert "episodes: 1 rows left out: no answers (the first: " in err
    assert (tmp_path / "out" / "left_out.jsonl").is_file()
    assert spa(*command, "episodes.on_bad_row=skip")[0] == 0
    put(source, {**ONE, "response": "b"})
    status, _, err = spa(*command)
    assert status == 2
    assert "finished with other settings or input" in err


@pytest.mark.parametrize("source", ["hf://nvidia/HelpSteer2", "helpsteer2"])
def test_a_hubs_answers_are_imported(tmp_path: Path, source: str) -> None:
    rows = "".join(json.dumps(row) + "\n" for row in HELPSTEER2_ROWS).encode()
    with Hub({"nvidia/HelpSteer2": {"train.jsonl": rows, "validation.jsonl": rows}}) as hub:
        run = [sys.executable, "-m", "spa_ray.cli.main", "import", source, "--out", "out", "--json"]
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf"),
                       "PYTHONPATH": str(ROOT)}  # fmt: skip
        done = subprocess.run(
            [*run, "episodes.split=validation", "episodes.attributes=[helpfulness,correctness]"],
            env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert last(done.stdout)["rows"] == 2
    assert objectives_of(pq.read_schema(tmp_path / "out" / "episodes" / "episodes.parquet")) == [
        "helpfulness",
        "correctness",
    ]


@pytest.mark.engine
@pytest.mark.usefixtures("ray_session")
def test_the_pages_commands_run(tmp_path: Path, tiny_model: Path, spa: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    results = []
    for command in commands(PAGE):
        status, out, err = spa(*command, "--json")
        assert status == 0, err
        results.append(last(out))
    assert results[0]["answers"] == 7
    funnel = results[1]["funnel"]
    assert (funnel["prompts"], funnel["kept"], funnel["pairs"]) == (3, 3, 3)
    assert pq.read_table(results[1]["pairs"])["gap"].to_pylist() == [5.0, 10.0, 5.0]
    train = {"method": "spa", "dtype": "float32", "batch_size": 3, "max_length": 128, "lr": 1e-4}
    (tmp_path / "config.yaml").write_text(json.dumps({"model": {"path": str(tiny_model)}, "train": train}))
    command = re.search(r"`spa (train given-pairs .*?)`", PAGE)
    assert command
    status, out, err = spa(*shlex.split(command[1]), "--json")
    assert status == 0, err
    assert (last(out)["pairs"], last(out)["steps"]) == (3, 1)
    assert not (tmp_path / "model.pairs").exists()


@pytest.mark.engine
@pytest.mark.usefixtures("ray_session")
def test_the_pages_run_needs_no_engine(tmp_path: Path, tiny_model: Path, spa: Any) -> None:
    block = re.search(r"^    name: given\n(?:    .*\n)+", PAGE, re.MULTILINE)
    assert block
    raw = yaml.safe_load("\n".join(line[4:] for line in block[0].splitlines()))
    raw["model"] = {"path": str(tiny_model), "engine": "tests.test_given:no_engine"}
    raw["episodes"]["source"] = str(ANSWERS)
    raw |= {"run_dir": str(tmp_path / "run")}
    raw["train"] |= {"dtype": "float32", "max_length": 128}
    file = tmp_path / "given.yaml"
    file.write_text(yaml.safe_dump(raw))
    status, out, err = spa("plan", file, "--json")
    assert status == 0, err
    stages = {stage["stage"]: stage for stage in last(out)["stages"]}
    assert list(stages) == ["import", "build", "train"]
    assert (stages["import"]["rows"], stages["import"]["requests"], stages["import"]["gpus"]) == (3, 0, 0)
    status, out, err = spa("run", file, "--until", "generate", "--json")
    assert status == 0, err
    assert list(last(out)["arms"]["main"]["iterations"][0]) == ["episodes"]
    status, out, err = spa("run", file, "--json")
    assert status == 0, err
    (done,) = last(out)["arms"]["main"]["iterations"]
    assert done["funnel"]["pairs"] == 3
    assert (Path(done["model"]) / "model.safetensors").is_file()
    status, out, err = spa("run", file, "--json")
    assert (status, last(out)["arms"]["main"]["iterations"]) == (0, [done])
    assert "import" in err
    assert "done before" in err
    status, out, _ = spa("inspect", tmp_path / "run", pq.read_table(done["pairs"])["prompt_id"][0].as_py())
    assert (status, "In a bread box" in out) == (0, True)
    status, _, err = spa("run", file, "episodes.attributes=[harmless,kind]")
    assert status == 2
    assert "no answer of" in err


def no_engine(*_: Any, **__: Any) -> Any:
    raise AssertionError("given answers ask no engine")
