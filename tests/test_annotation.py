"""Human annotation: blind sheets out, filled ones in, and a run's judges against what people said."""

from __future__ import annotations

import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from spa_ray.data.schemas import EPISODES, JUDGEMENTS
from spa_ray.errors import InputError
from spa_ray.evaluation.annotation import as_csv, as_form, make_sheet, read_sheet
from spa_ray.pipeline.annotate import sheet_in, sheet_out
from tests.browser import browsing
from tests.scripted import scripted_config

OBJECTIVES = ["harmless", "helpful"]
PROMPTS = [
    {"prompt_id": f"test/{k}", "messages": [{"role": "user", "content": f"question {k}"}],
     "a": f"ours {k}", "b": f"theirs {k}"}
    for k in range(40)
]  # fmt: skip


def fill(rows: list[dict[str, str]], say: Any) -> str:
    return as_csv([{**row, **{name: say(row) for name in OBJECTIVES}} for row in rows])


def test_sides_and_order_are_shuffled_by_the_seed_and_nothing_names_a_model() -> None:
    rows, key = make_sheet(PROMPTS, OBJECTIVES, limit=30, seed=1)
    assert (rows, key) == make_sheet(list(reversed(PROMPTS)), OBJECTIVES, limit=30, seed=1)
    assert make_sheet(PROMPTS, OBJECTIVES, limit=30, seed=2) != (rows, key)
    assert [row["id"] for row in rows] == [str(k + 1) for k in range(30)]
    assert 5 < sum(entry["a_first"] for entry in key) < 25
    assert list(rows[0]) == ["id", "conversation", "answer_1", "answer_2", *OBJECTIVES]
    for row, entry in zip(rows, key, strict=True):
        assert row["answer_1"].startswith("ours") == entry["a_first"]
        assert entry["prompt_id"] not in row.values()


def test_what_is_filled_in_comes_back_as_verdicts_on_the_same_model() -> None:
    rows, key = make_sheet(PROMPTS, OBJECTIVES, limit=None, seed=0)
    ours = fill(rows, lambda row: "1" if row["answer_1"].startswith("ours") else " 2 ")
    assert set(read_sheet(ours, key, OBJECTIVES, where="s")["helpful"]) == {1.0}
    theirs = fill(rows, lambda row: "2" if row["answer_1"].startswith("ours") else "1")
    assert set(read_sheet(theirs.replace(",", ";"), key, OBJECTIVES, where="s")["harmless"]) == {-1.0}
    assert set(read_sheet(fill(rows, lambda row: "TIE"), key, OBJECTIVES, where="s")["helpful"]) == {0.0}
    assert np.isnan(read_sheet(as_csv(rows), key, OBJECTIVES, where="s")["helpful"]).all()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("id,harmless\n1,1\n", "s: there is no column 'helpful'"),
        ("id,harmless,helpful\n99,1,1\n", "s: id '99': the key has no such row"),
        ("id,harmless,helpful\n1,1,A\n", "s: id 1: helpful: 'a' is not one of 1, 2, tie"),
        ("", "s: there is no column 'id'"),
    ],
)
def test_a_sheet_that_cannot_be_read_is_told_with_its_place(text: str, told: str) -> None:
    _, key = make_sheet(PROMPTS, OBJECTIVES, limit=3, seed=0)
    with pytest.raises(InputError, match=re.escape(told)):
        read_sheet(text, key, OBJECTIVES, where="s")


def test_people_see_all_turns_of_a_conversation() -> None:
    turns = [("user", "first"), ("assistant", "second"), ("user", "third")]
    prompts = [{**PROMPTS[0], "messages": [{"role": role, "content": said} for role, said in turns]}]
    rows, _ = make_sheet(prompts, OBJECTIVES, limit=None, seed=0)
    assert rows[0]["conversation"] == "User: first\n\nAssistant: second\n\nUser: third"
    found = Tags()
    found.feed(as_form(rows, dict.fromkeys(OBJECTIVES, ""), "sheet.csv"))
    assert rows[0]["conversation"] in found.text


