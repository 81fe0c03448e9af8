"""Public forms of prompt files: compressed, in folders, wrapped, by other programs: read, or named with what to do."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spa_ray.config.prompts import Prompts
from spa_ray.data.prompts import PromptCounts, read_prompts
from spa_ray.errors import InputError

U, A, S = "user", "assistant", "system"
SHARED = Path(__file__).parents[2] / "shared" / "data"


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def talk(source: Path, **keys: Any) -> list[list[tuple[str, str]]]:
    rows = read_prompts(Prompts(source=str(source), **keys))
    return [[(m["role"], m["content"]) for m in row["messages"]] for row in rows]


def texts(source: Path, **keys: Any) -> list[str]:
    return [messages[-1][1] for messages in talk(source, **keys)]


def refusal(source: Path, **keys: Any) -> str:
    with pytest.raises(InputError) as caught:
        talk(source, **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def notes(source: Path, **keys: Any) -> str:
    counts = PromptCounts()
    list(read_prompts(Prompts(source=str(source), **keys), counts=counts))
    return " | ".join(counts.notes())


def put(path: Path, data: bytes | str | list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(data, list):
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in data)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def zstd(data: bytes) -> bytes:
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "zstd") as stream:
        stream.write(data)
    return bytes(out.getvalue())


def lz4(data: bytes) -> bytes:
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "lz4") as stream:
        stream.write(data)
    return bytes(out.getvalue())


PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": zstd,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".lz4": lz4,
    ".GZ": lambda data: gzip.compress(data[:20]) + gzip.compress(data[20:]),
}
PLAIN = {
    "p.jsonl": b'{"prompt": "a"}\n{"prompt": "b"}\n',
    "p.json": b'[{"prompt": "a"}, {"prompt": "b"}]',
    "p.csv": b"prompt,k\na,1\nb,2\n",
    "p.tsv": b"prompt\tk\na\t1\nb\t2\n",
}


def parquet_bytes(table: pa.Table) -> bytes:
    out = pa.BufferOutputStream()
    pq.write_table(table, out)
    return bytes(out.getvalue())


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("name", [*PLAIN, "p.parquet"])
def test_compressed_files_are_read(tmp_path: Path, name: str, suffix: str) -> None:
    data = PLAIN[name] if name in PLAIN else parquet_bytes(pa.table({"prompt": ["a", "b"]}))
    assert texts(put(tmp_path / f"{name}{suffix}", PACK[suffix](data))) == ["a", "b"]


def test_a_wrong_suffix_does_not_hide_what_a_file_holds(tmp_path: Path) -> None:
    lines = PLAIN["p.jsonl"]
    assert texts(put(tmp_path / "a.jsonl", gzip.compress(lines))) == ["a", "b"]
    assert texts(put(tmp_path / "b.jsonl.gz", lines)) == ["a", "b"]
    assert texts(put(tmp_path / "c.jsonl.gz", zstd(lines))) == ["a", "b"]
    assert texts(put(tmp_path / "d.json", parquet_bytes(pa.table({"prompt": ["a"]})))) == ["a"]
    assert texts(put(tmp_path / "e", lines)) == ["a", "b"]
    assert texts(put(tmp_path / "f.gz", gzip.compress(lines))) == ["a", "b"]
    assert texts(put(tmp_path / "g.parquet", lines)) == ["a", "b"]


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".xz", ".bz2"])
def test_cut_and_damaged_compressed_files_are_refused_in_one_line(tmp_path: Path, suffix: str) -> None:
    data = PACK[suffix](b"".join(b'{"prompt": "%d"}\n' % n for n in range(5000)))
    middle = len(data) // 2
    broken = [data[:middle], data[:20]]
    if suffix != ".zst":  # whose frames need not carry a checksum
        broken.append(data[:middle] + b"\xff" * 50 + data[middle + 50 :])
    for cut in broken:
        assert str(tmp_path) in refusal(put(tmp_path / f"p.jsonl{suffix}", cut), on_bad_row="skip")


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("p.txt", b"\x00\x01How?\n", "binary data under the name of a text file"),
        ("p.xlsx", b"PK\x03\x04", "a spreadsheet; save it as CSV"),
        ("p.zip", b"PK\x03\x04", "a zip archive; unpack it"),
        ("p.jsonl", b"PK\x03\x04", "a zip archive; unpack it"),
        ("p.tar.gz", gzip.compress(b"x" * 257 + b"ustar" + b"x" * 300, mtime=0), "a tar archive"),
        ("p.pkl", b"\x80\x04\x95", "a pickle, which can run code"),
        ("p.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        ("p.csv", b"<!DOCTYPE html><html>", "a web page and not the file itself"),
        ("p.db", b"SQLite format 3\x00", "a database"),
        ("p", b"hello", "unknown kind of file; the suffix may be .jsonl"),
        ("p.yaml", b"- a", "YAML; write it as JSONL"),
    ],
)
def test_what_no_reader_takes_is_named_with_what_to_do(tmp_path: Path, name: str, data: bytes, told: str) -> None:
    assert told in refusal(put(tmp_path / name, data))


# --- lines of text ----------------------------------------------------------------------------------------------------


def test_every_line_of_a_text_file_is_a_prompt_and_empty_ones_are_counted(tmp_path: Path) -> None:
    lines = "\ufeffHow?\r\n\n  [INST] why {x}?\n   \nWhat\u2028now?"
    path = put(tmp_path / "p.txt", lines.encode())
    assert texts(path) == ["How?", "  [INST] why {x}?", "What\u2028now?"]
    assert "a text file: every line is one prompt" in notes(path)
    counts = PromptCounts()
    (row, *_) = read_prompts(Prompts(source=str(path), columns={"prompt": "text"}, limit=2), counts=counts)
    assert row["messages"][0]["content"] == "How?"
    assert counts.dropped.counts == {"empty": 1}
    assert counts.dropped.first == {"empty": f"{path}:2: an empty line"}


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("p.txt.gz", gzip.compress(b"a\nb\n", mtime=0)),
        ("p.txt", "a\nb\n".encode("utf-16")),
        ("p.txt", b'{"prompt": "a"}\n{"prompt": "b"}\n'),
        ("p.txt", b'[\n {"prompt": "a"}, {"prompt": "b"}]'),
    ],
)
def test_text_files_in_other_clothes(tmp_path: Path, name: str, data: bytes) -> None:
    assert texts(put(tmp_path / name, data)) == ["a", "b"]


def test_a_line_that_is_not_utf8_is_a_bad_row(tmp_path: Path) -> None:
    assert "p.txt:2: `prompt` is not valid Unicode" in refusal(put(tmp_path / "p.txt", b"a\n\xfc\n"))


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_is_read_whole_and_what_is_left_out_is_said(tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl", [{"prompt": "a"}])
    put(tmp_path / "b.jsonl.gz", gzip.compress(b'{"prompt": "b"}\n'))
    put(tmp_path / "c.csv", "prompt\nc\n")
    put(tmp_path / "notes.txt", "x")
    put(tmp_path / "image.png", b"\x89PNG")
    for name in (
        "README.md",
        "LICENSE",
        ".gitattributes",
        "dataset_infos.json",
        "_SUCCESS",
        ".a.jsonl.crc",
        "LICENSE.txt",
    ):
        put(tmp_path / name, '{"prompt": "metadata"}')
    assert texts(tmp_path) == ["a", "b", "c"]
    told = notes(tmp_path)
    assert "left out, no files of rows: image.png, notes.txt" in told
    assert "README" not in told


def hub(folder: Path) -> None:
    put(folder / "README.md", "---\nlicense: mit\n---\n# Set\n")
    put(folder / "dataset_infos.json", '{"default": {"features": {"prompt": {}}}}')
    put(folder / ".gitattributes", "*.parquet filter=lfs\n")
    put(folder / "data" / "train-00000-of-00002.parquet", parquet_bytes(pa.table({"prompt": ["a"]})))
    put(folder / "data" / "train-00001-of-00002.parquet", parquet_bytes(pa.table({"prompt": ["b"]})))


def test_a_copy_of_a_hub_s_repository_is_read_by_split(tmp_path: Path) -> None:
    hub(tmp_path)
    assert texts(tmp_path) == texts(tmp_path, split="train") == ["a", "b"]
    put(tmp_path / "data" / "test-00000-of-00001.parquet", parquet_bytes(pa.table({"prompt": ["c"]})))
    assert texts(tmp_path) == ["a", "b"]
    assert "the split train is read (prompts.split); left out: data/test-00000" in notes(tmp_path)
    assert texts(tmp_path, split="test") == ["c"]
    assert "no file of the split 'dev'" in refusal(tmp_path, split="dev")
    assert "train" in refusal(tmp_path, split="dev")


def test_the_configs_of_a_hub_s_readme_name_the_files(tmp_path: Path) -> None:
    head = """---
