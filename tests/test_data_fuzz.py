"""Ten thousand hostile prompt rows through the real readers: each is recorded as it stands, left out and counted, or
ends the reading with one line, by what is known of it. Seeds are fixed and printed."""

from __future__ import annotations

import csv
import io
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spa_ray.config.prompts import Prompts
from spa_ray.data.forms import ROLES
from spa_ray.data.left_out import lines
from spa_ray.data.prompts import LONGEST_MESSAGE, PromptCounts, read_prompts, write_prompts
from spa_ray.data.schemas import PROMPTS
from spa_ray.errors import InputError

SEED = 20_261_121
HARMLESS = re.compile("[^\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\ud800-\udfff]*")
ODD = [
    "\u2028",
    "\u2029",
    "\x00",
    "\x1b[2J",
    "\x85",
    "\ufeff",
    "\u202e",
    "é",
    "e\u0301",
    "😀",
    "\r\n",
    "\t",
    '"',
    "\\",
    ",",
]
ODD += [
    "'",
    "{{ 7 * 7 }}",
    "{% raw %}",
    "<|im_end|>",
    "[INST]",
    "</s>",
    "\U0010ffff",
    "NaN",
    "null",
    "=cmd()",
    "../etc",
    "%s",
]
Row = dict[str, Any]


def text(rng: random.Random, longest: int = 12) -> str:
    """Odd and valid, and not blank."""
    return "".join(rng.choice(["a", "word ", *ODD]) for _ in range(rng.randint(1, longest))) + "x"


def turns(rng: random.Random) -> list[dict[str, Any]]:
    n = rng.choice([1, 1, 3, 5])
    said = [{"role": ("user", "assistant")[i % 2], "content": text(rng)} for i in range(n)]
    return [{"role": "system", "content": text(rng)}, *said] if rng.random() < 0.3 else said


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def good_row(rng: random.Random, number: int) -> Row:
    row: Row = {"prompt": f"{number} {text(rng)}"} if rng.random() < 0.5 else {"messages": turns(rng)}
    if "messages" in row:
        row["messages"][-1]["content"] += f" {number}"
    row |= rng.choice(
        [
            {},
            {"prompt_id": f"id {number} {text(rng)}"},
            {"prompt_id": number},
            {"prompt_id": f"{number}" + "é" * rng.choice([10, 10_000])},
            {"prompt_id": None, "label": None},
            {"score": rng.choice([10**30, -(10**300), 1e308, 0.1, True]), text(rng): text(rng)},
            {"extra": {"a": [1, {"b": text(rng)}]}, "deep": nested(50)},
        ]
    )
    return row


def spoiled(row: Row, rng: random.Random) -> Row:
    """A good row made bad."""
    role = rng.choice(["User", "tool", "", None, 3, ["user"], "user\x00", "r" * 9999])
    content = rng.choice([None, "", 3, ["a"], {"a": 1}, "\udc80"])
    user, assistant = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    faults: list[Row] = [
        {},
        {"prompt": rng.choice([None, 7, 1.5, True, [], {}, ["a"], {"text": "a"}])},
        {"prompt": rng.choice(["", " ", "\u2028\t\n", "\u3000"])},
        {"prompt": "half of a pair \ud83d"},
        {"messages": rng.choice(["", "no JSON", "[" * 5000, "{}", "[]", "3", "[3]", "null"])},
        {"messages": rng.choice([[], {}, 3, True, [None], [[]], ["a"], [{}], [nested(40)]])},
        {"messages": [{"role": role, "content": "a"}]},
        {"messages": [{"role": "user", "content": content}]},
        {"messages": [{**user, rng.choice(["name", "\ud800", "k" * 9999]): 1}]},
        {"messages": [user, assistant]},
        {"messages": [user, {"role": "system", "content": "b"}]},
        {"prompt": "a", "messages": [user]},
        {**row, "prompt_id": rng.choice(["", "  ", 1.5, True, [], {"a": 1}, "\ud800"])},
        {**row, "extra": rng.choice(["\udfff", {"\ud800": 1}, ["\udbff"]])},
        {"\ud800": 1, "c" * 9999: 2},
        {**row, "extra": nested(900)},
    ]
    return rng.choice(faults)