def test_a_cell_is_never_a_formula_of_the_spreadsheet() -> None:
    prompts = [{**PROMPTS[0], "a": '=HYPERLINK("http://x")', "b": "fine, 5 - 3"}]
    (row,) = csv.DictReader(io.StringIO(as_csv(make_sheet(prompts, OBJECTIVES, limit=None, seed=0)[0])))
    assert sorted([row["answer_1"], row["answer_2"]]) == ['\'=HYPERLINK("http://x")', "fine, 5 - 3"]


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_form_is_one_page_without_a_network_and_answers_stay_text() -> None:
    attack = "</pre></form><script>alert(1)</script><img src=http://x>"
    rows, _ = make_sheet([{**p, "a": attack} for p in PROMPTS[:3]], OBJECTIVES, limit=None, seed=0)
    page = as_form(rows, dict.fromkeys(OBJECTIVES, "means </script> this"), "sheet.csv")
    found = Tags()
    found.feed(page)
    names = [tag for tag, _ in found.tags]
    assert names.count("script") == names.count("form") == 1
    assert not {"img", "link", "iframe"} & set(names)
    assert not any({"src", "href", "action"} & set(attributes) for _, attributes in found.tags)
    radios = [attributes["name"] for tag, attributes in found.tags if tag == "input"]
    assert len(radios) == 3 * 2 * 3
    assert len(set(radios)) == 3 * 2
    assert found.text.count(attack) == 3


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with the answers of two models to 20 prompts, a further judge and comparisons."""
    folder = tmp_path / "run"
    config = scripted_config(run_dir=str(folder), evaluation={"pairwise": {}, "judges": {"second": "base"}})
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"arms": {"spa": config.model_dump(mode="json")}}))
    scores = {
        "main": {"spa": lambda k: [9.0, 3.0], "vanilla": lambda k: [2.0, 3.0]},
        "second": {"spa": lambda k: [1.0, 5.0 + k % 2], "vanilla": lambda k: [4.0, 5.5]},
    }
    for judge, arms in scores.items():
        for arm, given in arms.items():
            rows = [
                {
                    "prompt_id": f"test/{k}", "messages": [{"role": "user", "content": f"question {k}"}],
                    "responses": [{"text": f"{'ours' if arm == 'spa' else 'theirs'} {k}", "scores": given(k)}],
                    "scores": [given(k)],
                }
                for k in range(20)
            ]  # fmt: skip
            at = folder / "stages" / f"{judge}-{arm}" / "episodes"
            at.mkdir(parents=True)
            pq.write_table(pa.Table.from_pylist(rows, schema=EPISODES), at / "part.parquet")
    verdicts = [
        {"prompt_id": f"test/{k}", "a": "spa", "b": "vanilla", "objective": name, "order": order,
         "verdict": "a" if name == "harmless" or order == "ab" else "b"}
        for k in range(20) for name in OBJECTIVES for order in ("ab", "ba")
    ]  # fmt: skip
    at = folder / "stages" / "pairwise-x" / "judgements"
    at.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(verdicts, schema=JUDGEMENTS), at / "part.parquet")
    record = {
        "answers": {arm: str(folder / "stages" / f"main-{arm}" / "episodes") for arm in ("vanilla", "spa")},
        "stages": {},
        "judges": {
            "score:second": {arm: f"second-{arm}" for arm in ("vanilla", "spa")},
            "pairwise": {"spa": "pairwise-x"},
        },
    }
    (folder / "evaluation.json").write_text(json.dumps(record))
    return folder


def test_people_are_held_against_every_judge_of_the_run(run: Path, tmp_path: Path) -> None:
    """On the first objective people like all answers of the arm, on the second half of them, as the second judge."""
    sheet = tmp_path / "sheet.csv"
    made = sheet_out(run, out=sheet, arm=None, against="vanilla", limit=None, seed=3)
    assert made["pairs"] == 20
    assert "spa" not in sheet.read_text()
    assert "vanilla" not in sheet.with_suffix(".html").read_text()
    rows = list(csv.DictReader(io.StringIO(sheet.read_text())))
    for row in rows:
        first = row["answer_1"].startswith("ours")
        odd = int(row["conversation"].split()[-1]) % 2
        row["harmless"] = "1" if first else "2"
        row["helpful"] = "1" if first == bool(odd) else "2"
    sheet.write_text(as_csv(rows))
    found = sheet_in(sheet)["objectives"]
    harmless, helpful = (found[name] for name in OBJECTIVES)
    assert (harmless["people"]["wins"], helpful["people"]["wins"], helpful["people"]["losses"]) == (20, 10, 10)
    accuracy = {
        judge: [of["judges"][judge]["accuracy"]["mean"] for of in (harmless, helpful)] for judge in harmless["judges"]
    }
    assert accuracy == {"main": [1.0, 0.5], "second": [0.0, 1.0], "pairwise": [1.0, 0.5]}
    assert helpful["judges"]["second"]["kappa"]["mean"] == pytest.approx(1)
    assert harmless["judges"]["main"]["kappa"] is None  # both say one thing of everything


def test_no_sheet_tells_whose_answer_is_whose(run: Path, tmp_path: Path) -> None:
    """No model, judge, prompt id or folder of the run, and not the draw's seed, which would give the sides away."""
    made = sheet_out(run, out=tmp_path / "sheet.csv", arm="spa", against="vanilla", limit=5, seed=71834)
    for file in ("form", "sheet"):
        text = Path(made[file]).read_text(encoding="utf-8")
        hidden = ("spa", "vanilla", "second", "main", "test/\\d+", "71834", re.escape(str(run)), "a_first")
        assert not [word for word in hidden if re.search(rf"\b{word}\b", text)]
    assert json.loads(Path(made["key"]).read_text())["a"] == "spa"


