"""What is logged, kept or shown holds no secret and nothing that a terminal would obey."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_ray.errors import InputError
from spa_ray.logs import (
    WorkerLog,
    context,
    driver_log,
    level_of,
    printable,
    printable_json,
    redact,
    redact_command,
    redact_tree,
)

LOG = logging.getLogger("spa_ray.test")
SECRETS = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=6, max_size=40).filter(
    lambda s: s not in "a line of text around it =: x.y=1 ***"
)
NAMES = st.sampled_from(["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "MY_PASSWORD_2", "TOKEN"])
ALNUM = st.text(st.sampled_from("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"), min_size=16)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


# --- secrets --------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(NAMES, SECRETS)
def test_no_value_of_a_secret_variable_is_left_in_a_text(name: str, secret: str) -> None:
    environment = {name: secret, "PATH": "/bin", "TOKENIZERS_PARALLELISM": "false"}
    for text in (secret, f"a line of text {secret} around it", f"x.y={secret}"):
        assert secret not in redact(text, environment)
    assert secret not in " ".join(redact_command(["spa", "run", f"a.b={secret}"], environment))
    assert secret not in json.dumps(redact_tree({"a": [f"<{secret}>"]}, environment))


@settings(deadline=None)
@given(st.text(st.characters(exclude_characters="/?#\"'<> \t\n\r\f\v", exclude_categories=["C", "Z"]), min_size=1))
def test_no_credentials_are_left_in_a_url(who: str) -> None:
    assert redact(f"at s3://{who}@host/a@b now", {}) == "at s3://***@host/a@b now"


@settings(deadline=None)
@given(st.sampled_from(["hf_", "sk-", "sk-ant-", "ghp_", "github_pat_"]), ALNUM)
def test_tokens_of_known_shape_are_hidden_wherever_they_stand(prefix: str, rest: str) -> None:
    assert redact(f'(with "{prefix}{rest}")', {}) == '(with "***")'


@pytest.mark.parametrize(
    "text",
    [
        "api_key=abc123def",
        "hf_token: abc123def",
        "{'password': 'abc123def'}",
        '"secret": "abc123def"',
        "Authorization: Bearer abc123def",
        "https://h/?token=abc123def&x=1",
        "AWS_SECRET_ACCESS_KEY=abc123def",
    ],
)
def test_what_is_assigned_to_a_secret_name_is_hidden(text: str) -> None:
    assert "abc123def" not in redact(text, {})


@settings(deadline=None)
@given(st.text())
def test_taking_secrets_out_twice_changes_nothing_more(text: str) -> None:
    assert redact(redact(text, {}), {}) == redact(text, {})


def test_ordinary_settings_stay_as_they_are() -> None:
    for text in ("sampling.max_tokens=64", "pad_token: </s>", "12 tokens: 5", "unexpected token: }", "key=value"):
        assert redact(text, {}) == text
    assert redact("1 of 1", {"A_KEY": "1"}) == "1 of 1"
    assert redact_tree({"max_tokens": 5, "pad_token": "x", "token_ids": [1]}, {}) == {
        "max_tokens": 5,
        "pad_token": "x",
        "token_ids": [1],
    }


def test_a_command_line_loses_the_values_of_secret_keys_alone() -> None:
    command = ["spa", "run", "c.yaml", "model.engine_kwargs.hf_token=abc", "sampling.n=5", "--password", "abc", "more"]
    assert redact_command(command, {}) == [
        *command[:3],
        "model.engine_kwargs.hf_token=***",
        "sampling.n=5",
        "--password",
        "***",
        "more",
    ]


# --- terminals ------------------------------------------------------------------------------------------------------

OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\u2029\ud800-\udfff]")


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=[])))
def test_what_is_printed_holds_nothing_that_a_terminal_obeys(text: str) -> None:
    shown = printable(text)
    assert OBEYED.search(shown) is None
    assert printable(shown) == shown
    shown.encode()


@settings(deadline=None)
@given(st.recursive(st.text(st.characters(exclude_categories=[])) | st.integers() | st.none(), st.lists, max_leaves=5))
def test_printed_json_is_one_harmless_line_with_the_same_value(value: Any) -> None:
    shown = printable_json({"value": value})
    assert OBEYED.search(shown) is None
    assert "\n" not in shown
    parsed = json.dumps(json.loads(shown))  # json joins an escaped pair of surrogates
    assert parsed == json.dumps({"value": json.loads(json.dumps(value))})


def test_an_escape_sequence_is_shown_as_what_it_is() -> None:
    assert (
        printable("\x1b[2J\x1b]0;title\x07 red\x9b31m\r\n\tend") == "\\x1b[2J\\x1b]0;title\\x07 red\\x9b31m\\x0d\n\tend"
    )


# --- structured logs ------------------------------------------------------------------------------------------------


def test_the_drivers_records_are_json_lines_that_say_where_they_come_from(tmp_path: Path) -> None:
    path = tmp_path / "run" / "logs" / "driver.jsonl"
    with driver_log(path, run="mine"), context(stage="generate"):
        LOG.info("hello\n%s", "world")
        with context(prompt_id="p7"):
            LOG.warning("odd", extra={"step": 3})
    first, second = lines(path)
    assert first == {
        "time": first["time"],
        "level": "INFO",
        "logger": "spa_ray.test",
        "message": "hello\nworld",
        "run": "mine",
        "stage": "generate",
    }
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", first["time"])
    assert (second["level"], second["prompt_id"], second["step"]) == ("WARNING", "p7", 3)


def test_a_resumed_run_adds_to_its_log_and_what_ended_it_is_the_last_record(tmp_path: Path) -> None:
    path = tmp_path / "driver.jsonl"
    with pytest.raises(ZeroDivisionError), driver_log(path, run="mine"):
        raise ZeroDivisionError("by nothing")
    with driver_log(path, run="mine"):
        LOG.info("again")
    assert [line["message"] for line in lines(path)] == ["ended: ZeroDivisionError: by nothing", "again"]


def test_no_secret_reaches_a_log_by_message_argument_field_or_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_TOKEN", "abc123def456")
    path = tmp_path / "driver.jsonl"
    with driver_log(path, run="abc123def456"), context(stage="x-abc123def456"):
        try:
            raise ValueError("no access with abc123def456")
        except ValueError:
            LOG.exception(
                "at https://me:abc123def456@host: %s",
                "abc123def456",
                extra={"hf_token": "zz", "p": Path("abc123def456")},
            )
    assert "abc123def456" not in path.read_text()
    assert lines(path)[0]["hf_token"] == "***"
    assert "ValueError: no access with ***" in lines(path)[0]["traceback"]


def test_coroutines_that_run_together_keep_their_own_fields(tmp_path: Path) -> None:
    async def one(name: str) -> None:
        with context(prompt_id=name):
            await asyncio.sleep(0)
            LOG.info(name)

    async def both() -> None:
        await asyncio.gather(*(one(name) for name in "ab"))

    with driver_log(tmp_path / "log", run="r"):
        asyncio.run(both())
    assert [(line["message"], line["prompt_id"]) for line in lines(tmp_path / "log")] == [("a", "a"), ("b", "b")]


def test_what_vllm_adds_to_every_record_is_not_told(tmp_path: Path) -> None:
    plain = logging.getLogRecordFactory()

    def with_a_name(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = plain(*args, **kwargs)
        record.vllm_process_name = "MainProcess"
        return record

    logging.setLogRecordFactory(with_a_name)
    try:
        with driver_log(tmp_path / "log", run="r"):
            LOG.info("a step")
    finally:
        logging.setLogRecordFactory(plain)
    assert "vllm_process_name" not in lines(tmp_path / "log")[0]


def test_nothing_is_logged_twice_and_nothing_stays_behind(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("spa_ray")
    before = (logger.level, logger.propagate, list(logger.handlers))
    with WorkerLog.of(run="r", stage="train").running(rank=1):
        LOG.info("a step")
    out, err = capfd.readouterr()
    assert json.loads(out) | {"time": ""} == {
        "time": "",
        "level": "INFO",
        "logger": "spa_ray.test",
        "message": "a step",
        "run": "r",
        "stage": "train",
        "rank": 1,
    }
    assert err == ""
    assert (logger.level, logger.propagate, logger.handlers) == before


def test_the_level_is_the_environments_else_by_verbose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPA_LOG_LEVEL", raising=False)
    assert (level_of(), level_of(verbose=True)) == ("INFO", "DEBUG")
    monkeypatch.setenv("SPA_LOG_LEVEL", "warning")
    assert level_of(verbose=True) == "WARNING"
    with driver_log(tmp_path / "log", run="r"):
        LOG.info("no")
        LOG.warning("yes")
    assert [line["message"] for line in lines(tmp_path / "log")] == ["yes"]
    monkeypatch.setenv("SPA_LOG_LEVEL", "loud")
    with pytest.raises(InputError, match="'LOUD' is no level; one of DEBUG"):
        level_of()
