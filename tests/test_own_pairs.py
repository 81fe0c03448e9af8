"""Pairs that a user already has: TRL's forms, cut into tokens as generation renders them, with one end token."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spa_ray.config import arm_configs
from spa_ray.data.own_pairs import SCORES, OwnPair, read_own_pairs
from spa_ray.data.schemas import PAIRS
from spa_ray.errors import InputError
from spa_ray.pipeline.own_pairs import own_pairs_stage
from spa_ray.rollout.chat import Chat
from spa_ray.rollout.settings import ChatSettings
from spa_ray.training.own_pairs import answer_ids, end_ids, write_own_pairs
from tests.fake_hub import Hub
from tests.tiny_model import build_tiny_tokenizer

HI = [{"role": "user", "content": "Hi?"}]
YES, NO = ({"role": "assistant", "content": text} for text in ("yes", "no"))
FORMS: dict[str, dict[str, Any]] = {
    "text": {"prompt": "Hi?", "chosen": "yes", "rejected": "no"},
    "conversational": {"prompt": HI, "chosen": [YES], "rejected": [NO]},
    "prompt in both": {"prompt": HI, "chosen": [*HI, YES], "rejected": [*HI, NO]},
    "text prompt in both": {"prompt": "Hi?", "chosen": [*HI, YES], "rejected": [*HI, NO]},
    "implicit prompt": {"chosen": [*HI, YES], "rejected": [*HI, NO]},
    "HH-RLHF": {"chosen": "\n\nHuman: Hi?\n\nAssistant: yes", "rejected": "\n\nHuman: Hi?\n\nAssistant: no"},
    "messages and texts": {"prompt": HI, "chosen": "yes", "rejected": "no"},
}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def only(path: Path) -> OwnPair:
    (found,) = read_own_pairs(str(path))
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_trls_forms_are_the_same_pair(tmp_path: Path, form: str, kind: str) -> None:
    path = tmp_path / f"pairs.{kind}"
    if kind == "jsonl":
        write(path, FORMS[form])
    else:
        pq.write_table(pa.Table.from_pylist([FORMS[form]]), path)
    found = only(path)
    assert (found.prompt, found.chosen, found.rejected, found.scores) == (HI, "yes", "no", None)


@pytest.mark.parametrize("names", SCORES)
def test_scores_are_found_by_their_public_names(tmp_path: Path, names: tuple[str, str]) -> None:
    assert only(write(tmp_path / "p.jsonl", {**FORMS["text"], names[0]: 9, names[1]: 3.5})).scores == (9.0, 3.5)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "Hi?", "chosen": "yes"}, "p.jsonl:2: has no `rejected`"),
        ({"chosen": "yes", "rejected": "no"}, "p.jsonl:2: has no `prompt`, and `chosen` and `rejected` are text"),
        ({"chosen": [*HI, YES], "rejected": [{"role": "user", "content": "Ho?"}, NO]}, "differ before their last"),
        ({"prompt": "Hi?", "chosen": [YES, YES], "rejected": "no"}, "`chosen` is not one assistant message"),
        ({"prompt": "Hi?", "chosen": HI, "rejected": "no"}, "`chosen` is not one assistant message"),
        ({**FORMS["text"], "score_chosen": "high", "score_rejected": 1}, "`score_chosen` is 'high'; a score is"),
        ({**FORMS["text"], "chosen": " "}, "`chosen` is empty"),
    ],
)
def test_a_row_that_is_no_pair_is_told_with_its_line(tmp_path: Path, row: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError) as error:
        list(read_own_pairs(str(write(tmp_path / "p.jsonl", FORMS["text"], row))))
    assert told in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(build_tiny_tokenizer(), model="tiny")


def test_an_answers_ids_are_what_generation_would_have_written(chat: Chat) -> None:
    tokenizer = build_tiny_tokenizer()
    end = tokenizer.eos_token_id
    ids = answer_ids(chat, HI, "yes, 10", frozenset({end}))
    assert ids == [*tokenizer.encode("yes, 10", add_special_tokens=False), end]
    assert answer_ids(chat, HI, "yes", frozenset({end, 1})).count(end) == 1


def test_a_template_that_writes_no_end_token_gets_one() -> None:
    bare = (
        "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    chat = Chat(build_tiny_tokenizer(bare), model="tiny")
    assert answer_ids(chat, HI, "y", frozenset({2}))[-1] == 2


def test_the_table_is_a_pairs_table_with_gaps_where_there_are_scores(tmp_path: Path, chat: Chat) -> None:
    rows = [FORMS["text"], {**FORMS["text"], "chosen": "yes!", "score_chosen": 8, "score_rejected": 3}]
    source = write(tmp_path / "p.jsonl", *rows)
    assert write_own_pairs(read_own_pairs(str(source)), tmp_path / "pairs.parquet", chat, frozenset({2})) == 2
    table = pq.read_table(tmp_path / "pairs.parquet")
    assert table.schema.equals(PAIRS)
    assert table["gap"].to_pylist() == table["margin"].to_pylist() == [1.0, 5.0]
    assert len(set(table["pair_id"].to_pylist())) == 2
    assert len(set(table["prompt_id"].to_pylist())) == 1


def test_no_pair_at_all_is_told(tmp_path: Path, chat: Chat) -> None:
    with pytest.raises(InputError, match="there is none in it"):
        write_own_pairs([], tmp_path / "pairs.parquet", chat, frozenset({2}))


def test_end_ids_come_from_the_generation_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    assert end_ids(tmp_path) == {2}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    assert end_ids(tmp_path) == {5, 7}
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match="names an eos_token_id"):
        end_ids(tmp_path)


def test_a_bad_row_leaves_nothing_behind_that_the_mended_file_is_refused_for(tmp_path: Path, tiny_model: Path) -> None:
    config = arm_configs({"model": {"path": str(tiny_model)}}, (), where="test", stem="test")["main"]
    source, chat = write(tmp_path / "p.jsonl", FORMS["text"], {"prompt": "Hi?"}), ChatSettings.of(config.model)

    def stage() -> Path:
        return Path(str(own_pairs_stage(config, source, out=tmp_path / "out", model=tiny_model, chat=chat)))

    with pytest.raises(InputError, match=r"p\.jsonl:2"):
        stage()
    assert not (tmp_path / "out").exists()
    write(source, FORMS["text"])
    assert pq.read_table(stage() / "pairs.parquet").num_rows == 1


def test_bad_rows_are_left_out_and_told_where_the_config_says_so(tmp_path: Path, tiny_model: Path) -> None:
    raw = {"model": {"path": str(tiny_model)}, "prompts": {"on_bad_row": "skip"}}
    config, told = arm_configs(raw, (), where="test", stem="test")["main"], list[str]()
    source, chat = write(tmp_path / "p.jsonl", FORMS["text"], {"prompt": "Hi?"}), ChatSettings.of(config.model)
    folder = own_pairs_stage(config, source, out=tmp_path / "o", model=tiny_model, chat=chat, say=told.append)
    assert pq.read_table(str(folder)).num_rows == 1
    assert told == [f"warning: pairs: 1 rows left out: malformed (the first: {source}:2: has no `chosen`; a pair has "
                    "the columns prompt, chosen and rejected)"]  # fmt: skip


FROM_A_HUB = """
import sys
from pathlib import Path
import pyarrow.parquet as pq
from spa_ray.config import arm_configs
from spa_ray.rollout.settings import ChatSettings
from spa_ray.pipeline.own_pairs import own_pairs_stage

