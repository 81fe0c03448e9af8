"""`spa reproduce --paper sga`: its page, made of run folders whose answers are the world's own."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from spa_ray.cli.reproduce import reproduction, seed_configs, started_from, write_page
from spa_ray.config import Config
from spa_ray.data.schemas import EPISODES, STEERED, episodes_schema, with_attributes
from spa_ray.microworld.tones import oracle
from spa_ray.microworld.tones.answers import base_answer, held_out
from spa_ray.microworld.tones.prompts import ATTRIBUTES, wish_of
from spa_ray.pipeline.manifest import write_run_config
from spa_ray.storage.files import write_json
from spa_ray.storage.folder import RunFolder
from spa_ray.training.method import method_of

SPEC = reproduction("sga")
PROMPTS = list(itertools.islice(held_out(), 40))


def row(at: int, arm: str, steered: bool) -> dict[str, Any]:
    """The answer of the base policy; of a steered arm the reference, with what was asked."""
    prompt = {**PROMPTS[at], "family": "test"}
    text = prompt.pop("prompt")
    answer = prompt["reference"] if steered else base_answer(random.Random(f"{at}/{arm}"), wish_of(text))
    scores = oracle.scores(text, answer)
    response = {"text": answer, "scores": [scores[name] for name in ATTRIBUTES], "token_ids": [1]}
    wish = [prompt["wish"][name] for name in ATTRIBUTES]
    return {
        "prompt_id": f"test/{at:02d}",
        "meta": json.dumps(prompt),
        "messages": [{"role": "user", "content": text}],
        "responses": [response],
        **({"sensed": wish, "asked": wish, "floored": []} if steered else {}),
    }


def finished(folder: Path, configs: dict[str, Config]) -> Path:
    """A run of these arms, of which SGA's sense the wish itself."""
    run, stages = RunFolder(folder), {"evalprompts": "evalprompts-0"}
    write_run_config(run, configs)
    for arm in ("vanilla", *configs):
        senses = arm in configs and method_of(configs[arm].train).senses
        schema = with_attributes(episodes_schema(steered=True), ATTRIBUTES) if senses else EPISODES
        table = pa.Table.from_pylist([row(at, arm, senses) for at in range(len(PROMPTS))], schema=schema)
        for stage in ("evaluate", "train"):
            made = run.stage(stage, arm)
            (made.folder / "episodes").mkdir(parents=True)
            pq.write_table(table, made.folder / "episodes" / "part.parquet")
            made.finish(0.0)
        stages[arm] = f"evaluate-{arm}"
        model = str(folder / "stages" / f"train-{arm}" / "model")
        write_json(run.arm_file(arm, 1), {"stages": {"train": f"train-{arm}"}, "model": model})
    write_json(folder / "evaluation.json", {"stages": stages, "judges": {}})
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sga")
    folders: dict[str, list[Any]] = {}
    for name, run in SPEC.runs.items():
        seeds = seed_configs(name, run, ["evaluation.bootstrap=50"], seeds=2, real={}, out=str(out))
        if run.start is not None:
            seeds = started_from(run.start, seeds, folders)
            assert [configs["spa_sga"].model.path for configs in seeds] == [
                str(folder / "stages" / "train-spa" / "model") for folder in folders["spa"]
            ]
        folders[name] = [finished(out / f"{name}-{k}", configs) for k, configs in enumerate(seeds)]
    return Path(str(write_page(SPEC, SPEC.runs, folders, out / "RESULTS.md", command="spa reproduce")))


def test_every_table_has_all_of_its_rows_and_columns(page: Path) -> None:
    data = json.loads(page.with_suffix(".json").read_text())
    for name, run in SPEC.runs.items():
        tables = data[name]["tables"]
        assert list(tables) == list(run.study.tables)
        for key, table in run.study.tables.items():
            found = tables[key]
            assert len(found["rows"]) == len(table.arms or table.differences) or not table.arms
            assert set(table.measures) <= {label.removesuffix(" by seed") for label in found["columns"]}