def cases(rng: random.Random, count: int) -> Iterator[tuple[str, Row]]:
    """(what becomes of it, row): kept, bad, or duplicate (of a kept one)."""
    kept: list[Row] = []
    for number in range(count):
        kind = rng.choices(["kept", "bad", "duplicate", "taken"], [5, 4, 1, 1])[0]
        if kind == "duplicate" and kept:
            copy = dict(rng.choice(kept))
            yield "duplicate", {**copy, "prompt_id": f"other {number}"} if rng.random() < 0.5 else copy
        elif kind == "taken" and any(row.get("prompt_id") for row in kept[-9:]):
            owner = next(row for row in kept[-9:] if row.get("prompt_id"))
            yield "bad", {"prompt": f"another {number}", "prompt_id": owner["prompt_id"]}
        elif kind == "bad":
            yield "bad", spoiled(good_row(rng, number), rng)
        else:
            row = good_row(rng, number)
            kept.append(row)
            yield "kept", row


def to_messages(row: Row) -> list[dict[str, str]]:
    return row["messages"] if row.get("messages") else [{"role": "user", "content": row["prompt"]}]


def check(source: Path, told: list[tuple[str, Row]], out: Path) -> PromptCounts:
    """Read with `skip`: exactly the good rows come out, in order, and the counts add up."""
    counts = write_prompts(Prompts(source=str(source), on_bad_row="skip"), out)
    rows = pq.read_table(out).cast(PROMPTS).to_pylist()
    kinds = [kind for kind, _ in told]
    where = f"seed {SEED}, {source.name}: {counts}"
    assert (counts.rows, counts.bad, counts.duplicates) == tuple(map(kinds.count, ("kept", "bad", "duplicate"))), where
    for prompt, row in zip(rows, (row for kind, row in told if kind == "kept"), strict=True):
        assert prompt["messages"] == to_messages(row), where
        assert row.get("prompt_id") is None or prompt["prompt_id"] == str(row["prompt_id"]), where
    check_any(rows, counts)
    return counts


def check_any(rows: list[Row], counts: PromptCounts) -> None:
    """What holds of every reading."""
    assert len({row["prompt_id"] for row in rows}) == len(rows) == counts.rows
    for row in rows:
        assert isinstance(json.loads(row["meta"]), dict)
        assert row["messages"][-1]["role"] == "user"
        assert all(m["role"] in ROLES and m["content"].strip() for m in row["messages"])
    if counts.bad:
        assert counts.first_bad is not None
        assert HARMLESS.fullmatch(counts.first_bad)
        assert len(counts.first_bad) <= LONGEST_MESSAGE
        json.dumps(counts.to_dict(), ensure_ascii=False).encode()  # as stage.json keeps it
        json.dumps(counts.dropped.rows, ensure_ascii=False).encode()  # as left_out.jsonl keeps them
        assert all(HARMLESS.fullmatch(line) for line in lines({"prompts": counts.dropped}))
    assert sum(counts.dropped.counts.values()) == counts.bad + counts.duplicates


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_each_of_three_thousand_json_rows_becomes_what_it_is(tmp_path: Path, suffix: str) -> None:
    print("seed", SEED)
    told = list(cases(random.Random(SEED), 3000))
    lines = [json.dumps(row) for _, row in told]
    source = tmp_path / f"p{suffix}"
    source.write_text("\n".join(lines) if suffix == ".jsonl" else f"[{','.join(lines)}]", encoding="utf-8")
    counts = check(source, told, tmp_path / "out.parquet")
    assert min(counts.rows, counts.bad, counts.duplicates) > 100


def test_lines_that_are_no_rows_cost_themselves_alone(tmp_path: Path) -> None:
    print("seed", SEED)
    rng = random.Random(SEED)
    broken = [
        b"\xff\xfe",
        b"{",
        b"nul",
        b'{"prompt": NaN}',
        b'{"prompt": "a\x01b"}',
        b"[" * 100_000,
        b"[]",
        b"3",
        b"null",
    ]
    broken += [
        b'"text"',
        b'{"prompt": ' + b"9" * 5000 + b"}",
        b'{"prompt": "\xed\xa0\x80"}',
        b"\x00",
        b'{"prompt": 1e999}',
    ]
    told: list[tuple[str, Row]] = []
    lines: list[bytes] = []
    for number in range(1000):
        row = {"prompt": f"{number} {text(rng)}"}
        told.append(("kept", row) if rng.random() < 0.5 else ("bad", {}))
        lines.append(json.dumps(row, ensure_ascii=False).encode() if told[-1][0] == "kept" else rng.choice(broken))
    (tmp_path / "p.jsonl").write_bytes(b"\n".join(lines))
    check(tmp_path / "p.jsonl", told, tmp_path / "out.parquet")


