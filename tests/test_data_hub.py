"""Data sets that `datasets` reads: a hub's (a server on loopback plays it), Parquet behind URIs, saved folders."""

from __future__ import annotations

import http.server
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spa_ray.config.prompts import Prompts
from spa_ray.data import hub
from spa_ray.data.prompts import PromptCounts, read_prompts
from spa_ray.data.readers import read_rows, source_kind
from spa_ray.errors import InputError
from tests.fake_hub import COMMIT, Hub
from tests.s3_server import BUCKET, s3_server


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


CARD = b"""---
configs:
- {config_name: one, data_files: one/*.jsonl}
- {config_name: two, data_files: two/*.jsonl}
---
"""
ROWS = [{"prompt": f"q{k % 2000}", "topic": k, "image": b"x"} for k in range(2500)]
REPOSITORIES = {
    "me/tiny": {
        "README.md": b"# A data set\n",
        "train.jsonl": b'{"prompt": "a", "k": 1}\n{"prompt": "", "k": 2}\n{"prompt": "a", "k": 3}\n',
        "test.jsonl": b'{"prompt": "c", "k": 4}\n',
    },
    "me/table": {"data/validation-00000-of-00001.parquet": parquet(ROWS)},
    "me/two": {"dev.jsonl": b'{"prompt": "a"}\n', "test.jsonl": b'{"prompt": "b"}\n'},
    "me/configs": {"README.md": CARD, "one/a.jsonl": b'{"prompt": "a"}\n', "two/a.jsonl": b'{"prompt": "b"}\n'},
    "me/broken": {"train.jsonl": b'{"prompt": "a"}\n{"prompt": \n'},
    "me/script": {"script.py": b"raise SystemExit(3)\n"},
}
# Asks in a process of its own: the hub's address is read once, when huggingface_hub is imported.
ASK = """
import json, sys
from spa_ray.config.prompts import Prompts
from spa_ray.data.prompts import PromptCounts, read_prompts
from spa_ray.errors import InputError

for source in json.loads(sys.argv[1]):
    counts, found = PromptCounts(), {}
    try:
        rows = list(read_prompts(Prompts(**source), counts=counts))
        found = {"texts": [row["messages"][-1]["content"] for row in rows], "meta": [row["meta"] for row in rows]}
    except InputError as error:
        found = {"error": str(error)}
    places = [row["row"] for row in counts.dropped.rows]
    print(json.dumps({**found, "notes": counts.notes(), "dropped": dict(counts.dropped.counts), "places": places}))
"""


