"""`spa reproduce`: published numbers that agree with themselves, directions, the page, the configs."""

from __future__ import annotations

import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from spa_ray.cli.reproduce import reproduction, seed_configs, write_page
from spa_ray.config.study import Reproduction
from spa_ray.data.schemas import EPISODES
from spa_ray.errors import InputError
from spa_ray.evaluation.bootstrap import Interval
from spa_ray.evaluation.metrics import hh_lambda
from spa_ray.evaluation.published import published
from spa_ray.evaluation.reproduction import AGREES, DIFFERS, MIXED, UNCLEAR, verdict
from tests.study_runs import Scores, write_run
from tests.test_distributions import FUNNEL

SPA = published("spa")
SPEC = reproduction("spa")


@pytest.mark.parametrize("paper", ["spa", "sga"])
def test_every_published_row_has_a_number_a_column(paper: str) -> None:
    for table in published(paper).values():
        rows = [*table.rows.values(), *table.differences.values()]
        assert rows
        assert {len(row) for row in rows} == {len(table.columns)}


def test_the_published_hh_scores_are_those_of_the_published_means() -> None:
    table = SPA["table3"]
    for harmless, helpful, *printed in table.rows.values():
        for lam, given in zip((5, 10, 20), printed, strict=True):
            assert round(hh_lambda(harmless, helpful, lam), 2) == given


def test_the_published_tables_agree_where_they_print_the_same_model() -> None:
    one, three, iterations = SPA["table1"], SPA["table3"], SPA["iterations"]
    assert three.rows["SPA"][:2] == one.rows["SPA"][:2]
    assert iterations.rows["SPA"][0] == one.rows["SPA"][one.columns.index("Llama WildGuard helpful")]
    four = SPA["table4"]
    assert four.rows["Vanilla"][2] == one.rows["Vanilla"][2]
    assert four.rows["Vanilla"][3] != one.rows["Vanilla"][3]  # 6.11 and 6.09: as the paper prints them


def test_not_all_of_what_the_text_says_is_in_its_tables() -> None:
    """«SPA improves alignment across all metrics», and «best results»: not beside DPO in Table 4."""
    four = SPA["table4"]
    assert all(a > b for a, b in zip(four.rows["SPA_DPO"], four.rows["SPA"], strict=True))
    one = SPA["table1"]
    sft, vanilla = (list(zip(one.rows[name][::2], one.rows[name][1::2], strict=True)) for name in ("SFT", "Vanilla"))
    below = [hh_lambda(*a, 5) < hh_lambda(*b, 5) for a, b in zip(sft, vanilla, strict=True)]
    assert (len(below), sum(below)) == (6, 3)


SGA = published("sga")
MODELS = ("Llama3.2-1B", "Llama3.2-3B", "Llama3.1-8B", "Qwen3-4B", "Qwen2.5-7B", "Qwen3-8B")
DATA_SETS = ("HH-RLHF", "UltraFeedback", "HelpSteer2")


def test_all_108_win_rates_of_sga_s_table_1_are_means_of_its_table_2() -> None:
    one, two = SGA["table1"], SGA["table2"]
    for data, model, method in itertools.product(DATA_SETS, MODELS, one.columns):
        of_data = [at for at, column in enumerate(two.columns) if column.startswith(data)]
        mean = statistics.fmean(two.rows[f"{model} {method}"][at] for at in of_data)
        printed = one.rows[f"{data} {model}"][one.columns.index(method)]
        assert abs(mean - printed) <= 0.05 + 1e-9, (data, model, method)
    assert len(one.rows) * len(one.columns) == 108 + 18


@pytest.mark.parametrize("data", DATA_SETS)
def test_sga_s_averages_are_those_of_its_models(data: str) -> None:
    table = SGA["table1"]
    for at, printed in enumerate(table.rows[f"{data} Average"]):
        assert abs(statistics.fmean(table.rows[f"{data} {model}"][at] for model in MODELS) - printed) <= 0.05 + 1e-9


def test_sga_s_tables_agree_where_they_print_the_same_models() -> None:
    one, five = SGA["table1"], SGA["table5"]
    for model in ("Llama3.2-3B", "Qwen3-4B"):
        sensed = [one.rows[f"{data} {model}"][one.columns.index("SGA_SFT")] for data in five.columns]
        assert five.rows[f"{model} SGA_SFT"] == sensed