def csv_case(rng: random.Random, number: int, owner: str) -> tuple[str, Row, list[str] | bytes]:
    """(what becomes of it, the row, its cells or its raw line). `owner`: an id that is taken."""
    row: Row = {"prompt": f"{number} {text(rng)}"} if rng.random() < 0.5 else {"messages": turns(rng)}
    if "messages" in row:
        row["messages"][-1]["content"] += f" {number}"
    told = json.dumps(row["messages"], ensure_ascii=False) if "messages" in row else ""
    cells = [row.get("prompt", ""), told, rng.choice(["", f"id {number}"]), text(rng)]
    row["messages"] = to_messages(row)
    if rng.random() < 0.5:
        return "kept", row, cells
    bad: list[list[str] | bytes] = [
        cells[:3],
        [*cells, "more"],
        ["a", told or "[]", "", ""],
        ["", "", "", "note"],
        [rng.choice([" ", "\u3000\t"]), "", "", ""],
        ["half \ud83d", "", "", ""],
        ["", rng.choice(["no JSON", "[]", "{}", "[" * 5000, '[{"role": "user"}]']), "", ""],
        ["another", "", owner, ""],
        b'"a"b,,,',
        b"\xff\xfe,,,",
    ]
    return "bad", {}, rng.choice(bad)


def test_each_of_two_thousand_csv_rows_becomes_what_it_is(tmp_path: Path) -> None:
    print("seed", SEED)
    rng = random.Random(SEED)
    told: list[tuple[str, Row]] = [("kept", {"prompt": "first", "prompt_id": "mine"})]
    out = io.BytesIO(b"prompt,messages,prompt_id,note\r\nfirst,,mine,\r\n")
    out.seek(0, io.SEEK_END)
    for number in range(2000):
        kind, row, cells = csv_case(rng, number, "mine")
        told.append((kind, row))
        if isinstance(cells, bytes):
            out.write(cells + b"\r\n")
            continue
        line = io.StringIO()
        csv.writer(line).writerow(cells)
        out.write(line.getvalue().encode("utf-8", errors="surrogatepass"))
    (tmp_path / "p.csv").write_bytes(out.getvalue())
    check(tmp_path / "p.csv", told, tmp_path / "out.parquet")


def test_each_of_a_thousand_parquet_rows_becomes_what_it_is(tmp_path: Path) -> None:
    print("seed", SEED)
    rng = random.Random(SEED)
    told: list[tuple[str, Row]] = []
    raw: list[bytes | None] = []
    years: list[int] = []
    for number in range(1000):
        row = {"prompt": f"{number} {text(rng)}"}
        fault = rng.choices(["", "null", "blank", "bytes", "year"], [6, 1, 1, 1, 1])[0]
        told.append(("bad" if fault else "kept", row))
        raw.append({"null": None, "blank": b" ", "bytes": b"\xff\xfe a"}.get(fault, row["prompt"].encode()))
        years.append(10**14 if fault == "year" else 10**9)
    table = pa.table(
        {
            "prompt": string_column(raw),
            "when": pa.array(years, pa.timestamp("s")),
            "odd": pa.array([[{"k": float("nan"), "d": None}]] * len(raw)),
        }
    )
    pq.write_table(table, tmp_path / "p.parquet")
    check(tmp_path / "p.parquet", told, tmp_path / "out.parquet")


def string_column(raw: list[bytes | None]) -> pa.Array:
    """A column of text whose bytes nobody has checked, as a foreign writer may leave it."""
    column = pa.array(raw, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(column), column.buffers(), column.null_count)


