"""Cards as the hub's own client reads them, pairs as other trainers read them, and both on their way to a hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from huggingface_hub import DatasetCard, ModelCard

from spa_ray.config.models import Config
from spa_ray.data.own_pairs import read_own_pairs
from spa_ray.data.pair_formats import FORMS, write_pairs
from spa_ray.pipeline.cards import CARD, Trained, hub_name, model_card, pairs_card, write_card
from spa_ray.preferences import build_pairs, denoise
from tests.fake_hub import Hub
from tests.preferences_tables import make_config, make_episodes, make_row

INTERVAL = {"mean": 6.5, "low": 6.0, "high": 7.0, "n": 16}
TOKEN = "hf_" + "a" * 34
SYSTEM = {"role": "system", "content": "Be kind."}


@pytest.fixture
def config() -> Config:
    return make_config(prompts__source="honeset").model_copy(update={"name": "lamps"})


@pytest.fixture
def built(config: Config, tmp_path: Path) -> Path:
    """A folder as `spa build` leaves it: three pairs, one behind a system turn."""
    rows = [make_row([(1, 1), (3, 5), (9, 9)], (10, 10), prompt_id=name) for name in ("p", "q", "r")]
    rows[2]["messages"] = [SYSTEM, *rows[2]["messages"]]
    kept = denoise(make_episodes(rows, config), config, tau=None)
    pairs = build_pairs(kept, config)
    folder = tmp_path / "built"
    (folder / "pairs").mkdir(parents=True)
    pq.write_table(pairs, folder / "pairs" / "000000.parquet")
    funnel = {"prompts": 4, "dropped": {"error": 0, "zero_det": 1}, "kept": 3, "pairs": len(pairs)}
    (folder / "funnel.json").write_text(json.dumps(funnel))
    write_card(folder, pairs_card(config, "lamps-spa", funnel))
    return folder


# --- cards ----------------------------------------------------------------------------------------------------------


def test_a_models_card_has_what_the_hub_reads(config: Config, tmp_path: Path) -> None:
    (tmp_path / CARD).write_text("---\nlicense: apache-2.0\nbase_model: a/b\n---\n# The base model\n")
    found = {
        "metrics": {"main": {"means": {"harmless": INTERVAL, "unsafe": {**INTERVAL, "mean": 0.25}}}},
        "benchmarks": {"mmlu": {"measures": {"accuracy": INTERVAL, "macro": 0.5, "unjudged": None}}},
    }
    before = {"metrics": {"main": {"means": {"harmless": {**INTERVAL, "mean": 4.0}}}}}
    funnel = {"pairs": 1200, "prompts": 400, "dropped": {}, "kept": 380}
    raw = config.model_copy(update={"model": config.model.model_copy(update={"path": "Qwen/Qwen3-8B"})})
    card = ModelCard(model_card(raw, "lamps-spa", Trained(tmp_path, funnel, found, before)))
    data = card.data.to_dict()
    assert (data["base_model"], data["license"], data["library_name"]) == (
        "Qwen/Qwen3-8B",
        "apache-2.0",
        "transformers",
    )
    assert data["tags"][-1] == "spa"
    assert {(r.dataset_name, r.metric_type, r.metric_value) for r in card.data.eval_results} == {
        ("main", "harmless", 6.5), ("main", "unsafe", 0.25), ("mmlu", "accuracy", 6.5), ("mmlu", "macro", 0.5),
    }  # fmt: skip
    assert "| harmless | 6.500 [6.000, 7.000] | 4.000 [6.000, 7.000] |" in card.text
    assert "1,200 pairs of 400 prompts of `honeset`" in card.text
    settings = yaml.safe_load(card.text.partition("```yaml\n")[2].partition("```")[0])
    assert settings["train"]["method"] == "spa"
    assert settings["pairs"]["delta"] == 2
    assert "torch " in card.text


def test_a_card_says_when_it_does_not_know(config: Config, tmp_path: Path) -> None:
    """A base model that is a folder here has no name on a hub; without a card of its own it names no licence."""
    local = config.model_copy(update={"model": config.model.model_copy(update={"path": str(tmp_path)})})
    card = ModelCard(model_card(local, "lamps", Trained(tmp_path)))
    assert {"base_model", "license", "model-index"}.isdisjoint(card.data.to_dict())
    assert f"| base model | `{tmp_path}` |" in card.text
    assert "pairs of the user's own" in card.text
    assert "whose folder names none" in card.text


def test_names_on_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub_name("hf://datasets/a/b@main/config") == hub_name("a/b") == "a/b"
    assert hub_name(None) is hub_name("file.jsonl") is hub_name("/a/b/c") is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert hub_name("a/b") is None


def test_no_secret_is_in_a_card(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/bin/spa", "run", "c.yaml", f"model.hf_token={TOKEN}"])
    text = model_card(config, "lamps", Trained(tmp_path))
    assert "spa run c.yaml model.hf_token=" in text
    assert TOKEN not in text


def test_the_folder_of_a_build_is_a_data_set_of_the_hubs(built: Path, tmp_path: Path) -> None:
    from datasets import load_dataset

    card = DatasetCard.load(built / CARD)
    assert card.data.to_dict()["pretty_name"] == "lamps-spa"
    assert "harmless, helpful" in card.text
    rows = load_dataset(str(built), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows.num_rows == pq.read_table(built / "pairs").num_rows > 2
    assert "chosen_scores" in rows.column_names


# --- other trainers' forms ------------------------------------------------------------------------------------------


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "pairs.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]


def test_each_form_holds_the_same_pairs(built: Path, tmp_path: Path) -> None:
    pairs = pq.read_table(built / "pairs").to_pylist()
    for form in FORMS:
        assert write_pairs(built / "pairs", tmp_path / form, form) == len(pairs)
    last = pairs[-1]
    answers = last["chosen"][0], last["rejected"][0]
    assert rows_of(tmp_path / "trl") == [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in pairs]
    assert rows_of(tmp_path / "axolotl")[-1] == {
        "messages": last["prompt"],
        "chosen": answers[0],
        "rejected": answers[1],
    }
    assert rows_of(tmp_path / "llama_factory")[-1] == {
        "conversations": [
            {"from": "system", "value": "Be kind."}, {"from": "human", "value": last["prompt"][1]["content"]},
        ],
        "chosen": {"from": "gpt", "value": answers[0]["content"]},
        "rejected": {"from": "gpt", "value": answers[1]["content"]},
    }  # fmt: skip


def test_trl_reads_its_form_and_so_do_we(built: Path, tmp_path: Path) -> None:
    from datasets import load_dataset
    from trl.data_utils import is_conversational, maybe_apply_chat_template

    from tests.tiny_model import build_tiny_tokenizer

    count = write_pairs(built / "pairs", tmp_path / "out", "trl")
    file = tmp_path / "out" / "pairs.jsonl"
    rows = load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
    assert is_conversational(rows[0])
    rendered = maybe_apply_chat_template(rows[0], build_tiny_tokenizer())
    assert rendered["prompt"] == "<|bos|><|user|>question p<|end|><|assistant|>"
    assert rendered["chosen"].startswith("answer ")
    ours = list(read_own_pairs(str(file)))
    assert len(ours) == count
    assert ours[0].chosen == rows[0]["chosen"][0]["content"]


# --- the command and a hub ------------------------------------------------------------------------------------------


def test_spa_export_writes_a_form_with_its_card(spa: Any, built: Path, tmp_path: Path) -> None:
    status, out, _ = spa("export", built, "--format", "llama_factory", "--out", tmp_path / "out", "--json")
    assert status == 0
    told = json.loads(out.splitlines()[-1])
    assert told == {"pairs": str(tmp_path / "out"), "count": len(rows_of(tmp_path / "out")), "pushed": None}
    info = json.loads((tmp_path / "out" / "dataset_info.json").read_text())["pairs"]
    assert info["columns"].keys() <= {*rows_of(tmp_path / "out")[0], "messages"}
    data = DatasetCard.load(tmp_path / "out" / CARD).data.to_dict()
    assert data["configs"][0]["data_files"] == [{"split": "train", "path": "pairs.jsonl"}]
    assert data["pretty_name"] == "lamps-spa"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["{built}", "--format", "csv", "--out", "{new}"], "--format csv: no such form; one of trl, axolotl"),
        (["{built}", "--format", "trl"], "pairs need --format and --out"),
        (["{built}", "--out", "{new}"], "pairs need --format and --out"),
        (["{built}", "--format", "trl", "--out", "{built}"], "exists already"),
        (["{built}", "--format", "trl", "--out", "{new}", "--step", "3"], "are of models; SOURCE are pairs"),
        (["{empty}", "--format", "trl", "--out", "{new}"], "no pairs; give the folder that `spa build` wrote"),
        (["{other}", "--format", "trl", "--out", "{new}"], "no column 'prompt'; these are no pairs"),
        (["{built}", "--push-to-hub", "no such name!"], "--push-to-hub no such name!"),
    ],
)
def test_each_mistake_is_one_line_and_nothing_is_written(
    spa: Any, built: Path, tmp_path: Path, arguments: list[str], told: str
) -> None:
    places = {"built": built, **{name: tmp_path / name for name in ("empty", "other", "new")}}
    places["empty"].mkdir()
    places["other"].mkdir()
    pq.write_table(pa.table({"a": [1]}), places["other"] / "a.parquet")
    status, _, err = spa("export", *(a.format(**places) for a in arguments))
    assert (status, err.count("\n")) == (2, 1)
    assert told in err
    assert not places["new"].exists()


def push(
    hub: Hub | SimpleNamespace, home: Path, *arguments: str | Path, token: str = TOKEN
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home), "HF_TOKEN": token}
    command = [str(Path(sys.executable).parent / "spa"), "export", *map(str, arguments), "--json"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_pairs_and_models_are_pushed_with_the_environments_token_which_is_told_nowhere(
    built: Path, tmp_path: Path, tiny_model: Path
) -> None:
    (built / "stage.json").write_text("{}")
    with Hub({}, writers=frozenset({TOKEN})) as hub:
        done = push(hub, tmp_path, built, "--push-to-hub", "me/pairs")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1])["pushed"].endswith("me/pairs")
        assert {"name": "pairs", "type": "dataset", "visibility": "private"}.items() <= hub.created[0].items()
        assert set(hub.repositories["me/pairs"]) == {CARD, "funnel.json", "pairs/000000.parquet"}
        assert hub.repositories["me/pairs"][CARD] == (built / CARD).read_bytes()
        form = push(
            hub, tmp_path, built, "--format", "trl", "--out", tmp_path / "f", "--push-to-hub", "me/f", "--public"
        )
        assert form.returncode == 0, form.stderr
        assert hub.created[1]["visibility"] == "public"
        assert set(hub.repositories["me/f"]) == {CARD, "pairs.jsonl"}
        model = push(hub, tmp_path, tiny_model, "--push-to-hub", "me/model")
        assert model.returncode == 0, model.stderr
        assert hub.created[2].get("type", "model") == "model"
        assert "model.safetensors" in hub.repositories["me/model"]
        refused = push(hub, tmp_path, tiny_model, "--push-to-hub", "me/other", token=TOKEN[:-1] + "b")
        assert refused.returncode == 1
        assert "me/other: the hub did not take it" in refused.stderr
        nobody = push(SimpleNamespace(url="http://127.0.0.1:9"), tmp_path, tiny_model, "--push-to-hub", "me/other")
        assert (nobody.returncode, nobody.stderr.count("\n")) == (1, 1)
        assert "me/other: the hub did not take it" in nobody.stderr
        for told in (done, form, model, refused, nobody):
            assert TOKEN[:-1] not in told.stdout + told.stderr