def ask(sources: list[dict[str, Any]], home: Path, **environment: str) -> list[dict[str, Any]]:
    run = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps(sources)],
        env={**os.environ, "HF_HOME": str(home), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return [json.loads(line) for line in run.stdout.splitlines()]


ASKED: dict[str, dict[str, Any]] = {
    "uri": {"source": "hf://me/tiny", "on_bad_row": "skip"},
    "bare": {"source": "me/tiny", "split": "test"},
    "bad row": {"source": "hf://datasets/me/tiny"},
    "only split": {"source": "me/table", "limit": 3},
    "all rows": {"source": "me/table"},
    "several splits": {"source": "me/two"},
    "no such split": {"source": "me/two", "split": "train"},
    "config": {"source": "hf://me/configs/two"},
    "no config": {"source": "hf://me/configs"},
    "no such config": {"source": "hf://me/configs/three"},
    "revision": {"source": f"hf://me/tiny@{COMMIT}", "split": "test"},
    "no such revision": {"source": "hf://me/tiny@v2"},
    "no name": {"source": "hf://tiny"},
    "missing": {"source": "me/nothing"},
    "gated": {"source": "me/gated"},
    "broken": {"source": "me/broken"},
    "code": {"source": "me/script"},
}


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    with Hub(REPOSITORIES, gated=frozenset({"me/gated"})) as hub:
        found = ask(list(ASKED.values()), tmp_path_factory.mktemp("hub"), HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0")
    return dict(zip(ASKED, found, strict=True))


def test_a_hubs_rows_are_read_counted_and_left_out_as_a_files_are(asked: dict[str, Any]) -> None:
    found = asked["uri"]
    assert found["texts"] == ["a"]
    assert json.loads(found["meta"][0]) == {"k": 1}
    assert found["dropped"] == {"empty": 1, "duplicate": 1}
    assert found["places"] == ["hf://me/tiny, split train, row 2", "hf://me/tiny, split train, row 3"]
    assert found["notes"] == ["prompts: hf://me/tiny: the split train is read (prompts.split); left out: test"]
    assert asked["bad row"]["error"].startswith("hf://datasets/me/tiny, split train, row 2: `prompt` is empty")


def test_a_split_a_config_and_a_revision_can_be_named(asked: dict[str, Any]) -> None:
    assert asked["bare"]["texts"] == asked["revision"]["texts"] == ["c"]
    assert asked["config"]["texts"] == ["b"]
    assert asked["only split"]["texts"] == ["q0", "q1", "q2"]


def test_parquet_is_read_in_batches_without_its_bytes(asked: dict[str, Any]) -> None:
    found = asked["all rows"]
    assert len(found["texts"]) == 2000
    assert found["places"][0] == "hf://me/table, split validation, row 2001"
    assert json.loads(found["meta"][7]) == {"topic": 7}
    assert found["notes"] == [
        "prompts: columns left out (bytes, long lists of numbers, row numbers): image (2,500 rows)"
    ]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("several splits", "hf://me/two: several splits: validation, test; say which with prompts.split=validation"),
        ("no such split", "hf://me/two: no file of the split 'train' in it; it has validation, test"),
        ("no config", "available configs: ['one', 'two']"),
        ("no such config", "Available: ['one', 'two']); name one of them: hf://owner/name/CONFIG"),
        ("no such revision", "Revision 'v2' doesn't exist"),
        ("no name", "hf://tiny: no data set's name; write hf://owner/name"),
        ("missing", "hf://me/nothing: cannot be read (Dataset 'me/nothing' doesn't exist on the Hub or cannot be"),
        ("gated", "accept its conditions on its page and set HF_TOKEN, or give a local file in its place"),
        ("broken", "hf://me/broken: cannot be read"),
        ("code", "Dataset scripts are no longer supported"),
    ],
)
def test_what_cannot_be_read_is_one_line_that_says_why_and_what_to_do(
    asked: dict[str, Any], name: str, told: str
) -> None:
    message = asked[name]["error"]
    assert told in message
    assert "\n" not in message


def test_a_hub_that_may_not_be_asked_is_told_and_planned_for(tmp_path: Path) -> None:
    (found,) = ask([{"source": "hf://me/tiny"}], tmp_path, HF_HUB_OFFLINE="1")
    assert "Couldn't reach 'me/tiny' on the Hub (OfflineModeIsEnabled)" in found["error"]
    code = (
        "from spa_ray.config.models import Prompts; from spa_ray.pipeline.plan_prompts import prompt_facts\n"
        "notes = []; print(prompt_facts(Prompts(source='me/tiny', limit=70), notes, 'prompts').count, *notes)"
    )
    run = [sys.executable, "-c", code]
    told = subprocess.run(run, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=True)
    assert told.stdout.startswith("70 prompts.source: hf://me/tiny: cannot be read")
    assert "70 prompts of one sentence assumed" in told.stdout


def test_without_a_hub_the_copy_in_the_cache_is_read_but_not_for_another_revision(tmp_path: Path) -> None:
    fetch = [sys.executable, "-c", "import datasets; datasets.load_dataset('me/two')"]
    with Hub(REPOSITORIES) as hub:
        reached = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
        subprocess.run(fetch, env={**os.environ, **reached}, capture_output=True, check=True)
    sources = [{"source": f"hf://me/two{revision}", "split": "test"} for revision in ("", f"@{COMMIT}", "@main")]
    copy, same, other = ask(sources, tmp_path, HF_HUB_OFFLINE="1")
    assert copy["texts"] == same["texts"] == ["b"]
    assert f"the hub cannot be asked for main, and its copy in the cache is {COMMIT}" in other["error"]


