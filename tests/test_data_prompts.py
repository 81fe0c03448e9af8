"""Prompts in: every format gives the same prompts, and every malformed row is found, named and can be left out."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_ray.config.prompts import Prompts
from spa_ray.data.forms import messages_digest
from spa_ray.data.prompts import PromptCounts, read_prompts, write_prompts
from spa_ray.data.readers import source_kind
from spa_ray.data.schemas import PROMPTS
from spa_ray.errors import InputError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda s: s.strip() != "")
MESSAGES = st.tuples(
    st.lists(st.just("system"), max_size=1), st.lists(st.sampled_from(["user", "assistant"]), max_size=3)
).flatmap(
    lambda roles: st.tuples(
        *[st.fixed_dictionaries({"role": st.just(r), "content": TEXT}) for r in (*roles[0], *roles[1], "user")]
    )
)


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8", newline="\n")
    return path


def read(source: Path | str, **keys: Any) -> list[dict[str, Any]]:
    return list(read_prompts(Prompts(source=str(source), **keys)))


def refusal(source: Path | str, **keys: Any) -> str:
    with pytest.raises(InputError) as caught:
        read(source, **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def counted(source: Path | str, **keys: Any) -> tuple[list[str], PromptCounts]:
    counts = PromptCounts()
    rows = list(read_prompts(Prompts(source=str(source), on_bad_row="skip", **keys), counts=counts))
    return [row["messages"][-1]["content"] for row in rows], counts


# --- what a prompt becomes -------------------------------------------------------------------------------------------


def test_a_prompt_becomes_one_user_message_with_the_other_columns_in_meta(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "Hi", "category": "benign", "n": 3, "bad": None}])
    (row,) = read(path)
    assert row["messages"] == [{"role": "user", "content": "Hi"}]
    assert json.loads(row["meta"]) == {"category": "benign", "n": 3, "bad": None}


def test_messages_come_through_as_they_are(tmp_path: Path) -> None:
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " a "},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c\u2028d"},
    ]
    (row,) = read(write_jsonl(tmp_path / "p.jsonl", [{"messages": talk, "prompt_id": "x"}]))
    assert row == {"prompt_id": "x", "messages": talk, "meta": "{}"}


def test_the_default_id_is_a_hash_of_roles_and_contents_alone(tmp_path: Path) -> None:
    a = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "Hi", "k": 1}])
    b = write_jsonl(tmp_path / "b.jsonl", [{"k": 2, "messages": [{"content": "Hi", "role": "user"}]}])
    assert read(a)[0]["prompt_id"] == read(b)[0]["prompt_id"] == "a54c55ecc31f2f6989744362488d83c0"


@given(MESSAGES, MESSAGES)
def test_only_equal_messages_have_equal_hashes(a: tuple[dict[str, str], ...], b: tuple[dict[str, str], ...]) -> None:
    assert (messages_digest(a) == messages_digest(b)) == (a == b)


@settings(deadline=None)
@given(st.lists(st.tuples(TEXT, st.integers(0, 99)), min_size=1, max_size=8, unique_by=lambda row: row[0]))
def test_every_format_gives_the_same_prompts(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, int]]
) -> None:
    folder = tmp_path_factory.mktemp("formats")
    dicts = [{"prompt": text, "prompt_id": f"id{i}", "rank": str(rank)} for i, (text, rank) in enumerate(rows)]
    write_jsonl(folder / "p.jsonl", dicts)
    (folder / "p.json").write_text(json.dumps(dicts, indent=1), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(dicts), folder / "p.parquet")
    with (folder / "p.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "prompt_id", "rank"], quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(dicts)
    jsonl = read(folder / "p.jsonl")
    assert [row["messages"][0]["content"] for row in jsonl] == [text for text, _ in rows]
    assert read(folder / "p.json") == jsonl
    assert read(folder / "p.parquet") == jsonl
    assert read(folder / "p.csv") == jsonl


@settings(deadline=None)
@given(st.lists(st.sampled_from("abcdef"), max_size=12), st.integers(0, 4), st.integers(1, 5))
def test_skip_and_limit_cut_the_distinct_prompts_in_their_order(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], skip: int, limit: int
) -> None:
    path = write_jsonl(tmp_path_factory.mktemp("cut") / "p.jsonl", [{"prompt": t} for t in texts])
    rows = read_prompts(Prompts(source=str(path), limit=limit), skip=skip)
    distinct = list(dict.fromkeys(texts))
    assert [r["messages"][0]["content"] for r in rows] == distinct[skip : skip + limit]


@settings(deadline=None)
@given(st.lists(st.sampled_from(["a", "b", "c", "", 7, None]), max_size=12))
def test_rows_duplicates_and_bad_rows_add_up(tmp_path_factory: pytest.TempPathFactory, texts: list[Any]) -> None:
    path = write_jsonl(tmp_path_factory.mktemp("sum") / "p.jsonl", [{"prompt": t} for t in texts])
    good, counts = counted(path)
    assert counts.rows == len(good) == len(set(good))
    assert counts.rows + counts.duplicates + counts.bad == len(texts)
    assert counts.bad == sum(t not in ("a", "b", "c") for t in texts)


def test_the_second_of_two_disjoint_parts_counts_only_its_own_rows(tmp_path: Path) -> None:
    rows = [{"prompt": t} for t in ("a", "a", "", "b", "b", "c", "", "d")]
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    prompts = Prompts(source=str(path), limit=2, on_bad_row="skip")
    first = write_prompts(prompts, tmp_path / "first.parquet")
    second = write_prompts(prompts, tmp_path / "second.parquet", skip=2)
    assert (first.rows, first.duplicates, first.bad) == (2, 1, 1)
    assert (second.rows, second.duplicates, second.bad) == (2, 1, 1)
    ids = [pq.read_table(tmp_path / f"{n}.parquet")["prompt_id"].to_pylist() for n in ("first", "second")]
    assert not set(ids[0]) & set(ids[1])


def test_nothing_is_read_beyond_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\nno json\n', encoding="utf-8")
    assert len(read(path, limit=1)) == 1


def test_columns_are_read_under_the_users_names(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [{"question": "Hi", "uid": 7, "prompt": "kept", "messages": "kept too"}])
    (row,) = read(path, columns={"prompt": "question", "prompt_id": "uid"})
    assert (row["prompt_id"], row["messages"][0]["content"]) == ("7", "Hi")
    assert json.loads(row["meta"]) == {"prompt": "kept", "messages": "kept too"}


def test_meta_is_json_whatever_the_column_held(tmp_path: Path) -> None:
    table = pa.table(
        {
            "prompt": ["Hi"],
            "x": [float("nan")],
            "day": pa.array([0], pa.date32()),
            "deep": pa.array([{"a": [1.5]}]),
        }
    )
    pq.write_table(table, tmp_path / "p.parquet")
    (row,) = read(tmp_path / "p.parquet")
    assert json.loads(row["meta"]) == {"x": None, "day": "1970-01-01", "deep": {"a": [1.5]}}


# --- bad rows --------------------------------------------------------------------------------------------------------

OK = {"role": "user", "content": "x"}
BAD_ROWS: dict[str, tuple[str, str]] = {
    "not JSON": ("{prompt: 1}", "not JSON"),
    "cut JSON": ('{"prompt": "a"', "not JSON"),
    "deep": ("[" * 100_000, "not JSON (nested too deeply)"),
    "an array": ("[1]", "this is a list"),
    "null": ("null", "this is null"),
    "no prompt": ('{"text": "a"}', "no value in `prompt` or `messages` (other columns: text)"),
    "null prompt": ('{"prompt": null}', "no value in `prompt`"),
    "number": ('{"prompt": 5}', "`prompt` is a whole number; a prompt is text"),
    "empty prompt": ('{"prompt": ""}', "`prompt` is empty"),
    "blank prompt": ('{"prompt": " \\n\\u2028"}', "`prompt` is empty"),
    "half a pair": ('{"prompt": "\\ud800"}', "`prompt` is not valid Unicode"),
    "half a pair in meta": ('{"prompt": "a", "k": "\\ud800"}', "a further column is not valid Unicode"),
    "both": (json.dumps({"prompt": "a", "messages": [OK]}), "has both `prompt` and `messages`"),
    "no messages": ('{"messages": []}', "`messages` is empty"),
    "messages a number": ('{"messages": 3}', "`messages` is a whole number"),
    "messages as text": ('{"messages": "hello"}', "`messages` is text that is not JSON"),
    "message a string": ('{"messages": ["hello"]}', "`messages`[0] is not an object with `role` and `content`"),
    "no content": ('{"messages": [{"role": "user"}]}', "`messages`[0] is not an object with `role` and `content`"),
    "empty content": ('{"messages": [{"role": "user", "content": " "}]}', "`messages`[0] is empty"),
    "null content": ('{"messages": [{"role": "user", "content": null}]}', "`messages`[0] is null"),
    "unknown role": (json.dumps({"messages": [{"role": "human", "content": "x"}]}), "has the role 'human'"),
    "list role": (json.dumps({"messages": [{"role": ["user"], "content": "x"}]}), "has the role ['user']"),
    "last not user": (json.dumps({"messages": [OK, {"role": "assistant", "content": "y"}]}), "role is 'assistant'"),
    "late system": (json.dumps({"messages": [OK, {"role": "system", "content": "y"}, OK]}), "may only come first"),
    "further key": (json.dumps({"messages": [{**OK, "name": "Ann"}]}), "has the key 'name'"),
    "empty id": ('{"prompt": "a", "prompt_id": ""}', "prompt_id is empty"),
    "id a float": ('{"prompt": "a", "prompt_id": 1.5}', "prompt_id is a number"),
    "id a bool": ('{"prompt": "a", "prompt_id": true}', "prompt_id is true or false"),
    "id taken": ('{"prompt": "other", "prompt_id": "one"}', "prompt_id 'one' belongs to another prompt already"),
}


@pytest.mark.parametrize(("line", "reason"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_refused_with_its_line_and_can_be_left_out(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(f'{{"prompt": "first", "prompt_id": "one"}}\n\n{line}\n{{"prompt": "last"}}\n', encoding="utf-8")
    message = refusal(path)
    assert message.startswith(f"{path}:3: ")
    assert reason in message
    assert "prompts.on_bad_row=skip" in message
    texts, counts = counted(path)
    assert texts == ["first", "last"]
    assert (counts.rows, counts.duplicates, counts.bad) == (2, 0, 1)
    assert counts.first_bad is not None
    assert counts.first_bad.startswith(f"{path}:3: ")


def test_bytes_that_are_not_utf8_are_refused_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n{"prompt": "b"}\n')
    assert f"{path}:2: not UTF-8 (byte 13 of the line is 0xff" in refusal(path)
    assert counted(path)[0] == ["a", "b"]


def test_an_id_stays_taken_when_its_first_row_was_a_duplicate(tmp_path: Path) -> None:
    rows = [("A", "p"), ("B", "p"), ("B", "q")]
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt_id": i, "prompt": p} for i, p in rows])
    assert f"{path}:3: prompt_id 'B' belongs to another prompt" in refusal(path)


def test_a_mapped_column_that_is_missing_is_a_bad_row(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}])
    assert "has no column 'question', which prompts.columns names for prompt (columns: prompt)" in refusal(
        path, columns={"prompt": "question"}
    )


def test_bytes_in_a_further_column_are_left_out_and_counted(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a", "b"], "image": [b"\x00", b"\x01"]}), tmp_path / "p.parquet")
    counts = PromptCounts()
    rows = list(read_prompts(Prompts(source=str(tmp_path / "p.parquet")), counts=counts))
    assert [row["meta"] for row in rows] == ["{}", "{}"]
    assert counts.left_out == {"image": 2}
    assert counts.notes() == ["prompts: columns left out (bytes, long lists of numbers, row numbers): image (2 rows)"]


# --- the file that is written ----------------------------------------------------------------------------------------


def test_the_written_table_has_the_schema_and_the_counts(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": str(i % 3000)} for i in range(3001)])
    out = tmp_path / "out" / "prompts.parquet"
    assert write_prompts(Prompts(source=str(path)), out) == PromptCounts(rows=3000, duplicates=1)
    table = pq.read_table(out)
    assert table.schema.equals(PROMPTS)
    assert [m[0]["content"] for m in table["messages"].to_pylist()] == [str(i) for i in range(3000)]


def test_an_error_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\nno\n', encoding="utf-8")
    out = tmp_path / "out" / "prompts.parquet"
    with pytest.raises(InputError):
        write_prompts(Prompts(source=str(path)), out)
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize(("content", "reason"), [("", "no prompt in it"), ("no\n", "1 bad rows, the first: ")])
def test_a_source_without_a_prompt_is_refused(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=reason):
        write_prompts(Prompts(source=str(path), on_bad_row="skip"), tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()


def test_skipping_more_prompts_than_there_are_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}])
    with pytest.raises(InputError, match="no prompt beyond the first 1; give more prompts or a smaller limit"):
        write_prompts(Prompts(source=str(path)), tmp_path / "out.parquet", skip=1)


# --- sources ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["nowhere.jsonl", "./nowhere", "data/nowhere.csv", "/nowhere/at/all"])
def test_a_missing_file_is_named(source: str) -> None:
    assert f"prompts.source: {source!r}: no such file or folder" in refusal(source)


def test_a_missing_source_is_named() -> None:
    with pytest.raises(InputError, match=r"x.yaml: prompts.source: missing; give a file"):
        source_kind(Prompts(), where="x.yaml: prompts")