def test_a_head_that_senses_the_wish_itself_has_no_error_to_it(page: Path) -> None:
    found = json.loads(page.with_suffix(".json").read_text())["core.sensed"]["sga_sft"]
    assert found[" (wish)"]["sensed"]["mean"] == 0
    assert found[" (wish)"]["gain"]["mean"] == 1
    assert found[""]["gain"]["mean"] > 0.1  # the world's own predictor, against the medians
    assert found["shares"][" (wish)"][0] == 1


def test_an_answer_that_is_the_reference_wins_nothing(page: Path) -> None:
    table = json.loads(page.with_suffix(".json").read_text())["core"]["tables"]["table1"]
    assert table["rows"]["sga_sft"]["win rate"]["mean"] == 0
    assert 0 < table["rows"]["sft"]["win rate"]["mean"] < 1
    assert table["rows"]["sga_sft"]["off wish"]["mean"] < table["rows"]["sft"]["off wish"]["mean"]


def test_the_page_shows_the_papers_numbers_and_every_figure(page: Path) -> None:
    text = page.read_text()
    assert "| HelpSteer2 Average | 43.00 | 44.30 | 36.90 | 54.60 | 55.90 | 55.60 |" in text
    assert "| sga_sft − sft | win rate | +7.80 +6.70 +19.00 |" in text
    titles = [figure.title for figure in (SPEC.runs["core"].sensed, SPEC.runs["core"].radar) if figure]
    assert all(f"## {title}" in text for title in titles)
    assert "**Largest gain**" in text
    assert "| spa_sga_floors − adversarial |" in text
    assert page.with_name("RESULTS-radar.svg").read_text().startswith("<svg")
    assert STEERED.names[0] not in text.partition("## Not here")[2]


@pytest.mark.parametrize(("data", "split"), [("helpsteer2", "validation"), ("ultrafeedback", "test")])
def test_a_real_study_has_the_arms_and_nothing_of_the_world(tmp_path: Path, spa: Any, data: str, split: str) -> None:
    reward = "{path: /rm, output: rewards, attributes: {helpfulness: 0}}"
    real = ["--paper", "sga", "--model", "org/8b", "--reward", reward, "--data", data]
    status, out, err = spa("reproduce", *real, "--configs", tmp_path / "c", "--out", tmp_path / "o", "--json")
    assert status == 0, err
    (path,) = json.loads(out.splitlines()[-1])["configs"]
    text = Path(path).read_text()
    written = yaml.safe_load(text)
    assert "tones" not in text
    assert "harmless" not in text
    assert written["arms"]["sga_dpo"] == {"train.method": "sga_dpo"}  # its paper's settings
    assert written["arms"]["half"]["steer"] == dict.fromkeys(written["objectives"], 0.5)
    assert not {"truth", "levels", "adversarial", "floors"} & written["arms"].keys()
    assert written["evaluation"]["judge"]["output"] == "rewards"
    assert written["evaluation"]["prompts"]["split"] == split
    assert written["evaluation"].get("pairwise", {}).get("reference") == ("response" if data == "helpsteer2" else None)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--model", "m", "--data", "helpsteer2"], "--reward: missing"),
        (["--model", "m", "--data", "helpsteer2", "--reward", "r", "--judge", "j"], "--judge: not of this paper"),
        (["--model", "m", "--data", "honeset", "--reward", "r"], "--data honeset: give helpsteer2 or ultrafeedback"),
    ],
)
def test_a_wrong_call_is_told_in_one_line(tmp_path: Path, spa: Any, given: list[str], told: str) -> None:
    status, _, err = spa("reproduce", "--paper", "sga", *given, "--configs", tmp_path / "c")
    assert status == 2
    assert told in err
    assert not (tmp_path / "c").exists()