def test_sga_is_not_safe_by_priority() -> None:
    """Helpful is won at the expense of harmless: SFT is above SGA_DPO on harmless in every model."""
    table = SGA["table2"]
    at = table.columns.index("HH-RLHF Harmless")
    assert all(table.rows[f"{m} SFT"][at] > table.rows[f"{m} SGA_DPO"][at] for m in MODELS)


def test_differences_are_of_rows_or_as_the_text_gives_them() -> None:
    assert SPA["table1"].difference("SPA", "SFT", "Llama SafeRLHF helpful") == 1.57
    assert SPA["figure4"].difference("SPA", "without denoising", "helpful") == 0.1
    assert SPA["table1"].difference("SPA", "IPO", "Llama SafeRLHF helpful") is None
    with pytest.raises(InputError, match="are not here"):
        published("gpt")


@pytest.mark.parametrize(
    ("paper", "ours", "said"),
    [
        ([0.3, 0.1], (0.1, 0.2), AGREES),
        ([-0.3], (-0.2, -0.1), AGREES),
        ([0.3], (-0.2, -0.1), DIFFERS),
        ([0.3], (-0.1, 0.2), UNCLEAR),
        ([0.3, -0.1], (0.1, 0.2), MIXED),
        ([0.3, 0.0], (0.1, 0.2), MIXED),
    ],
)
def test_a_direction_is_a_sign_that_the_interval_bears_out(paper: list[float], ours: Any, said: str) -> None:
    assert verdict(paper, Interval(sum(ours) / 2, *ours, 9)) == said


@pytest.mark.parametrize("paper", ["spa", "sga", "beyond"])
def test_the_package_study_names_arms_columns_and_rows_that_there_are(paper: str) -> None:
    spec = reproduction(paper)
    numbers = published(spec.paper) if spec.paper else {}
    made = {name: seed_configs(name, run, [], seeds=1, real={}, out="/x")[0] for name, run in spec.runs.items()}
    for name, run in spec.runs.items():
        configs = made[name]
        arms = {"vanilla", *configs}
        if run.start is not None:
            assert list(made).index(run.start.run) < list(made).index(name)
            assert run.start.arm in made[run.start.run]
            arms |= {run.start.arm, *made[run.start.beside]}
            assert not configs.keys() & made[run.start.beside].keys()
        shown = [run.sensed, run.steering, run.radar, run.costs, run.cases]
        assert {arm for figure in shown if figure for arm in figure.arms} <= arms
        for table in run.study.tables.values():
            assert {*table.arms, *itertools.chain(*table.differences)} <= arms
            evaluation = configs[next(iter(configs))].evaluation
            assert {*table.families} <= {*evaluation.families}
            assert table.judge in ("", *evaluation.judges)
            if table.paper is None:
                continue
            theirs = numbers[table.paper.table]
            theirs = theirs.turned() if table.paper.turned else theirs
            assert set(table.paper.rows) <= arms
            known = {*theirs.rows, *itertools.chain(*(key.split(" − ") for key in theirs.differences))}
            assert set(table.paper.rows.values()) <= known
            assert {*itertools.chain(*table.paper.columns.values())} <= set(theirs.columns)
            assert {*itertools.chain(*table.paper.compare)} <= set(table.paper.rows)


LOW: Scores = {"a": (4, 2), "b": (6, 2), "c": (8, 2)}
HIGH: Scores = {"a": (7, 5), "b": (8, 5), "c": (9, 5)}


def _point(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean, "high": mean, "n": 2}


def _write_candidates(path: Path) -> None:
    """One prompt: two candidates, of a third a judgement failed, and the refined answer."""
    kinds = [("candidate", [5.0, 3.0]), ("candidate", [6.0, 3.0]), ("candidate", [None, None]), ("refined", [8.0, 9.0])]
    responses = [{"index": i, "kind": kind, "text": "x", "scores": scores} for i, (kind, scores) in enumerate(kinds)]
    pq.write_table(pa.Table.from_pylist([{"prompt_id": "a", "responses": responses}], schema=EPISODES), path)


SHARES = [k / 20 for k in range(1, 21)]
CURVE = {  # unsteady, level, a drop at 40 %
    "arms": ["spa"],
    "shares": SHARES,
    "prompts": [2 * k for k in range(1, 21)],
    "det": SHARES,
    "by_det": [_point([0.9, 0.3, 0.9, 0.8][k] if k < 4 else 0.8 if k < 7 else 0.5) for k in range(20)],
    "random": [_point(0.5)] * 20,
}