model, out, split = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
config = arm_configs({"model": {"path": str(model)}, "prompts": {"split": split}}, (), where="t", stem="t")["main"]
chat = ChatSettings.of(config.model)
print(*pq.read_table(own_pairs_stage(config, "hf://me/pairs", out=out, model=model, chat=chat))["prompt"].to_pylist())
"""


def test_pairs_of_a_hub_are_made_into_a_table_once(tmp_path: Path, tiny_model: Path) -> None:
    rows = "".join(json.dumps(row) + "\n" for row in [FORMS["conversational"]] * 2).encode()

    def made(url: str, split: str) -> subprocess.CompletedProcess[str]:
        environment = {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
        command = [sys.executable, "-c", FROM_A_HUB, str(tiny_model), str(tmp_path / "out"), split]
        return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120)

    table = tmp_path / "out" / "pairs" / "pairs.parquet"
    with Hub({"me/pairs": {"train.jsonl": rows, "test.jsonl": rows}}) as hub:
        first = made(hub.url, "train")
        assert (first.returncode, first.stdout.splitlines()[-1:]) == (0, [f"{HI} {HI}"]), first.stderr
        written = table.stat().st_mtime_ns
        assert made(hub.url, "train").returncode == 0
        assert table.stat().st_mtime_ns == written
        assert "begun" in (other := made(hub.url, "test").stderr) or "finished with other settings" in other


@pytest.mark.engine
@pytest.mark.long
@pytest.mark.usefixtures("ray_session")
def test_spa_train_takes_them_and_resumes_by_the_same_command(tmp_path: Path, tiny_model: Path, spa: Any) -> None:
    rows = [{"prompt": f"question {k}?", "chosen": f"yes {k}", "rejected": f"no, not {k}"} for k in range(12)]
    source, config = write(tmp_path / "mine.jsonl", *rows), tmp_path / "c.yaml"
    train = {"method": "spa_simpo", "dtype": "float32", "batch_size": 4, "max_length": 64, "lr": 1e-4}
    config.write_text(json.dumps({"model": {"path": str(tiny_model)}, "train": train}))
    command = ("train", source, "--out", tmp_path / "model", "--config", config, "--json")
    status, out, err = spa(*command)
    assert status == 0, err
    assert json.loads(out.splitlines()[-1])["pairs"] == 12
    assert (tmp_path / "model" / "model.safetensors").is_file()
    made = (tmp_path / "model.pairs" / "pairs" / "pairs.parquet").stat().st_mtime_ns
    assert spa(*command)[0] == 0
    assert (tmp_path / "model.pairs" / "pairs" / "pairs.parquet").stat().st_mtime_ns == made
    write(source, *rows[:6])
    status, _, err = spa(*command)
    assert status == 2
    assert "model.pairs" in err
    assert "other settings or input" in err