def test_a_wait_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()
    monkeypatch.setattr(hub, "_splits", lambda address: never.wait())
    monkeypatch.setattr(hub, "WAIT_SECONDS", 0.1)
    with pytest.raises(hub.UnreachableError, match=r"hf://me/tiny: cannot be read \(no answer in 0.1 s\)"):
        list(read_rows(Prompts(source="hf://me/tiny")))
    never.set()


def test_a_file_or_folder_of_that_name_comes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert source_kind(Prompts(source="me/tiny")) == "datasets"
    (tmp_path / "me" / "tiny").mkdir(parents=True)
    assert source_kind(Prompts(source="me/tiny")) == "folder"
    assert source_kind(Prompts(source="hf://me/tiny")) == "datasets"


# --- Parquet behind a URI ---------------------------------------------------------------------------------------------


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """A web server of `tmp_path`."""
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_parquet_is_read_from_the_web(tmp_path: Path, web: str) -> None:
    (tmp_path / "p.parquet").write_bytes(parquet([{"prompt": "a", "k": 1}, {"prompt": "b", "k": 2}]))
    rows = list(read_rows(Prompts(source=f"{web}/p.parquet")))
    assert [row.values for row in rows] == [{"prompt": "a", "k": 1}, {"prompt": "b", "k": 2}]
    assert rows[1].place == f"{web}/p.parquet, split train, row 2"
    with pytest.raises(InputError, match=r"none.parquet: cannot be read \(.*check the path, the network"):
        list(read_rows(Prompts(source=f"{web}/none.parquet")))
    with pytest.raises(InputError, match=r"p.jsonl': no such file or folder; only Parquet is read from afar"):
        list(read_rows(Prompts(source=f"{web}/p.jsonl")))


def test_parquet_is_read_from_an_object_store(monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3

    with s3_server() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        client = boto3.client("s3", endpoint_url=environment["AWS_ENDPOINT_URL"])
        client.put_object(Bucket=BUCKET, Key="data/p.parquet", Body=parquet([{"prompt": "a"}]))
        (row,) = read_rows(Prompts(source=f"s3://{BUCKET}/data/p.parquet"))
    assert (row.place, row.values) == (f"s3://{BUCKET}/data/p.parquet, split train, row 1", {"prompt": "a"})


# --- save_to_disk -----------------------------------------------------------------------------------------------------


def test_what_save_to_disk_wrote_is_read(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    table = Dataset.from_dict({"prompt": ["a", "b"], "image": [b"x", b"y"], "deep": [{"x": 1}, {"x": 2}]})
    table.save_to_disk(str(tmp_path / "one"))
    assert source_kind(Prompts(source=str(tmp_path / "one"))) == "datasets"
    assert [row["messages"][0]["content"] for row in read_prompts(Prompts(source=str(tmp_path / "one")))] == ["a", "b"]
    DatasetDict({"train": table, "holdout": table.select([1])}).save_to_disk(str(tmp_path / "many"))
    counts = PromptCounts()
    (row,) = read_prompts(Prompts(source=str(tmp_path / "many"), split="holdout"), counts=counts)
    assert (row["messages"][0]["content"], json.loads(row["meta"])) == ("b", {"deep": {"x": 2}})
    assert counts.left_out == {"image": 1}
    assert len(list(read_prompts(Prompts(source=str(tmp_path / "many")), counts=counts))) == 2
    assert f"prompts: {tmp_path / 'many'}: the split train is read (prompts.split); left out: holdout" in counts.told
    (tmp_path / "one" / "data-00000-of-00001.arrow").write_bytes(b"cut")
    with pytest.raises(InputError, match="one: cannot be read"):
        list(read_prompts(Prompts(source=str(tmp_path / "one"))))