def test_what_is_missing_is_told(run: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.csv"
    options: dict[str, Any] = {"out": sheet, "against": "vanilla", "limit": 2, "seed": 0}
    with pytest.raises(InputError, match="no answers of 'spy'; one of vanilla, spa"):
        sheet_out(run, arm="spy", **options)
    assert not sheet.exists()
    sheet_out(run, arm="spa", **options)
    with pytest.raises(InputError, match=r"sheet\.csv: is there already"):
        sheet_out(run, arm="spa", **options)
    with pytest.raises(InputError, match=r"sheet\.csv: nothing is filled in"):
        sheet_in(sheet)
    with pytest.raises(InputError, match=r"other\.key\.json: no such file; give --key"):
        sheet_in(sheet.rename(tmp_path / "other.csv"))


# --- the form in a browser -----------------------------------------------------------------------------------------


def click(page: Any) -> None:
    """On the first objective the arm wins always, on the second at odd questions; the rest is a tie."""
    for section in page.locator("section").all():
        number = section.locator("h2").inner_text()
        ours_first = section.locator(".two pre").first.inner_text().startswith("ours")
        odd = int(section.locator("> pre").inner_text().split()[-1]) % 2
        section.locator(f'input[name="{number}.0"][value="{1 if ours_first else 2}"]').check()
        section.locator(f'input[name="{number}.1"][value="{(1 if ours_first else 2) if odd else "tie"}"]').check()


@browsing
@pytest.mark.parametrize("width", [390, 1440])
def test_what_is_clicked_is_saved_and_read_in_again(run: Path, tmp_path: Path, opened: Any, width: int) -> None:
    sheet = tmp_path / "sheet.csv"
    made = sheet_out(run, out=sheet, arm="spa", against="vanilla", limit=None, seed=3)
    page = opened(Path(made["form"]), width, ready="form")
    assert page.locator("section").count() == 20
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("#count").inner_text() == "0 of 40 judged"
    click(page)
    assert page.locator("#count").inner_text() == "40 of 40 judged"
    page.reload()  # a browser that was closed: what was chosen is there
    assert page.locator("#count").inner_text() == "40 of 40 judged"
    with page.expect_download() as download:
        page.click("#save")
    assert download.value.suggested_filename == "sheet.csv"
    download.value.save_as(tmp_path / "filled.csv")
    found = sheet_in(tmp_path / "filled.csv", key_file=Path(made["key"]))["objectives"]
    people = {name: [found[name]["people"][part] for part in ("wins", "ties", "losses", "n")] for name in OBJECTIVES}
    assert people == {"harmless": [20, 0, 0, 20], "helpful": [10, 10, 0, 20]}
    agreed = found["helpful"]["judges"]["second"]["accuracy"]
    assert 0 <= agreed["low"] <= agreed["mean"] <= agreed["high"] <= 1


@browsing
def test_choices_of_another_sheet_at_the_same_place_are_not_this_ones(run: Path, tmp_path: Path, opened: Any) -> None:
    options: dict[str, Any] = {"arm": "spa", "against": "vanilla", "limit": 5}
    form = Path(sheet_out(run, out=tmp_path / "sheet.csv", seed=1, **options)["form"])
    page = opened(form, ready="form")
    click(page)
    for file in tmp_path.glob("sheet.*"):
        file.unlink()
    sheet_out(run, out=tmp_path / "sheet.csv", seed=2, **options)
    page.reload()
    assert page.locator("#count").inner_text() == "0 of 10 judged"
