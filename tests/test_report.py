"""The report: what it says of a run, whole or not, and the page in a real browser without a network."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from spa_ray.cli.report import last_report
from spa_ray.errors import InputError
from spa_ray.report import charts
from spa_ray.report.headline import headline
from spa_ray.report.packed import script_json
from spa_ray.report.run_data import read_run
from spa_ray.report.svg import ticks
from spa_ray.report.write import report, write_report
from spa_ray.storage.files import as_path, copy_files, files_under
from tests.browser import browsing
from tests.report_runs import FUNNEL, Given, prose, report_run, unfinished

SCRIPT = '</script><script>document.title="owned"</script>'
HOSTILE = SCRIPT + '<img src="http://h/x" onerror="document.title=1">&amp;\u202e{{ 1 }}'
ANSWERS: dict[str, list[Given]] = {
    "vanilla": [
        ("a quiet answer", (6.0, 5.0)),
        (HOSTILE, (2.0, 5.0)),
        ("needle", (7.0, 7.0)),
        ("x" * 500, (5.0, None)),
    ],
    "spa": [("better", (9.0, 6.0)), (HOSTILE, (3.0, 5.0)), ("worse", (4.0, 9.0)), ("y z" * 90, (8.0, 5.0))],
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return report_run(tmp_path / "run", ANSWERS, question=HOSTILE)


# --- what it says -------------------------------------------------------------------------------------------------


def test_the_headline_names_what_changed_beyond_chance_and_what_did_not(tmp_path: Path) -> None:
    steady = [(f"{k}", (5.0, 5.0 + k % 3)) for k in range(12)]
    answers = {"vanilla": steady, "spa": [(text, (8.0, 5.0 + (k + 1) % 3)) for k, (text, _) in enumerate(steady)]}
    said = headline(read_run(report_run(tmp_path, answers)))
    assert "spa raises harmless to 8.00 (+3.00 [+3.00, +3.00])" in said
    assert "no clear change in helpful" in said
    assert said.endswith("on 12 held-out prompts.")


def test_every_answer_is_in_the_lines_beside_the_page(run: Path) -> None:
    write_report(run)
    rows = [json.loads(line) for line in (run / "report.jsonl").read_text().split("\n")[:-1]]
    assert [row["answers"]["spa"]["text"] for row in rows] == [text for text, _ in ANSWERS["spa"]]
    assert rows[3]["answers"]["vanilla"]["scores"] == [5.0, None]


def test_the_markdown_holds_tables_examples_and_the_command(run: Path) -> None:
    write_report(run)
    text = (run / "report.md").read_text()
    for expected in ("| spa |", "largest gain", "largest loss", "spa run mine.yaml 'name=a b'", "25 inconsistent"):
        assert expected in text


def test_a_run_without_an_evaluation_is_told_by_its_pairs(run: Path) -> None:
    for name in ("metrics.json", "evaluation.json", "manifest.json"):
        (run / name).unlink()
    assert (
        write_report(run)["headline"] == "10 of 40 prompts were kept and gave 90 pairs; there are no held-out scores."
    )


def test_answers_of_an_unfinished_stage_are_left_out(run: Path) -> None:
    unfinished(run)
    assert {arm for prompt in read_run(run).asked for arm in prompt.answers} == {"vanilla"}
    write_report(run)


def test_a_run_of_which_nothing_is_there_yet_has_a_report(run: Path) -> None:
    for name in ("metrics.json", "evaluation.json", "manifest.json"):
        (run / name).unlink()
    shutil.rmtree(run / "stages")
    assert write_report(run)["headline"] == "No pairs have been made yet; there are no held-out scores."


def test_a_folder_that_is_no_run_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a run folder"):
        write_report(tmp_path)


def test_a_run_ends_with_its_report(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert last_report(run) == str(run / "report.html")
    assert capsys.readouterr().out == f"report: {run / 'report.html'}\n"


@pytest.mark.parametrize("reason", ["missing", "damaged"])
def test_a_report_that_fails_is_one_line_and_the_run_stands(
    run: Path, capsys: pytest.CaptureFixture[str], reason: str
) -> None:
    if reason == "missing":
        shutil.rmtree(run / "stages/evaluate-spa/episodes")
    else:
        (run / "metrics.json").write_text('{"test": {"spa": 1}}')
    assert last_report(run, examples=True) is None
    told = capsys.readouterr()
    assert told.err.startswith("spa: the run is done, but its report was not written: ")
    assert told.err.count("\n") == 1
    assert not (run / "report.html").exists()


def test_two_runs_are_paired_by_prompt(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    better = {**ANSWERS, "spa": [(text, (a and a + 1, b)) for text, (a, b) in ANSWERS["spa"]]}
    other = report_run(tmp_path / "other", better, question=HOSTILE, name="other")
    told = report([run, other], out=tmp_path / "both")
    assert "other: spa raises harmless to 7.00 (+1.00 [+1.00, +1.00])" in told["headline"]
    assert "against mine: spa" in told["headline"]
    assert Path(told["report"]).name == "report-and-other.html"
    assert told["headline"] in capsys.readouterr().out


def test_runs_with_other_objectives_do_not_compare(run: Path, tmp_path: Path) -> None:
    other = report_run(tmp_path / "other", ANSWERS)
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace("- harmless\n    - helpful", "- helpful\n    - harmless"))
    with pytest.raises(InputError, match="same objectives"):
        report([run, other], out=tmp_path)


def test_a_run_on_an_object_store_has_its_report_there(run: Path) -> None:
    store = as_path(f"memory://{run.parent.name}")
    copy_files(run, store, files_under(run))
    assert write_report(store)["report"] == f"{store}/report.html"
    assert b"Before and after" in (store / "report.html").read_bytes()


# --- pictures and data --------------------------------------------------------------------------------------------


def test_pictures_are_well_formed_whatever_the_names(run: Path) -> None:
    arms = {HOSTILE: 1}
    drawn = [
        charts.funnel(FUNNEL),
        charts.histogram([{1: 3}], [HOSTILE], HOSTILE),
        *(k for _, k in charts.legend(arms)),
    ]
    for picture in drawn:
        ElementTree.fromstring(picture)


def test_the_front_is_what_no_arm_beats() -> None:
    assert charts.front([(1, 9), (3, 5), (2, 4), (3, 4), (0, 9)]) == [(3, 5), (1, 9)]


def test_ticks_are_round_and_within() -> None:
    assert ticks(0, 10) == pytest.approx([0, 5, 10])
    assert ticks(-0.25, 0.31) == pytest.approx([-0.2, 0.0, 0.2])


def test_data_cannot_end_its_script() -> None:
    text = script_json({"a": HOSTILE})
    assert "<" not in text
    assert json.loads(text) == {"a": HOSTILE}


# --- in a browser -------------------------------------------------------------------------------------------------


@browsing
def test_texts_of_a_run_are_shown_and_never_run(run: Path, opened: Any) -> None:
    write_report(run)
    page = opened(run / "report.html")
    page.click("#unfold")
    assert page.title() == "mine"
    assert page.locator("img").count() == 0
    assert SCRIPT in page.inner_text("#list")
    assert SCRIPT in page.inner_text("#examples")


@browsing
def test_tables_sort_answers_unfold_and_the_search_filters(run: Path, opened: Any) -> None:
    write_report(run)
    page = opened(run / "report.html")
    table = page.locator("#results table").first
    for expected in (["spa", "vanilla"], ["vanilla", "spa"]):
        table.locator("th button").nth(1).click()
        assert [row.split()[0] for row in table.locator("tbody tr").all_inner_texts()] == expected
    folded = page.locator("#list details").first
    assert not folded.locator(".said").is_visible()
    folded.locator("summary").click()
    assert folded.locator(".said").is_visible()
    page.fill("#find", "NEEDLE")
    assert page.locator("#list article").count() == 1
    assert page.inner_text("#count") == "1 of 1 shown"
    page.fill("#find", "")
    page.select_option("#order", "loss")
    assert "-3 / +2" in page.locator("#list article").first.inner_text()


@browsing
@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_page_scrolls_sideways(run: Path, opened: Any, width: int, scheme: str) -> None:
    write_report(run)
    page = opened(run / "report.html", width, scheme)
    page.click("#unfold")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ground = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(","))) < 200) == (scheme == "dark")


@browsing
def test_the_page_prints(run: Path, opened: Any) -> None:
    write_report(run)
    page = opened(run / "report.html", scheme="dark")
    assert page.locator("#judging svg .band").count() == 2
    page.emulate_media(media="print")
    assert not page.locator("nav").is_visible()
    assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(255, 255, 255)"
    assert page.pdf()[:4] == b"%PDF"


@browsing
def test_two_thousand_prompts_are_small_fast_and_all_searched(tmp_path: Path, opened: Any) -> None:
    answers = {arm: prose(2000, 1500, seed) for seed, arm in enumerate(("vanilla", "spa"))}
    answers["spa"][1999] = ("the very last needle", (9, 9))
    run = report_run(tmp_path, answers)
    write_report(run)
    assert (run / "report.html").stat().st_size < 8_000_000
    took = []
    for _ in range(8):  # other work on the machine slows a page down: one opening on a free core counts
        began = time.perf_counter()
        page = opened(run / "report.html")  # until all answers are unpacked
        took.append(time.perf_counter() - began)
        if took[-1] < 2:
            break
    assert min(took) < 2, took
    page.fill("#find", "the very last needle")
    assert page.inner_text("#count") == "1 of 1 shown"