@pytest.mark.parametrize(
    "column",
    [
        pa.array([1, 2]),
        pa.array([b"a", b"b"]),
        pa.array([["a"], None]),
        pa.array([{"a": 1}, {"a": 2}]),
        pa.array([[("a", 1)], []], pa.map_(pa.string(), pa.int64())),
        pa.array([None, None]),
        pa.array([1.5, float("nan")]),
        pa.array([True, False]),
        pa.array([10**18, 1], pa.timestamp("us")),
        pa.array([2**62, 1], pa.duration("ns")),
    ],
    ids=lambda column: str(column.type),
)
@pytest.mark.parametrize("name", ["prompt", "messages", "prompt_id"])
def test_a_parquet_column_of_any_other_type_makes_bad_rows_and_no_crash(
    tmp_path: Path, name: str, column: pa.Array
) -> None:
    other = {"prompt": ["p", "q"]} if name == "prompt_id" else {}
    pq.write_table(pa.table({name: column, **other}), tmp_path / "p.parquet")
    counts = PromptCounts()
    rows = list(read_prompts(Prompts(source=str(tmp_path / "p.parquet"), on_bad_row="skip"), counts=counts))
    assert len(rows) + counts.bad == 2
    check_any(rows, counts)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_file_of_noise_is_refused_or_read_and_nothing_else(tmp_path: Path, suffix: str) -> None:
    print("seed", SEED)
    rng = random.Random(SEED)
    refused: list[str] = []
    for number in range(250):
        source = tmp_path / f"{number}{suffix}"
        source.write_bytes(noise(rng, suffix, tmp_path))
        counts = PromptCounts()
        try:
            rows = list(read_prompts(Prompts(source=str(source), on_bad_row="skip"), counts=counts))
        except InputError as e:
            refused.append(str(e))
        else:
            check_any(rows, counts)
    assert all(str(tmp_path) in message for message in refused)
    assert len(refused) < 250


def noise(rng: random.Random, suffix: str, folder: Path) -> bytes:
    """A valid file with some bytes changed, cut or added."""
    rows = [good_row(rng, n) for n in range(rng.randint(1, 8))]
    if suffix == ".parquet":
        pq.write_table(pa.table({"prompt": [str(r.get("prompt")) for r in rows]}), folder / "seed.bin")
        data = bytearray((folder / "seed.bin").read_bytes())
    elif suffix == ".csv":
        data = bytearray(b"prompt,note\r\n" + b"\r\n".join(b'"a ""q"" b",c' for _ in rows))
    else:
        lines = [json.dumps(row) for row in rows]
        data = bytearray(("\n".join(lines) if suffix == ".jsonl" else f"[{','.join(lines)}]").encode())
    for _ in range(rng.randint(0, 6)):
        at = rng.randrange(len(data) + 1)
        what = rng.choice(["set", "cut", "add"])
        if what == "set" and at < len(data):
            data[at] = rng.randrange(256)
        elif what == "add":
            data[at:at] = rng.randbytes(rng.randint(1, 5))
        elif what == "cut" and len(data) > 9:
            del data[at : at + rng.randint(1, 9)]
    return bytes(data)


def test_without_skip_every_bad_row_ends_the_reading_in_one_line_that_names_it(tmp_path: Path) -> None:
    print("seed", SEED)
    rng = random.Random(SEED)
    bad = [row for kind, row in cases(rng, 4000) if kind == "bad" and not str(row.get("prompt")).startswith("another")]
    for number, row in enumerate(bad[:1000]):
        source = tmp_path / f"{number}.jsonl"
        source.write_text(json.dumps({"prompt": "fine"}) + "\n" + json.dumps(row))
        with pytest.raises(InputError) as e:
            list(read_prompts(Prompts(source=str(source))))
        message = str(e.value)
        assert message.startswith(f"{source}:2: "), f"seed {SEED}, row {number}"
        assert HARMLESS.fullmatch(message), f"seed {SEED}, row {number}"
        assert len(message) <= LONGEST_MESSAGE + 80


def hostile_reader(split: str | None = None) -> Iterator[Any]:
    rng = random.Random(SEED)
    for number in range(1000):
        yield rng.choice(
            [
                {"prompt": f"p {number}"},
                {"prompt": f"q {number}", "x": 10**5000},
                {"prompt": f"q {number}", "prompt_id": 10**5000},
                {"prompt": f"p {number}", 3: {4: {5, 6}}, None: b"bytes"},
                {"prompt": bytes(3)},
                {"prompt": Path("a")},
                None,
                3,
                "text",
                [("prompt", "p")],
            ]
        )


def test_a_readers_strange_objects_are_bad_rows_and_no_crash() -> None:
    counts = PromptCounts()
    rows = list(read_prompts(Prompts(source="tests.test_data_fuzz:hostile_reader", on_bad_row="skip"), counts=counts))
    assert (counts.rows + counts.bad, counts.duplicates) == (1000, 0)
    assert {row["messages"][0]["content"][0] for row in rows} == {"p"}
    check_any(rows, counts)
