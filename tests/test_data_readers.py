"""Readers: where rows come from, file by file; formats' own traps; readers by dotted path."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spa_ray.config.plugs import load_dotted
from spa_ray.config.prompts import Prompts
from spa_ray.data.prompts import PromptCounts, read_prompts
from spa_ray.data.readers import Row, read_rows
from spa_ray.errors import InputError


def rows(source: Path | str, split: str | None = None) -> list[Row]:
    return list(read_rows(Prompts(source=str(source), split=split)))


def refusal(source: Path | str, split: str | None = None) -> str:
    with pytest.raises(InputError) as caught:
        rows(source, split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def values(source: Path | str, split: str | None = None) -> list[Any]:
    return [row.values for row in rows(source, split)]


# --- JSON ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_only_a_line_feed_ends_a_line_of_jsonl(tmp_path: Path, separator: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(f'{{"prompt": "a{separator}b"}}\n{{"prompt": "c"}}\n', encoding="utf-8", newline="\n")
    assert rows(path) == [
        Row(f"{path}:1", {"prompt": f"a{separator}b"}),
        Row(f"{path}:2", {"prompt": "c"}),
    ]


def test_jsonl_may_have_a_byte_order_mark_windows_line_ends_and_no_last_line_end(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"prompt": "b"}')
    assert [(r.place, r.values) for r in rows(path)] == [(f"{path}:1", {"prompt": "a"}), (f"{path}:3", {"prompt": "b"})]


def test_a_json_file_may_hold_one_object_a_line(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n', encoding="utf-8")
    assert values(path) == [{"prompt": "a"}, {"prompt": "b"}]


def test_items_of_a_json_array_are_numbered(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_bytes(b'\xef\xbb\xbf \n[{"prompt": "a"}, 3]')
    good, bad = rows(path)
    assert good == Row(f"{path}: item 1", {"prompt": "a"})
    assert bad == Row(f"{path}: item 2", problem="a row is an object with named columns, this is a whole number")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'[{"prompt": "a"},\n oops]', ":2: not JSON (Expecting value)"),
        (b'[\n"\xff"]', "not UTF-8 (byte 4 of the file is 0xff"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_a_broken_json_array_is_refused_as_a_whole(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "p.json"
    path.write_bytes(content)
    message = refusal(path)
    assert message.startswith(str(path))
    assert reason in message


# --- CSV -------------------------------------------------------------------------------------------------------------


def test_csv_cells_may_hold_commas_quotes_and_line_ends_and_rows_are_named_by_their_first_line(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_bytes(b'\xef\xbb\xbfprompt,k\r\n"a, ""b""\nc",1\r\n\r\nd,\r\n')
    assert rows(path) == [
        Row(f"{path}:2", {"prompt": 'a, "b"\nc', "k": "1"}),
        Row(f"{path}:5", {"prompt": "d", "k": None}),
    ]


def test_csv_rows_of_another_width_and_broken_quotes_are_bad_rows_and_the_rest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text('prompt,k\na,1,2\nb\n"c"d,1\ne,5\n', encoding="utf-8")
    wide, narrow, quotes, good = rows(path)
    assert wide == Row(f"{path}:2", problem="3 cells, the header names 2; quote commas")
    assert narrow == Row(f"{path}:3", problem="1 cells, the header names 2; quote commas")
    assert quotes.place == f"{path}:4"
    assert str(quotes.problem).startswith("not CSV (")
    assert good == Row(f"{path}:5", {"prompt": "e", "k": "5"})


def test_a_quote_that_is_never_closed_ends_the_file_with_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text('prompt\na\n"b\nc\n', encoding="utf-8")
    good, bad = rows(path)
    assert good.values == {"prompt": "a"}
    assert bad.place == f"{path}:3"
    assert bad.values is None


def test_a_long_csv_cell_is_read(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text(f"prompt\n{'x' * 200_000}\n", encoding="utf-8")
    assert len(values(path)[0]["prompt"]) == 200_000


def test_a_csv_header_that_names_a_column_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("prompt,prompt\na,b\n", encoding="utf-8")
    assert refusal(path) == f"{path}:1: the column 'prompt' stands twice in the header; rename one"


def test_a_csv_header_with_broken_quotes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text('"prompt"x,k\na,b\n', encoding="utf-8")
    assert f"{path}:1: not CSV (" in refusal(path)


def test_bytes_that_are_not_utf8_spoil_one_csv_row_and_not_the_file(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_bytes(b"prompt\na\n\xff\nb\n")
    counts = PromptCounts()
    kept = list(read_prompts(Prompts(source=str(path), on_bad_row="skip"), counts=counts))
    assert [row["messages"][0]["content"] for row in kept] == ["a", "b"]
    assert counts.first_bad == f"{path}:3: `prompt` is not valid Unicode (character 1); save the file as UTF-8"


def test_messages_in_a_csv_cell_are_json(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text('messages\n"[{""role"": ""user"", ""content"": ""Hi""}]"\n', encoding="utf-8")
    (row,) = read_prompts(Prompts(source=str(path)))
    assert row["messages"] == [{"role": "user", "content": "Hi"}]


# --- Parquet, folders, splits ----------------------------------------------------------------------------------------


def test_a_file_that_is_no_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    path.write_bytes(b"PAR1 not really")
    assert refusal(path).startswith(f"{path}: not a Parquet file that can be read (")


def test_a_folder_is_read_file_by_file_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("b.jsonl", "a.JSON", "sub/c.ndjson", ".hidden/d.jsonl", "_log.jsonl", "notes.txt"):
        (tmp_path / name).write_text(json.dumps({"prompt": name}) + "\n", encoding="utf-8")
    assert [v["prompt"] for v in values(tmp_path)] == ["a.JSON", "b.jsonl", "sub/c.ndjson"]


def test_a_split_of_a_folder_is_the_files_that_carry_its_name(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    for name in ("train.jsonl", "train-00000-of-00001.jsonl", "train/x.jsonl", "training.jsonl", "test.jsonl"):
        (tmp_path / name).write_text(json.dumps({"prompt": name}) + "\n", encoding="utf-8")
    assert sorted(v["prompt"] for v in values(tmp_path, "train")) == [
        "train-00000-of-00001.jsonl",
        "train.jsonl",
        "train/x.jsonl",
    ]
    assert "file of the split 'dev'" in refusal(tmp_path, "dev")


def test_a_folder_without_a_readable_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.doc").write_text("hello", encoding="utf-8")
    assert refusal(tmp_path).startswith(f"prompts.source: {tmp_path}: no file with rows in it; notes.doc is unknown")


def test_a_folder_of_text_files_alone_is_read_by_lines(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "README.txt"):
        (tmp_path / name).write_text(f"{name} 1\n{name} 2\n", encoding="utf-8")
    assert [v["prompt"] for v in values(tmp_path)] == ["a.txt 1", "a.txt 2", "b.txt 1", "b.txt 2"]


def test_one_file_has_no_splits(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("prompt\na\n", encoding="utf-8")
    assert refusal(path, "train") == f"prompts.split: '{path}' is one file and has no splits; remove the key"


def test_a_file_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.doc"
    path.write_text("hello\n", encoding="utf-8")
    assert "unknown kind of file; the suffix may be .jsonl" in refusal(path)


# --- readers by dotted path ------------------------------------------------------------------------------------------


def endless(split: str | None = None) -> Iterator[dict[str, str]]:
    number = 0
    while True:
        number += 1
        yield {"prompt": f"{split} {number}"}


def of_texts(split: str | None = None) -> list[Any]:
    return ["text", {"prompt": "a"}]


def without_split() -> list[Any]:
    return []


def of_nothing(split: str | None = None) -> None:
    return None


NOT_CALLABLE = 3


def test_a_reader_gets_the_split_and_is_read_no_further_than_the_limit() -> None:
    prompts = Prompts(source=f"{__name__}:endless", split="dev", limit=2)
    assert [row["messages"][0]["content"] for row in read_prompts(prompts)] == ["dev 1", "dev 2"]


def test_a_reader_s_rows_are_numbered_and_checked() -> None:
    bad, good = rows(f"{__name__}:of_texts")
    assert bad == Row(f"{__name__}:of_texts: row 1", problem="a row is an object with named columns, this is text")
    assert good.values == {"prompt": "a"}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("without_split", "must take the keyword `split`"),
        ("of_nothing", "returned a NoneType; a reader yields dicts"),
        ("NOT_CALLABLE", "is a int; a reader is a function"),
        ("absent", f"the module {__name__} has no 'absent'"),
    ],
)
def test_what_is_no_reader_is_refused(name: str, reason: str) -> None:
    message = refusal(f"{__name__}:{name}")
    assert message.startswith("prompts.source: ")
    assert reason in message


def test_a_module_that_is_not_there_is_named() -> None:
    assert "there is no module nowhere_at_all; give it as package.module:name" in refusal("nowhere_at_all.sub:reader")


def test_a_module_whose_own_import_fails_names_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_prompts.py").write_text("import lacking_library\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    with pytest.raises(InputError, match="my_prompts needs the module lacking_library; install it"):
        load_dotted("my_prompts:reader", where="prompts.source")


def test_a_module_in_the_working_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_prompts.py").write_text("def reader(split=None):\n    yield {'prompt': 'a'}\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    assert values("own_prompts:reader") == [{"prompt": "a"}]