configs:
- config_name: main
  data_files:
  - split: train
    path: "main/part-*"
  - {split: test, path: [main/held.jsonl]}
- config_name: hard
  data_files: hard/*.jsonl
---
"""
    put(tmp_path / "README.md", head)
    put(tmp_path / "main" / "part-1.jsonl", [{"prompt": "a"}])
    put(tmp_path / "main" / "held.jsonl", [{"prompt": "b"}])
    put(tmp_path / "hard" / "x.jsonl", [{"prompt": "c"}])
    assert "several splits: main/train, main/test, hard/train" in refusal(tmp_path)
    assert texts(tmp_path, split="main/test") == ["b"]
    assert texts(tmp_path, split="hard/train") == ["c"]


# --- rows -------------------------------------------------------------------------------------------------------------

ROWS: dict[str, tuple[dict[str, Any], list[tuple[str, str]]]] = {
    "prompt of messages": ({"prompt": [turn(S, "s"), turn(U, "q")]}, [(S, "s"), (U, "q")]),
    "one message": ({"prompt": turn(U, "q")}, [(U, "q")]),
    "verl": ({"data_source": "x", "prompt": [turn(U, "q")], "reward_model": {"style": "rule"}}, [(U, "q")]),
    "messages as JSON": ({"messages": json.dumps([turn(U, "q")])}, [(U, "q")]),
    "parts": ({"messages": [turn(U, [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])]}, [(U, "a\nb")]),
    "parts of a table": (
        {"messages": [turn(U, [{"type": "text", "text": "a", "image": None}])]},
        [(U, "a")],
    ),
    "struct of lists": ({"messages": {"role": [U, A, U], "content": ["q", "a", "r"]}}, [(U, "q"), (A, "a"), (U, "r")]),
    "ShareGPT": (
        {"system": "s", "conversations": [{"from": "human", "value": "q"}]},
        [(S, "s"), (U, "q")],
    ),
    "ShareGPT of three": (
        {
            "conversations": [
                {"from": f, "value": v} for f, v in (("system", "s"), ("human", "q"), ("gpt", "a"), ("human", "r"))
            ]
        },
        [(S, "s"), (U, "q"), (A, "a"), (U, "r")],
    ),
    "WildChat": (
        {"conversation": [{"role": U, "content": "q", "country": "X", "toxic": False, "turn_identifier": 3}]},
        [(U, "q")],
    ),
    "Alpaca": ({"instruction": "do", "input": "x", "output": "y"}, [(U, "do\nx")]),
    "Alpaca without input": ({"instruction": "do", "input": "", "output": "y"}, [(U, "do")]),
    "Dolly": ({"instruction": "do", "context": "x", "response": "y", "category": "c"}, [(U, "do\nx")]),
    "LLaMA-Factory": (
        {"instruction": "do", "system": "s", "history": [["q", "a"]]},
        [(S, "s"), (U, "q"), (A, "a"), (U, "do")],
    ),
    "TRL prompt-completion": ({"prompt": "q", "completion": "a"}, [(U, "q")]),
    "NaN beside": ({"prompt": "q", "score": float("nan"), "x": float("inf")}, [(U, "q")]),
    "name of nothing": ({"messages": [{**turn(U, "q"), "name": None, "tool_calls": []}]}, [(U, "q")]),
}


@pytest.mark.parametrize(("row", "wanted"), ROWS.values(), ids=ROWS)
def test_public_forms_of_rows_are_read(tmp_path: Path, row: dict[str, Any], wanted: list[tuple[str, str]]) -> None:
    assert talk(put(tmp_path / "p.jsonl", [row, {"prompt": "next"}])) == [wanted, [(U, "next")]]
    assert talk(put(tmp_path / "p.json", json.dumps([row], indent=1))) == [wanted]
    assert talk(put(tmp_path / "one.json", json.dumps(row))) == [wanted]
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "p.parquet")
    assert talk(tmp_path / "p.parquet") == [wanted]


NAMED: dict[str, tuple[dict[str, Any], str]] = {
    "SFT": ({"messages": [turn(U, "q"), turn(A, "a")]}, "prompts.last_answer=drop"),
    "ShareGPT with an answer": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        "prompts.last_answer=drop",
    ),
    "image": ({"messages": [turn(U, [{"type": "image_url", "image_url": "x"}])]}, "holds 'image_url' (part 1)"),
    "audio": ({"prompt": [turn(U, [{"type": "text", "text": "a"}, {"type": "audio"}])]}, "holds 'audio' (part 2)"),
    "HH-RLHF": ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "x"}, "transcripts"),
    "transcript in prompt": ({"prompt": "\n\nHuman: a\n\nAssistant:"}, "is a transcript"),
    "pairs without prompts": ({"chosen": [turn(U, "q"), turn(A, "a")], "rejected": []}, "columns={messages: chosen}"),
    "MT-Bench": ({"question_id": 1, "turns": ["a", "b"]}, "prompts.columns={prompt: turns.0}"),
    "batch API": ({"custom_id": "1", "body": {"messages": [turn(U, "q")]}}, "columns={messages: body.messages}"),
    "RealToxicityPrompts": ({"prompt": {"text": "q", "toxicity": 0.1}}, "columns={prompt: prompt.text}"),
    "messages in prompt as text": ({"prompt": json.dumps([turn(U, "q")])}, "columns={messages: prompt}"),
    "question": ({"question": "q", "answer": "a"}, "prompts.columns={prompt: question}"),
    "another case": ({"Prompt": "q"}, "prompts.columns={prompt: Prompt}"),
    "AdvBench": ({"goal": "q", "target": "a"}, "prompts.columns={prompt: goal}"),
    "tool": ({"messages": [turn(U, "q"), turn("tool", "x"), turn(U, "r")]}, "has the role 'tool'"),
    "tool calls": ({"messages": [{**turn(U, "q"), "tool_calls": [1]}]}, "has the key 'tool_calls'"),
    "rendered": ({"text": "<|im_start|>user\nq"}, "a conversation rendered by a template"),
}


@pytest.mark.parametrize(("row", "told"), NAMED.values(), ids=NAMED)
def test_other_forms_are_named_with_the_key_that_reads_them(tmp_path: Path, row: dict[str, Any], told: str) -> None:
    message = refusal(put(tmp_path / "p.jsonl", [row]))
    assert message.startswith(f"{tmp_path}/p.jsonl:1: ")
    assert told in message


def test_the_keys_that_messages_name_do_read(tmp_path: Path) -> None:
    def of(name: str, **keys: Any) -> list[list[tuple[str, str]]]:
        return talk(put(tmp_path / "p.jsonl", [NAMED[name][0]]), **keys)

    assert of("SFT", last_answer="drop") == [[(U, "q")]]
    assert of("ShareGPT with an answer", last_answer="drop") == [[(U, "q")]]
    assert of("pairs without prompts", columns={"messages": "chosen"}, last_answer="drop") == [[(U, "q")]]
    assert of("MT-Bench", columns={"prompt": "turns.0"}) == [[(U, "a")]]
    assert of("batch API", columns={"messages": "body.messages"}) == [[(U, "q")]]
    assert of("RealToxicityPrompts", columns={"prompt": "prompt.text"}) == [[(U, "q")]]
    assert of("messages in prompt as text", columns={"messages": "prompt"}) == [[(U, "q")]]
    assert of("transcript in prompt", columns={"prompt": "prompt"}) == [[(U, "\n\nHuman: a\n\nAssistant:")]]


def test_a_named_column_that_is_not_there_is_answered_with_the_nearest(tmp_path: Path) -> None:
    path = put(tmp_path / "p.jsonl", [{"Question": "q"}])
    assert "did you mean 'Question'?" in refusal(path, columns={"prompt": "question"})
    assert "did you mean 'Question'?" in refusal(path, columns={"prompt": "Qestion"})


# --- JSON -------------------------------------------------------------------------------------------------------------

WRAPPED: dict[str, Any] = {
    "data": {"version": 1, "data": [{"prompt": "a"}, {"prompt": "b"}]},
    "any name": {"my_set": [{"prompt": "a"}, {"prompt": "b"}]},
    "deep": {"data": {"rows": [{"prompt": "a"}, {"prompt": "b"}]}},
    "hub server": {
        "features": [{"name": "prompt"}],
        "rows": [{"row_idx": n, "row": {"prompt": p}} for n, p in enumerate("ab")],
    },
    "columns": {"prompt": ["a", "b"], "k": [1, 2]},
    "pandas columns": {"prompt": {"0": "a", "1": "b"}, "k": {"0": 1, "1": 2}},
    "pandas split": {"columns": ["prompt", "k"], "index": [0, 1], "data": [["a", 1], ["b", 2]]},
    "pandas table": {"schema": {"fields": [{"name": "prompt"}]}, "data": [{"prompt": "a"}, {"prompt": "b"}]},
    "by id": {"x": {"prompt": "a"}, "y": {"prompt": "b"}},
}


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("value", WRAPPED.values(), ids=WRAPPED)
def test_rows_inside_one_json_object_are_found(tmp_path: Path, value: Any, suffix: str, indent: int | None) -> None:
    assert texts(put(tmp_path / f"p{suffix}", json.dumps(value, indent=indent))) == ["a", "b"]


def test_rows_in_several_places_of_one_object_are_named(tmp_path: Path) -> None:
    path = put(tmp_path / "p.json", json.dumps({"train": [{"prompt": "a"}], "test": [{"prompt": "b"}]}, indent=1))
    assert "rows are in several places: train (1), test (1); say which with prompts.split=train" in refusal(path)
    assert texts(path, split="test") == ["b"]
    assert "no rows under 'dev'" in refusal(path, split="dev")


@pytest.mark.parametrize(
    "data",
    [
        '{\n "prompt": "a"\n}\n{\n "prompt": "b"\n}\n',
        '[\n{"prompt": "a"},\n{"prompt": "b"},\n]\n',
        '{"prompt": "a"},\n{"prompt": "b"},\n',
        '[{"prompt": "a"}, {"prompt": "b"}]',
        '\n\n{"prompt": "a"}\r\n\r\n{"prompt": "b"}',
    ],
)
@pytest.mark.parametrize("name", ["p.json", "p.jsonl", "p.ndjson"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_json_is_read_however_it_is_laid_out_and_encoded(tmp_path: Path, data: str, name: str, encoding: str) -> None:
    data = data.replace('"a"', '"ä\u2028"')
    assert texts(put(tmp_path / name, data.encode(encoding))) == ["ä\u2028", "b"]


def test_a_fault_in_a_pretty_printed_file_names_its_line(tmp_path: Path) -> None:
    assert "p.json:3: not JSON" in refusal(put(tmp_path / "p.json", '{\n "prompt": "a",\n oops\n}\n'))


# --- CSV --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_csv_is_read_whatever_parts_its_cells(tmp_path: Path, delimiter: str, encoding: str, suffix: str) -> None:
    lines = [
        f"prompt{delimiter} topic{delimiter}",
        f'"Wie, geht; das|\t?"{delimiter}ä{delimiter}',
        f"b{delimiter}{delimiter}",
    ]
    path = put(tmp_path / f"p{suffix}", "\r\n".join(lines).encode(encoding))
    rows = list(read_prompts(Prompts(source=str(path))))
    assert [row["messages"][0]["content"] for row in rows] == ["Wie, geht; das|\t?", "b"]
    assert json.loads(rows[0]["meta"]) == {"topic": "ä"}


def test_a_csv_of_one_column_and_one_that_names_its_delimiter(tmp_path: Path) -> None:
    assert texts(put(tmp_path / "a.csv", 'prompt\n"a; b"\n')) == ["a; b"]
    assert texts(put(tmp_path / "b.csv", "sep=;\r\nprompt;k\r\na,b;1\r\n")) == ["a,b"]
    assert texts(put(tmp_path / "c.csv", ",prompt\n0,a\n1,b\n")) == ["a", "b"]


def test_a_csv_without_a_header_is_named(tmp_path: Path) -> None:
    assert "this one looks like a row" in refusal(
        put(tmp_path / "p.csv", "What is the answer here?,a,b\nAnd there?,c,d\n")
    )


def test_bytes_of_another_encoding_are_named(tmp_path: Path) -> None:
    message = refusal(put(tmp_path / "p.jsonl", '{"prompt": "é"}\n'.encode("latin-1")))
    assert "0xe9, 'é' in Windows-1252" in message
    assert "save the file as UTF-8" in refusal(put(tmp_path / "p.csv", "prompt\né\n".encode("latin-1")))


# --- columns that nobody asked for ------------------------------------------------------------------------------------


def test_bytes_images_and_embeddings_are_left_out_and_counted(tmp_path: Path) -> None:
    table = pa.table(
        {
            "prompt": ["a", "b"],
            "image": [{"bytes": b"\xff" * 9, "path": "x"}] * 2,
            "raw": pa.array([b"x", None]),
            "embedding": [[0.5] * 1000] * 2,
            "score": [[0.1, 0.9]] * 2,
            "__index_level_0__": [5, 6],
        }
    )
    pq.write_table(table, tmp_path / "p.parquet")
    (first, _) = read_prompts(Prompts(source=str(tmp_path / "p.parquet")))
    assert json.loads(first["meta"]) == {"score": [0.1, 0.9]}
    told = notes(tmp_path / "p.parquet")
    for name in ("image (2 rows)", "raw (2 rows)", "embedding (2 rows)", "__index_level_0__ (2 rows)"):
        assert name in told


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_every_arrow_type_of_text_is_read(tmp_path: Path, kind: pa.DataType) -> None:
    pq.write_table(pa.table({"prompt": pa.array(["a", "b"]).cast(kind)}), tmp_path / "p.parquet")
    assert texts(tmp_path / "p.parquet") == ["a", "b"]


def test_a_prompt_column_of_bytes_is_refused_in_words(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": pa.array([b"a"])}), tmp_path / "p.parquet")
    assert "`prompt` is bytes; a prompt is text" in refusal(tmp_path / "p.parquet")


# --- real files -------------------------------------------------------------------------------------------------------

REAL = [
    ("advbench/harmful_behaviors.csv", {"columns": {"prompt": "goal"}}, 519),
    ("strongreject/strongreject_dataset.csv", {"columns": {"prompt": "forbidden_prompt"}}, 313),
    ("xstest/xstest_prompts.csv", {}, 450),
    ("harmbench/harmbench_behaviors_text_val.csv", {"columns": {"prompt": "Behavior"}}, 80),
    ("do_not_answer", {}, 939),
    ("trustllm/jailbreak.json", {}, 1400),
    ("arena_hard/v0.1_question.jsonl", {}, 500),
    ("arena_hard/v2.0_question.jsonl", {}, 750),
    ("mt_bench/question.jsonl", {"columns": {"prompt": "turns.0"}}, 80),
    ("truthfulqa/TruthfulQA.csv", {"columns": {"prompt": "Question"}}, 817),
]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the public data sets are not here")
@pytest.mark.parametrize(("name", "keys", "rows"), REAL, ids=[name for name, _, _ in REAL])
def test_public_data_sets_are_read(name: str, keys: dict[str, Any], rows: int) -> None:
    counts = PromptCounts()
    list(read_prompts(Prompts(source=str(SHARED / name), **keys), counts=counts))
    assert counts.rows + counts.duplicates == pytest.approx(rows, abs=1)
    assert counts.bad == 0


@pytest.mark.skipif(not SHARED.is_dir(), reason="the public data sets are not here")
def test_a_public_data_set_without_prompts_is_named() -> None:
    assert "transcripts" in refusal(SHARED / "hh_rlhf" / "harmless-base_test.jsonl.gz")