def test_the_page_holds_both_tables_and_the_directions(tmp_path: Path) -> None:
    arms = ["vanilla", *SPEC.runs["core"].config["arms"]]
    families = ("test", "wild", "trigger", "utility")
    answers = {arm: dict.fromkeys(families, LOW if arm in ("vanilla", "no_filter") else HIGH) for arm in arms}
    chosen = {"core": SPEC.runs["core"]}
    folders = {"core": [write_run(tmp_path / f"s{i}", answers, seed=i) for i in range(2)]}
    rate = {"wins": 3, "ties": 1, "losses": 0}
    rates = {"spa": {"against": "vanilla", "families": {"test": {"harmless": rate, "helpful": rate}}}}
    for folder in folders["core"]:
        (folder / "win_rates.json").write_text(json.dumps(rates))
        (folder / "rv.json").write_text(json.dumps([CURVE]))
        for arm in SPEC.runs["core"].funnel.arms:  # type: ignore[union-attr]
            (folder / "stages" / f"build-{arm}" / "funnel.json").write_text(json.dumps(FUNNEL))
        _write_candidates(folder / "stages" / "generate-spa" / "episodes" / "part.parquet")
    page = write_page(SPEC, chosen, folders, tmp_path / "RESULTS.md", command="spa reproduce")  # type: ignore[arg-type]
    text = page.read_text()
    assert "\n    spa reproduce\n" in text
    assert "| SPA | 9.90 | 7.14 | 8.85 |" in text
    assert "| spa | 8.00 [7.00, 9.00] | 5.00 [5.00, 5.00] |" in text
    assert "| spa − vanilla | helpful | +1.91 +0.86 | +3.00 [+3.00, +3.00] | agrees |" in text
    assert "| spa − sft | helpful | +1.57 +0.85 | +0.00 [+0.00, +0.00] | no difference here |" in text
    assert "2 seeds (0, 1)" in text
    assert "| spa | 6 / 2 / 0  87.5% | 6 / 2 / 0  87.5% |" in text
    assert "| 100% | 40 | 0.500 [0.500, 0.500] | 0.500 [0.500, 0.500] |" in text
    assert "random orders at 2 of 2 seeds, the steepest step by -0.300: a sharp drop" in text
    assert "By the model itself: helpful\n\n|  | 3 | 9 | mean | scores |" in text
    assert "| candidate | 100.0% | 0.0% | 3.00 | 4 |\n| refined | 0.0% | 100.0% | 9.00 | 2 |" in text
    assert "| kept | 40 | 40 | 40 | 40 |" in text
    assert "## Not here" in text
    found = json.loads((tmp_path / "RESULTS.json").read_text())["core.table1"]
    assert {c["verdict"] for c in found if (c["a"], c["b"]) == ("spa", "vanilla")} == {AGREES}
    assert "**The paper gives no one direction.**" in text  # of Table 2
    assert text.count("Of ") + text.count("The paper gives no") >= len(SPEC.runs["core"].study.tables)


def test_a_real_study_keeps_the_arms_and_nothing_of_the_world(tmp_path: Path, spa: Any) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text('{"prompt": "hello"}\n')
    real = ["--model", "org/8b", "--judge", "base", "--data", str(data)]
    status, out, _ = spa("reproduce", *real, "--configs", tmp_path / "c", "--out", tmp_path / "o", "--json")
    assert status == 0
    path, *others = json.loads(out.splitlines()[-1])["configs"]
    assert not others
    written = yaml.safe_load(Path(path).read_text())
    assert written["arms"] == SPEC.runs["core"].config["arms"]
    assert written["model"] == {"path": "org/8b"}
    assert written["evaluation"]["pairwise"] == {"judge": "base", "against": "vanilla"}
    assert written["evaluation"]["rv"] == 400
    assert "microworld" not in Path(path).read_text()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--model", "m"], "--judge: missing"),
        (["--paper", "gpt"], "--paper gpt: not here"),
        (["prompts.limt=3"], "prompts.limt: unknown key"),
    ],
)
def test_a_wrong_call_is_told_in_one_line(tmp_path: Path, spa: Any, given: list[str], told: str) -> None:
    status, _, err = spa("reproduce", *given, "--configs", tmp_path / "c")
    assert status == 2
    assert told in err
    assert not (tmp_path / "c").exists()


def test_a_study_whose_rows_are_of_two_kinds_is_refused() -> None:
    raw = SPEC.model_dump()
    raw["runs"]["core"]["study"]["tables"]["table1"]["differences"] = [["spa", "vanilla"]]
    with pytest.raises(ValueError, match="rows are arms or differences"):
        Reproduction.model_validate(raw)
